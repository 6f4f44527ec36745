"""Commands that use features: extract, match, evaluate. Options and one call each, as in :mod:`samfeat.cli`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from samfeat.cli_options import Device, DeviceOption, errors, must_exist
from samfeat.pipelines.live import console, progress_bar

features = typer.Typer()


class Method(StrEnum):
    """Features that can be extracted, matched and evaluated."""

    samfeat = "samfeat"
    sift = "sift"
    orb = "orb"


class FeatureFormat(StrEnum):
    """How extracted features are written."""

    hloc = "hloc"
    d2net = "d2net"


class Verification(StrEnum):
    """Geometric verification of matches."""

    none = "none"
    fundamental = "fundamental"
    homography = "homography"


MethodOption = Annotated[Method, typer.Option(help="Features: ours, or OpenCV's for comparison.")]
WeightsOption = Annotated[
    Path | None, typer.Option(help="Weights of --method samfeat: .safetensors of `train`, or the authors' .pt.")
]
KeypointsOption = Annotated[
    int | None, typer.Option(min=1, help="Keep at most so many keypoints an image, best first.")
]


@features.command()
def extract(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a text file with one path a line.")],
    output: Annotated[Path, typer.Argument(help="An .h5 file (hloc), or a folder (d2net).")],
    method: MethodOption = Method.samfeat,
    weights: WeightsOption = None,
    format_: Annotated[
        FeatureFormat, typer.Option("--format", help="hloc's HDF5, or D2-Net's npz.")
    ] = FeatureFormat.hloc,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Extract features of many images. Run again to go on after an interruption."""
    must_exist(images, *([weights] if weights else []))
    from samfeat.pipelines.extract import extract_folder

    chosen = _method(method, weights, max_keypoints, device)
    with progress_bar(f"{chosen.name} features") as bar:
        made = extract_folder(images, output, method=chosen, format=format_.value, progress=bar)
    console.print(
        f"[bold]{output}[/]: features of {len(made.written)} images written, of {len(made.skipped)} there before"
    )
    if made.failed:
        for failed, reason in made.failed.items():
            errors.print(f"skipped {failed}: {reason}", markup=False)
        raise ValueError(f"{len(made.failed)} images could not be read; the features of all others are written")


@features.command("match")
def match_command(
    image0: Annotated[Path, typer.Argument(help="First photograph.")],
    image1: Annotated[Path, typer.Argument(help="Second photograph.")],
    out: Annotated[Path, typer.Option(help="Picture of the matches.")] = Path("matches.png"),
    method: MethodOption = Method.samfeat,
    weights: WeightsOption = None,
    verify: Annotated[
        Verification, typer.Option(help="Geometric verification by MAGSAC++.")
    ] = Verification.fundamental,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Match two photographs and draw the result."""
    must_exist(image0, image1, *([weights] if weights else []))
    from samfeat.pipelines.match import match_images

    chosen = _method(method, weights, max_keypoints, device)
    found = match_images(image0, image1, out, method=chosen, verify=verify.value)
    kept = "" if found["inliers"] is None else f", [bold]{found['inliers']}[/] of them agree with one {verify.value}"
    drawn = f" ({found['drawn']} drawn)" if found["drawn"] < found["matches"] else ""
    console.print(
        f"{found['keypoints0']} and {found['keypoints1']} keypoints, {found['matches']} mutual matches{kept} "
        f"-> {out}{drawn}"
    )


@features.command()
def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="hpatches: mean matching accuracy on image sequences. reconstruct: structure from motion of photo "
            "collections. localize: poses of query photographs (Aachen v1.1, or any posed photographs)."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="hpatches: folder of sequences, <name>/1..6.ppm|png|jpg with H_1_2..H_1_6. reconstruct: folder of "
            "photographs, or of such folders. localize: Aachen's folder, or photographs with cameras.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for features, results.json, table and figure.")] = Path(
        "runs/hpatches"
    ),
    method: MethodOption = Method.samfeat,
    weights: WeightsOption = None,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
    name: Annotated[str | None, typer.Option(help="What the method is called in table and figure.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again where the settings changed.")] = False,
) -> None:
    """Evaluate features. Predicts once, then evaluates from the stored features."""
    if benchmark not in ("hpatches", "reconstruct", "localize"):
        raise ValueError(f"unknown evaluation {benchmark!r}: there are hpatches, reconstruct and localize")
    must_exist(data, *([weights] if weights else []))
    from samfeat.pipelines.hpatches import evaluate_hpatches

    chosen = _method(method, weights, max_keypoints, device)
    if benchmark != "hpatches":
        _evaluate_scenes(benchmark, data, out, method=chosen, name=name, overwrite=overwrite)
        return
    with progress_bar(f"{chosen.name} features") as bar:
        results = evaluate_hpatches(data, out, method=chosen, name=name, overwrite=overwrite, progress=bar)
    for subset, curve in results["mma"].items():
        console.print(
            f"{results['name']}, {subset}: MMA@1 {curve[0]:.3f}, MMA@3 [bold]{curve[2]:.3f}[/], MMA@5 {curve[4]:.3f}, "
            f"AUC@5 {results['auc5'][subset]:.3f}, {results['matches'][subset]:.0f} matches a pair"
        )
    console.print(f"{results['features']['mean']:.0f} features an image; tables and figure in [bold]{out}[/]")


def _evaluate_scenes(benchmark: str, data: Path, out: Path, *, method: Any, name: str | None, overwrite: bool) -> None:
    from samfeat.pipelines.localization import evaluate_localize
    from samfeat.pipelines.reconstruction import evaluate_reconstruct

    run = evaluate_reconstruct if benchmark == "reconstruct" else evaluate_localize
    with progress_bar(f"{method.name} {benchmark}") as bar:
        results = run(data, out, method=method, name=name, overwrite=overwrite, progress=bar)
    for scene, facts in results["scenes"].items():
        if benchmark == "reconstruct":
            found = f"[bold]{facts['registered']}[/] of {facts['images']} images, {facts['points']} points"
        else:
            queries = facts["queries"]["all"]
            found = (
                f"[bold]{queries['localized']}[/] of {queries['images']} queries, {facts['points']} points in the map"
            )
        console.print(f"{results['name']}, {scene}: {found}, see {out / results['name'] / scene / 'view.html'}")
    console.print(f"tables and figure in [bold]{out}[/]")


def _method(name: Method, weights: Path | None, max_keypoints: int | None, device: Device) -> Any:
    from samfeat.pipelines.extract import load_method

    return load_method(name.value, weights=weights, max_keypoints=max_keypoints, device=device.value)
