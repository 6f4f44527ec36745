"""Commands that use features and weights. Options and one call each, as in :mod:`samfeat.cli`."""

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


class Estimator(StrEnum):
    """What verifies matches."""

    magsac = "magsac"
    poselib = "poselib"


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
RatioOption = Annotated[
    float | None,
    typer.Option(help="Keep matches nearer than this multiple of the second best, at unit length; 0.8 is common."),
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
    max_size: Annotated[
        int | None, typer.Option(min=16, help="Shrink images whose longer side is longer; keypoints stay at full size.")
    ] = None,
    multiscale: Annotated[
        bool | None, typer.Option("--multiscale/--single-scale", help="Scales 1 to 0.3 too; as in the weights file.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Images that are read ahead.")] = 2,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew.")] = False,
) -> None:
    """Extract features of many images. Run again to go on after an interruption."""
    must_exist(images, *([weights] if weights else []))
    from samfeat.pipelines.extract import extract_folder
    from samfeat.pipelines.features.methods import shrunk

    chosen = _method(method, weights, max_keypoints, device, multiscale=multiscale)
    if max_size is not None:
        chosen = shrunk(chosen, max_size)
    with progress_bar(f"{chosen.name} features", rate="images/s") as bar:
        made = extract_folder(
            images, output, method=chosen, format=format_.value, overwrite=overwrite, threads=threads, progress=bar
        )
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
    maps: Annotated[
        Path | None, typer.Option(help="Also a picture of keypoints and, of samfeat, heat-map, attention and edges.")
    ] = None,
    method: MethodOption = "samfeat",
    weights: WeightsOption = None,
    verify: Annotated[Verification, typer.Option(help="Geometric verification.")] = Verification.fundamental,
    estimator: Annotated[Estimator, typer.Option(help="OpenCV's MAGSAC++, or poselib.")] = Estimator.magsac,
    ratio: RatioOption = None,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Match two photographs and draw the result."""
    must_exist(image0, image1, *([weights] if weights else []))
    from samfeat.pipelines.match import match_images

    chosen = _method(method, weights, max_keypoints, device)
    found = match_images(
        image0, image1, out, method=chosen, verify=verify.value, estimator=estimator.value, ratio=ratio, maps=maps
    )
    kept = "" if found["inliers"] is None else f", [bold]{found['inliers']}[/] of them agree with one {verify.value}"
    drawn = f" ({found['drawn']} drawn)" if found["drawn"] < found["matches"] else ""
    console.print(
        f"{found['keypoints0']} and {found['keypoints1']} keypoints, {found['matches']} mutual matches{kept} "
        f"-> {out}{drawn}"
    )


@features.command("match-pairs")
def match_pairs_command(
    features_file: Annotated[Path, typer.Argument(metavar="FEATURES", help="The .h5 file of `extract`, or of hloc.")],
    output: Annotated[Path, typer.Argument(help="An .h5 file (hloc's matches), or a .db file (COLMAP's database).")],
    pairs: Annotated[
        Path | None, typer.Option(help="Text file, two image names a line. Every pair of images by default.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, for the cameras of a database.")] = None,
    ratio: RatioOption = None,
    cosine: Annotated[bool, typer.Option("--cosine", help="Compare descriptors at unit length.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew.")] = False,
) -> None:
    """Match many images, for hloc or COLMAP. Run again to go on after an interruption."""
    must_exist(features_file, *([pairs] if pairs else []), *([images] if images else []))
    from samfeat.pipelines.match import match_pairs, read_pairs

    names = None if pairs is None else read_pairs(pairs)
    with progress_bar("matches", rate="pairs/s") as bar:
        made = match_pairs(
            features_file,
            output,
            pairs=names,
            ratio=ratio,
            cosine=cosine or ratio is not None,
            images=images,
            overwrite=overwrite,
            progress=bar,
        )
    console.print(f"[bold]{output}[/]: {made.matches} matches of {made.pairs} pairs of {made.images} images")


@features.command()
def export(
    weights: Annotated[Path, typer.Argument(help=".safetensors of `train`, or the authors' .pt.")],
    output: Annotated[Path, typer.Argument(help="An .onnx, .pt (loads in the authors' code) or .safetensors file.")],
    max_keypoints: Annotated[
        int | None, typer.Option(min=1, help="Keypoints that an ONNX model returns, padded; as in the weights file.")
    ] = None,
) -> None:
    """Write trained weights for other programs."""
    must_exist(weights)
    from samfeat.student.extractor import SAMFeat

    if output.suffix not in (".onnx", ".pt", ".safetensors"):
        raise ValueError(f"{output}: weights are written as .onnx, .pt or .safetensors; choose such a name")
    if output.suffix == ".onnx":
        from samfeat.student.onnx import check_packages

        check_packages()
    extractor = SAMFeat.from_pretrained(weights, **({} if max_keypoints is None else {"max_keypoints": max_keypoints}))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        extractor.save(output)
    elif output.suffix == ".pt":
        from samfeat.student.export import save_checkpoint

        save_checkpoint(output, extractor.network)
    else:
        _export_onnx(output, extractor)
    console.print(f"[bold]{output}[/]: {output.stat().st_size / 1e6:.1f} MB")


def _export_onnx(output: Path, extractor: Any) -> None:
    import torch

    from samfeat.student.onnx import compare, export_onnx

    with console.status("tracing the extractor"):
        export_onnx(output, extractor)
        agreement = compare(output, extractor, torch.rand(3, 120, 170, generator=torch.Generator().manual_seed(0)))
    console.print(
        f"onnxruntime agrees with torch on an image of noise: maps within {agreement.maps:.0e}, "
        f"{agreement.found} of {agreement.keypoints} keypoints, their descriptors within {agreement.features:.0e}"
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
    from samfeat.pipelines.evaluation.report import write_evaluation_report

    run = find_evaluation(benchmark)
    out = out or Path("runs") / benchmark
    if benchmark == "edges":
        from samfeat.pipelines.evaluation.boundaries import load_detector

        chosen: Any = load_detector(method, weights=weights, device=device.value)
    else:
        chosen = _method(method, weights, max_keypoints, device)
    with progress_bar(f"{name or chosen.name} on {benchmark}") as bar:
        run(data, out, method=chosen, name=name, overwrite=overwrite, progress=bar)
    console.print((out / "table.md").read_text(), markup=False, soft_wrap=True, end="")
    page = write_evaluation_report(out / "report.html", [out])
    console.print(f"results and figures in [bold]{out}[/], side by side in [bold]{page}[/]")


@features.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` has written.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Put several evaluations, and all methods in them, on one page."""
    from samfeat.pipelines.evaluation.report import write_evaluation_report

    must_exist(*folders)
    console.print(f"[bold]{write_evaluation_report(out, folders)}[/]")


benchmark = typer.Typer(no_args_is_help=True, help="Measure this machine.")
features.add_typer(benchmark, name="benchmark")


@benchmark.command()
def speed(
    out: Annotated[Path, typer.Option(help="The table, in Markdown.")] = Path("bench/speed.md"),
    weights: Annotated[Path | None, typer.Option(help="Trained weights; time hardly depends on them.")] = None,
    peers: Annotated[Path | None, typer.Option(help="Folder of XFeat's, ALIKED's, DISK's own weights.")] = None,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the photograph.")] = "480x640",
    threads: Annotated[int, typer.Option(min=1, help="Of torch and OpenCV.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images in one call of SAMFeat.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    max_keypoints: Annotated[int, typer.Option(min=1, help="Keypoints an image, for every method.")] = 2048,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure torch.compile as well.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Time SAMFeat, full and slim, in every precision the device is fast in, beside SIFT, ORB and peers."""
    must_exist(*(path for path in (weights, peers) if path))
    from samfeat.pipelines.features.methods import choose_device
    from samfeat.pipelines.speed import benchmark_speed, other_methods, parse_size, table
    from samfeat.student.extractor import SAMFeat

    pixels, where = parse_size(size), choose_device(device.value)
    full = SAMFeat.from_pretrained(weights, max_keypoints=max_keypoints) if weights else None
    models = {
        "SAMFeat": full or SAMFeat(max_keypoints=max_keypoints, detection_threshold=0.0),
        "SAMFeat slim": SAMFeat("slim", max_keypoints=max_keypoints, detection_threshold=0.0),
    }
    with progress_bar("timing") as bar:
        found = benchmark_speed(
            out,
            models={name: model.to(where) for name, model in models.items()},
            methods=other_methods(peers, max_keypoints=max_keypoints, device=where),
            size=pixels,
            threads=threads,
            batch=batch,
            compiled=compiled,
            repeats=repeats,
            progress=bar,
        )
    console.print(table(found), markup=False)
    console.print(f"[bold]{out}[/]")


def _method(name: str, weights: Path | None, max_keypoints: int | None, device: Device, **options: Any) -> Any:
    from samfeat.pipelines.features.methods import load_method

    chosen = {key: value for key, value in options.items() if value is not None}
    return load_method(name, weights=weights, max_keypoints=max_keypoints, device=device.value, **chosen)
