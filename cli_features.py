"""Commands that use features: extract, match, evaluate. Options and one call each, as in :mod:`samfeat.cli`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from samfeat.cli_options import Device, DeviceOption, errors, must_exist
from samfeat.pipelines.live import console, progress_bar

features = typer.Typer()


class FeatureFormat(StrEnum):
    """How extracted features are written."""

    hloc = "hloc"
    d2net = "d2net"


class Verification(StrEnum):
    """Geometric verification of matches."""

    none = "none"
    fundamental = "fundamental"
    homography = "homography"


MethodOption = Annotated[
    str,
    typer.Option(help="samfeat; for comparison sift, orb (OpenCV), aliked, disk, xfeat (kornia, with --weights)."),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="Weights of samfeat: .safetensors of `train`, or the authors' .pt; of others: their own file."),
]
KeypointsOption = Annotated[
    int | None, typer.Option(min=1, help="Keep at most so many keypoints an image, best first.")
]


@features.command()
def extract(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a text file with one path a line.")],
    output: Annotated[Path, typer.Argument(help="An .h5 file (hloc), or a folder (d2net).")],
    method: MethodOption = "samfeat",
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
    method: MethodOption = "samfeat",
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
            help="hpatches (image sequences), reconstruct (photo collections), localize (posed scenes), "
            "pose (relative pose of pairs) or edges (human boundaries)."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder of sequences, photographs, posed scenes, pairs or human boundaries.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for features, tables and figures; runs/<benchmark>.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="samfeat, sift, orb, aliked, disk, xfeat, or features of other programs: an .h5 in hloc's layout. "
            "For edges: samfeat, canny or a teacher."
        ),
    ] = "samfeat",
    weights: WeightsOption = None,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
    name: Annotated[str | None, typer.Option(help="What the method is called in table and figure.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again where the settings changed.")] = False,
) -> None:
    """Evaluate features, or edges. Predicts once, then evaluates what is stored. Run again to go on."""
    must_exist(data, *([weights] if weights else []))
    from samfeat.pipelines.evaluate import find_evaluation

    run = find_evaluation(benchmark)
    out = out or Path("runs") / benchmark
    if benchmark == "edges":
        from samfeat.pipelines.boundaries import load_detector

        chosen: Any = load_detector(method, weights=weights, device=device.value)
    else:
        chosen = _method(method, weights, max_keypoints, device)
    with progress_bar(f"{name or chosen.name} on {benchmark}") as bar:
        run(data, out, method=chosen, name=name, overwrite=overwrite, progress=bar)
    console.print((out / "table.md").read_text(), markup=False, soft_wrap=True, end="")
    console.print(f"results and figures in [bold]{out}[/]")


def _method(name: str, weights: Path | None, max_keypoints: int | None, device: Device) -> Any:
    from samfeat.pipelines.extract import load_method

    return load_method(name, weights=weights, max_keypoints=max_keypoints, device=device.value)
