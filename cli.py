"""samfeat-cli: the options of each command and one call. Heavy imports happen inside the commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from samfeat import __version__
from samfeat.files import check_outputs
from samfeat.pipelines.errors import is_of_the_user, one_line
from samfeat.pipelines.live import complain, log_to_console, note, progress_bar, say, show_table, training_line
from samfeat.teacher_cache.sources import SOURCES
from samfeat.teacher_cache.teachers import TEACHERS

USER_ERROR, INTERRUPTED = 2, 75  # EX_TEMPFAIL of sysexits.h: the same command resumes
MOST_KEYPOINTS = 1_000_000
UsageError: Any = typer.BadParameter.__mro__[1]  # typer only exports its subclasses


class OneLineErrors(TyperGroup):
    """Report user errors as one line on stderr with exit code 2; Ctrl-C and SIGTERM exit with code 75.

    ``SAMFEAT_TRACEBACK=1`` shows the traceback instead, for bug reports.
    """

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options before the command."""
        with _one_line_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        log_to_console()
        with _one_line_errors():
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        reason = str(stop) or "finished work is kept, run the same command again to resume"
        complain("interrupted: {reason}", reason=reason)
        raise typer.Exit(INTERRUPTED) from None
    except ConnectionError as error:
        complain("[red]interrupted: {reason}[/]", reason=one_line(error))
        raise typer.Exit(INTERRUPTED) from None
    except UsageError as error:
        if os.environ.get("SAMFEAT_TRACEBACK") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        help_of = f" ({error.ctx.command_path} --help)" if error.ctx else ""
        complain("[red]error: {reason}[/]", reason=" ".join(error.format_message().split()) + help_of)
        raise typer.Exit(USER_ERROR) from None
    except Exception as error:
        if os.environ.get("SAMFEAT_TRACEBACK") or not is_of_the_user(error):
            raise
        complain("[red]error: {reason}[/]", reason=one_line(error))
        raise typer.Exit(USER_ERROR) from None


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Local features taught by the Segment Anything Model.\n\n"
    "To run everything on the embedded sample, step by step: [bold]sample[/], [bold]teacher-cache[/], "
    "[bold]inspect-cache[/], [bold]train[/], [bold]evaluate[/], [bold]match[/]. Every command has its own --help.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        say("samfeat {version}", version=__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


DeviceOption = Annotated[Device, typer.Option(help="auto uses a GPU if there is one; mps is Apple's.")]


def must_exist(*paths: Path | None) -> None:
    """Check that paths exist.

    Raises:
        FileNotFoundError: names the first missing path.
    """
    for path in paths:
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")


def _weights(text: str) -> Path:
    from samfeat.student.weights import find_weights

    return find_weights(text)


class Matching(StrEnum):
    """Which photographs are matched with each other."""

    exhaustive = "exhaustive"
    sequential = "sequential"


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Output folder; created if missing.")] = Path("sample"),
    seed: Annotated[int, typer.Option(help="Seed of poses, light and noise.")] = 0,
) -> None:
    """Write the embedded sample: a small data set with exact geometry, in raw MegaDepth's layout."""
    from samfeat.pipelines.sample.write import write_sample

    with progress_bar("rendering the sample") as bar:
        summary = write_sample(folder, seed=seed, progress=bar)
    say(
        "[bold]{folder}[/]: {images} images of {scenes} scenes, {heldout} held-out sequences",
        folder=folder,
        images=summary.images,
        scenes=summary.scenes,
        heldout=len(summary.heldout),
    )


@app.command()
def prepare(
    photos: Annotated[Path, typer.Argument(help="Folder of photographs of one place, taken from many viewpoints.")],
    out: Annotated[Path, typer.Argument(help="Folder of the reconstruction, for teacher-cache --data.")],
    matching: Annotated[
        Matching,
        typer.Option(help="Match all pairs of photographs, or only neighbours in file-name order."),
    ] = Matching.exhaustive,
    max_size: Annotated[
        int, typer.Option(min=200, max=100_000, help="Longer side of the written images, in pixels.")
    ] = 1600,
) -> None:
    """Reconstruct a folder of photographs with COLMAP, to train on real pairs. Run again to resume."""
    must_exist(photos)
    check_outputs([out], [photos], outside=True)
    _import_pycolmap()
    from samfeat.pipelines.prepare import prepare_photos

    with ExitStack() as bars:
        steps: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in steps:
                bars.close()
                steps[step] = bars.enter_context(progress_bar(step))
            steps[step](done, total)

        summary = prepare_photos(photos, out, matching=matching.value, max_size=max_size, progress=progress)
    say(
        "[bold]{out}[/]: {registered} of {photos} photographs registered, {models} model{plural}, {points} points, "
        "reprojection error {error:.2f} px",
        out=out,
        registered=summary.registered,
        photos=summary.photos,
        models=summary.models,
        plural="s" * (summary.models > 1),
        points=summary.points,
        error=summary.error,
    )
    for name in summary.left_out:
        complain("left out {name}: it could not be registered", name=name)


@app.command("teacher-cache")
def teacher_cache(
    data: Annotated[
        str, typer.Option(help="Raw MegaDepth, COLMAP's models, MTLDesc's released set, or any folder of photographs.")
    ],
    source: Annotated[
        str,
        typer.Option(
            help=f"Type of DATA: {', '.join(SOURCES)}, or your own module:Class. auto goes by the layout; aligned "
            "(one sub-folder per fixed camera) has to be given."
        ),
    ] = "auto",
    cache: Annotated[str, typer.Option(help="Folder for the store; other stores in it are kept.")] = "teacher_cache",
    name: Annotated[str | None, typer.Option(help="Name of the store; by default <data>-<teacher>.")] = None,
    teacher: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(TEACHERS)}, or your own module:Class. classical needs neither weights nor a GPU. "
            "classical+hed takes the embedding from the first and the rest from the second, see docs/teachers.md."
        ),
    ] = "classical",
    teacher_option: Annotated[
        list[str] | None, typer.Option(help="key=value: a parameter of the teacher; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the teacher; SAM's are downloaded unless given.")
    ] = None,
    embedding_stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Pixels per cell of the stored embedding: 8 is all that training uses. "
            "Default: the teacher's own grid.",
        ),
    ] = None,
    crop_size: Annotated[
        int | None, typer.Option(min=64, max=16384, help="Side of the crops in pixels; 400 by default.")
    ] = None,
    pairs_per_scene: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Pairs per MegaDepth scene, COLMAP model or fixed camera; 100 by default."
        ),
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="Base detector of the keypoint labels: an OpenCV detector such as harris or sift, the weights of a "
            "student, or kornia:aliked, kornia:disk, kornia:xfeat."
        ),
    ] = "harris",
    labels_weights: Annotated[
        Path | None, typer.Option(help="Weights of a kornia detector: the file released by its authors.")
    ] = None,
    device: DeviceOption = Device.auto,
    shard_images: Annotated[int, typer.Option(min=2, max=100_000, help="Images per shard, the unit of work.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of crops, pairs and label homographies.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Shards processed at once in each process; by default one per processor, or 2."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Worker processes on this machine.")] = 0,
    devices: Annotated[str, typer.Option(help="GPUs of this machine, such as 0,1,2: one worker process each.")] = "",
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler, such as tcp://10.0.0.1:8786.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="K/N: build part K of N; N such runs, on any machines, fill one store.")
    ] = "1/1",
    shard: Annotated[str | None, typer.Option(hidden=True, help="The former name of --part.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unusable image.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check the store, and redo damaged or skipped images.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few images and estimate the time and size of a run.")
    ] = False,
) -> None:
    """Stage one: run the teacher over images and store its targets. Run again to resume after an interruption.

    DATA and CACHE may be URLs, such as s3://bucket/folder.
    """
    from samfeat.pipelines.build_cache import build_cache, choose_labels, grouped, parse_part
    from samfeat.pipelines.plan_cache import make_plan
    from samfeat.pipelines.workers import Workers
    from samfeat.teacher_cache.sources import open_source
    from samfeat.teacher_cache.teachers import make_teacher, parse_options, unfetched

    with suppress(ImportError):  # only needed for COLMAP models
        _import_pycolmap()
    short = teacher.rpartition(":")[2]
    path = _store_path(cache, name, default=f"{Path(data.rpartition('://')[2]).resolve().name or 'data'}-{short}")
    share = parse_part(shard or part)
    options = parse_options(teacher_option or [])
    chosen = choose_labels(labels, labels_weights)
    crew = Workers(threads, processes=workers, devices=tuple(filter(None, devices.split(","))), scheduler=scheduler)
    images = open_source(data, kind=source, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)
    downloads = Path("" if "://" in cache else cache) / "checkpoints"
    if dry_run and (known := unfetched(teacher, checkpoint=checkpoint, downloads=downloads)):
        note(f"{len(images) * (2 if images.paired else 1)} images; a run would first download {known}")
        note("give --checkpoint to estimate time and size as well: a dry run downloads nothing")
        return
    with progress_bar("fetching SAM's checkpoint", bytes_=True) as bar:
        made = make_teacher(
            teacher,
            options=options,
            checkpoint=checkpoint,
            downloads=downloads,
            device=device.value,
            embedding_stride=embedding_stride,
            progress=bar,
        )
    if dry_run:
        note(make_plan(path, images, made, labels=chosen, shard_images=shard_images))
        return
    with progress_bar(f"{short} teacher", rate="images/s") as bar:
        summary = build_cache(
            path,
            images,
            made,
            labels=chosen,
            seed=seed,
            shard_images=shard_images,
            workers=crew,
            part=share,
            strict=strict,
            repair=repair,
            progress=bar,
        )
    say(
        "[bold]{path}[/]: {images} images, {written} of them new",
        path=summary.path,
        images=summary.images,
        written=summary.written,
    )
    for reason, count in grouped(summary.passed_over):
        complain("replaced {count} pairs by others: {reason}", count=count, reason=reason)
    if summary.failures:
        for reason, count in grouped(reason for _, reason in summary.failures):
            complain("skipped {count} image{s}: {reason}", count=count, s="s" * (count > 1), reason=reason)
        stored = summary.images - len(summary.failures)
        raise ValueError(
            f"{len(summary.failures)} of {summary.images} images could not be used, "
            + (f"the other {stored} are stored" if stored else "so there is nothing to train on")
            + ": fix them and run the same command again"
        )


@app.command("inspect-cache")
def inspect_cache(
    cache: Annotated[str, typer.Argument(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    image: Annotated[str | None, typer.Option(help="Show one image, by number, name or part of the name.")] = None,
    pair: Annotated[
        str | None, typer.Option(help="Show one pair, by number, or by (part of) the name of one of its images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture written by --image and --pair.")] = Path("inspect.png"),
    html: Annotated[Path | None, typer.Option(help="Write a self-contained gallery.")] = None,
    gallery: Annotated[
        int, typer.Option(min=1, max=100_000, help="Images in the gallery, spread evenly over the store.")
    ] = 24,
    verify: Annotated[bool, typer.Option("--verify", help="Check every stored value.")] = False,
    recompute: Annotated[
        int,
        typer.Option(min=0, max=1_000_000, help="With --verify: number of images to run through the teacher again."),
    ] = 3,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the teacher, for --verify.")] = None,
) -> None:
    """Inspect stored targets: summary, pictures, gallery, full verification."""
    from samfeat.pipelines import inspect_cache as inspect

    check_outputs([out if (image, pair) != (None, None) else None, html], [cache])
    if verify:
        with progress_bar("verifying") as bar:
            problems = inspect.verify(cache, recompute=recompute, checkpoint=checkpoint, progress=bar)
        for problem in problems[:50]:
            complain("{problem}", problem=problem)
        if problems:
            raise ValueError(
                f"{len(problems)} problems found: to fix them, run the command that made the store with --repair: "
                f"{inspect.repair_command(cache)} (and the original options)"
            )
    stores = inspect.open_stores(cache)
    if image is not None:
        note(inspect.picture_of_image(stores, image, out))
    elif pair is not None:
        note(inspect.picture_of_pair(stores, pair, out))
    else:
        for store in stores:
            show_table(inspect.summary(store))
    if html is not None:
        with progress_bar("drawing the gallery") as bar:
            note(inspect.write_gallery(stores, html, images=gallery, progress=bar))
    if verify:
        say("[green]verified[/]: everything in order")


@app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Configuration changes, such as optimiser.batch_size=4 losses.wsc=0; see `samfeat-cli config`."
        ),
    ] = None,
    cache: Annotated[str, typer.Option(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/default"),
    preset: Annotated[str, typer.Option(help="default, paper, released, sample, or a .yaml file.")] = "default",
    resume: Annotated[str, typer.Option(help="auto resumes from the run's checkpoint, if there is one.")] = "never",
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Fine-tuning: initial weights, such as samfeat; the network must be the same.",
        ),
    ] = None,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Train on a single batch, to see the losses fall.")
    ] = False,
    devices: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Processes that split every batch, one per GPU. torchrun works as well."),
    ] = 1,
) -> None:
    """Stage two: train the student from cached targets. Ctrl-C saves; --resume auto resumes."""
    if resume not in ("never", "auto"):
        raise ValueError(f"--resume {resume}: choose never or auto")
    if "://" not in cache:
        must_exist(Path(cache))
    check_outputs([out], [cache])
    from samfeat.pipelines.config import load_config

    config = load_config(preset, [*(overrides or []), *([f"run.init={init}"] if init else [])])
    if devices > 1 and "RANK" not in os.environ:
        from samfeat.pipelines.training.processes import launch

        raise typer.Exit(launch(devices, sys.argv[1:]))
    from samfeat.pipelines.train import train as run

    _take_sigterm_back()
    with training_line() as line:
        summary = run(cache, out, config, resume=resume == "auto", overfit=overfit, progress=line)
    if not summary.last:
        return  # only rank 0 prints
    first, last = summary.first, summary.last
    say(
        "[bold]{folder}[/]: {steps} steps. {views}: MMA@3 {before:.3f} {start}, "
        "[bold]{trained:.3f}[/] trained ({matches:.0f} matches a pair)",
        folder=summary.folder,
        steps=summary.steps,
        views="Held-out views" if last["held_out"] else "Training images",
        before=first["mma@3"],
        start="of the initial weights (which may have seen these images)" if last["initialised"] else "untrained",
        trained=last["mma@3"],
        matches=last["matches"],
    )
    say("report: {page}", page=summary.folder / "report.html")


@app.command()
def ablate(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Tables, such as IV V warping (default: all), and key=value changes.")
    ] = None,
    cache: Annotated[str, typer.Option(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    data: Annotated[
        Path | None, typer.Option(help="Sequences to evaluate every student on, as for `evaluate`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, tables and plots.")] = Path("runs/ablations"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Training runs per row.")] = 3,
    preset: Annotated[str, typer.Option(help="Preset modified by the rows, as for `train`.")] = "sample",
    file: Annotated[Path | None, typer.Option(help="Your own tables, in the format of ablations.yaml.")] = None,
) -> None:
    """Train variations of the student and tabulate them next to the paper's. Run again to resume."""
    must_exist(*([] if "://" in cache else [Path(cache)]), *([data] if data else []), *([file] if file else []))
    check_outputs([out], [cache, data, file])
    _import_pycolmap()
    from samfeat.pipelines.ablation import ablate as run
    from samfeat.pipelines.training.ablation_tables import load_ablations

    with progress_bar("runs") as bar:
        summary = run(
            cache,
            out,
            names=[word for word in tables or [] if "=" not in word],
            ablations=load_ablations(file),
            data=data,
            seeds=seeds,
            preset=preset,
            overrides=[word for word in tables or [] if "=" in word],
            progress=bar,
        )
    say("[bold]{page}[/]: {runs} training runs, tables and plots", page=summary.report, runs=summary.runs)
    if summary.failures:
        raise ValueError(f"{len(summary.failures)} of {summary.runs} runs failed; the tables name them")


class FeatureFormat(StrEnum):
    """File format of extracted features."""

    hloc = "hloc"
    d2net = "d2net"


class Estimator(StrEnum):
    """Robust estimator that verifies matches."""

    magsac = "magsac"
    poselib = "poselib"


class Verification(StrEnum):
    """Geometric verification of matches."""

    none = "none"
    fundamental = "fundamental"
    homography = "homography"


MethodOption = Annotated[
    str,
    typer.Option(help="samfeat, or for comparison sift, orb (OpenCV), aliked, disk, xfeat (kornia, with --weights)."),
]

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        parser=_weights,
        metavar="NAME|FILE",
        help="Weights: a shipped student (samfeat, the default), a .safetensors file from `train`, or the authors' "
        ".pt; for other methods their own file.",
    ),
]
KeypointsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_KEYPOINTS, help="Maximum keypoints per image; the best are kept.")
]
MaxSizeOption = Annotated[
    int | None,
    typer.Option(
        min=16, max=100_000, help="Shrink larger images to this longer side; keypoints are in full-size pixels."
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(help="Ratio test on unit descriptors: keep matches closer than this fraction of the second best."),
]
LightGlueOption = Annotated[
    Path | None,
    typer.Option(help="Match with LightGlue: weights trained for these features (glue-factory's, or a state dict)."),
]


@app.command()
def extract(
    images: Annotated[Path, typer.Argument(help="A folder of images, or a text file with one path per line.")],
    output: Annotated[Path, typer.Argument(help="An .h5 file (hloc) or a folder (d2net).")],
    method: MethodOption = "samfeat",
    weights: WeightsOption = None,
    format_: Annotated[
        FeatureFormat, typer.Option("--format", help="hloc's HDF5, or D2-Net's npz.")
    ] = FeatureFormat.hloc,
    max_keypoints: KeypointsOption = None,
    max_size: MaxSizeOption = None,
    multiscale: Annotated[
        bool | None,
        typer.Option(
            "--multiscale/--single-scale", help="Extract at scales from 1 to 0.3; the default is in the weights file."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Images read ahead.")] = 2,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Extract features of many images. Run again to resume after an interruption."""
    must_exist(images, weights)
    check_outputs([output], [weights] if format_ == "d2net" else [images, weights])  # d2net files go next to the images
    _import_pycolmap()
    from samfeat.pipelines.extract import extract_folder
    from samfeat.pipelines.features.protocol import shrunk

    chosen = _method(method, weights, max_keypoints, device, multiscale=multiscale)
    if max_size is not None:
        chosen = shrunk(chosen, max_size)
    with progress_bar(f"{chosen.name} features", rate="images/s") as bar:
        made = extract_folder(
            images,
            output,
            method=chosen,
            format=format_.value,
            max_size=max_size,
            overwrite=overwrite,
            threads=threads,
            progress=bar,
        )
    say(
        "[bold]{output}[/]: wrote features of {written} images, {skipped} already existed",
        output=output,
        written=len(made.written),
        skipped=len(made.skipped),
    )
    if made.failed:
        for failed, reason in made.failed.items():
            complain("skipped {failed}: {reason}", failed=failed, reason=reason)
        raise ValueError(f"{len(made.failed)} images could not be used; features of all the others were written")


@app.command("match")
def match_command(
    image0: Annotated[Path, typer.Argument(help="First photograph.")],
    image1: Annotated[Path, typer.Argument(help="Second photograph.")],
    out: Annotated[Path, typer.Option(help="Picture of the matches (.png), or their coordinates (.npz, .csv).")] = Path(
        "matches.png"
    ),
    maps: Annotated[Path | None, typer.Option(help="Also draw the keypoints and, for samfeat, the dense maps.")] = None,
    method: MethodOption = "samfeat",
    weights: WeightsOption = None,
    verify: Annotated[Verification, typer.Option(help="Geometric verification.")] = Verification.fundamental,
    estimator: Annotated[Estimator, typer.Option(help="OpenCV's MAGSAC++, or poselib.")] = Estimator.magsac,
    ratio: RatioOption = None,
    lightglue: LightGlueOption = None,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Match two photographs, and draw the matches or write their coordinates."""
    must_exist(image0, image1, weights, lightglue)
    check_outputs([out, maps], [image0, image1, weights, lightglue])
    _import_pycolmap()
    from samfeat.pipelines.match import match_images
    from samfeat.student.lightglue import LightGlue

    chosen = _method(method, weights, max_keypoints, device)
    found = match_images(
        image0,
        image1,
        out,
        method=chosen,
        verify=verify.value,
        estimator=estimator.value,
        ratio=ratio,
        matcher=LightGlue.from_pretrained(lightglue) if lightglue else None,
        maps=maps,
    )
    say(
        "{keypoints0} and {keypoints1} keypoints, {matches} {kind}matches{kept} -> {out}{drawn}",
        kind="" if lightglue else "mutual ",
        keypoints0=found["keypoints0"],
        keypoints1=found["keypoints1"],
        matches=found["matches"],
        kept="" if found["inliers"] is None else f", {found['inliers']} of them agree with one {verify.value}",
        out=out,
        drawn=f" ({found['drawn']} drawn)" if found["picture"] and found["drawn"] < found["matches"] else "",
    )


@app.command()
def live(
    source: Annotated[str, typer.Argument(help="A camera's number, a video file, or a folder of frames.")],
    reference: Annotated[
        str,
        typer.Option(
            metavar="previous|first|FILE",
            help="Match frames with the previous one, with the first one, or with a photograph.",
        ),
    ] = "previous",
    record: Annotated[Path | None, typer.Option(help="Record the picture in an .mp4 file.")] = None,
    tracks: Annotated[
        Path | None, typer.Option(help="Write all matches that agree, with the number of their track, to a .csv file.")
    ] = None,
    window: Annotated[
        bool, typer.Option("--window/--no-window", help="Show the picture; q quits, r takes a reference, p drops it.")
    ] = True,
    method: MethodOption = "samfeat",
    weights: WeightsOption = None,
    verify: Annotated[Verification, typer.Option(help="Geometric verification.")] = Verification.fundamental,
    estimator: Annotated[Estimator, typer.Option(help="OpenCV's MAGSAC++, or poselib.")] = Estimator.magsac,
    ratio: RatioOption = None,
    max_keypoints: Annotated[
        int, typer.Option(min=1, max=MOST_KEYPOINTS, help="Maximum keypoints per frame; the best are kept.")
    ] = 1024,
    max_size: MaxSizeOption = None,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
) -> None:
    """Match the frames of a video as they come, and follow points. Ctrl-C ends it and keeps what was written."""
    must_exist(weights, None if reference in ("previous", "first") else Path(reference))
    check_outputs([record, tracks], [weights])
    _import_pycolmap()
    from samfeat.pipelines.features.protocol import shrunk
    from samfeat.pipelines.video import match_video

    chosen = _method(method, weights, max_keypoints, device)
    if max_size is not None:
        chosen = shrunk(chosen, max_size)
    with progress_bar(f"{chosen.name} on {source}", rate="frames/s") as bar:
        found = match_video(
            source,
            method=chosen,
            reference=reference,
            verify=verify.value,
            estimator=estimator.value,
            ratio=ratio,
            record=record,
            tracks=tracks,
            window=window,
            overwrite=overwrite,
            progress=bar,
        )
    say(
        "[bold]{source}[/]: {frames} frames at {speed:.1f} FPS, {matches:.0f} matches a frame, "
        "{tracks} tracks{outputs}",
        source=source,
        frames=found.frames,
        speed=found.frames / found.seconds,
        matches=found.matches,
        tracks=found.tracks,
        outputs="".join(f" -> {path}" for path in (record, tracks) if path),
    )
    if found.interrupted and found.total is not None:
        raise KeyboardInterrupt(
            f"{found.frames} of {found.total} frames are done, and what was written of them is kept"
        )


@app.command("app")
def app_command(
    cache: Annotated[
        str | None, typer.Option(help="A cache folder, or one store, for the second tab; may be a URL.")
    ] = None,
    weights: WeightsOption = None,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with the original weights of XFeat, ALIKED and DISK, to compare with.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. By default, only this machine reaches it; there is no password.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; by default the first free one from 7860. 0: any.")
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Serve a page to match two photographs and to walk through a teacher cache. Ctrl-C ends it."""
    must_exist(weights, peers)
    _import_pycolmap()
    from samfeat.pipelines.app import serve_page

    serve_page(
        weights=weights,
        peers=peers,
        cache=cache,
        device=device.value,
        host=host,
        port=port,
        ready=lambda address: say("[bold]{address}[/]: open it in a browser; Ctrl-C ends it", address=address),
    )


@app.command("match-pairs")
def match_pairs_command(
    features_file: Annotated[Path, typer.Argument(metavar="FEATURES", help="An .h5 file from `extract` or hloc.")],
    output: Annotated[Path, typer.Argument(help="An .h5 file (hloc's matches), or a .db file (COLMAP's database).")],
    pairs: Annotated[
        Path | None, typer.Option(help="Text file with two image names per line; default: all pairs of images.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, from which a database takes its cameras.")
    ] = None,
    ratio: RatioOption = None,
    cosine: Annotated[bool, typer.Option("--cosine", help="Match by cosine similarity.")] = False,
    lightglue: LightGlueOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Match many images, for hloc or COLMAP. Run again to resume after an interruption."""
    must_exist(features_file, pairs, images, lightglue)
    check_outputs([output], [features_file, pairs, images, lightglue])
    _import_pycolmap()
    from samfeat.pipelines.match import match_pairs, read_pairs

    names = None if pairs is None else read_pairs(pairs)
    with progress_bar("matches", rate="pairs/s") as bar:
        made = match_pairs(
            features_file,
            output,
            pairs=names,
            ratio=ratio,
            cosine=cosine or ratio is not None,
            lightglue=lightglue,
            images=images,
            overwrite=overwrite,
            progress=bar,
        )
    say(
        "[bold]{output}[/]: {matches} matches of {pairs} pairs of {images} images",
        output=output,
        matches=made.matches,
        pairs=made.pairs,
        images=made.images,
    )


@app.command()
def export(
    weights: Annotated[
        Path,
        typer.Argument(
            parser=_weights,
            metavar="WEIGHTS",
            help="samfeat (the shipped student), a .safetensors file from `train`, or the authors' .pt.",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="An .onnx, .pt (for the authors' code) or .safetensors file.")],
    max_keypoints: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_KEYPOINTS, help="Keypoints returned by an ONNX model, padded; default: as in the weights."
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Store a .safetensors file in 16 bits, at half the size.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise an ONNX model to 8 bits, for OpenVINO on a CPU; see --calibration.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="With --int8: folder of photographs, of which up to 32 set the ranges."),
    ] = None,
) -> None:
    """Export trained weights for other programs."""
    check_outputs([output], [weights])
    if weights.suffix == ".onnx":
        raise ValueError(f"{weights} is an exported model already: give the weights it was made from")
    if int8 != (calibration is not None) or (int8 and output.suffix != ".onnx"):
        raise ValueError("--int8 makes an .onnx file and needs --calibration FOLDER, a folder of photographs")
    import torch

    from samfeat.student.extractor import SAMFeat

    if output.suffix not in (".onnx", ".pt", ".safetensors"):
        raise ValueError(f"{output}: weights are written as .onnx, .pt or .safetensors; use one of these suffixes")
    if output.suffix == ".onnx":
        from samfeat.student.onnx import check_packages

        check_packages()
    extractor = SAMFeat.from_pretrained(weights, **({} if max_keypoints is None else {"max_keypoints": max_keypoints}))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        extractor.save(output, dtype=torch.float16 if half else None)
    elif output.suffix == ".pt":
        from samfeat.student.export import save_checkpoint

        save_checkpoint(output, extractor.network)
    else:
        _export_onnx(output, extractor, calibration)
    say("[bold]{output}[/]: {size:.1f} MB", output=output, size=output.stat().st_size / 1e6)


def _export_onnx(output: Path, extractor: Any, calibration: Path | None) -> None:
    import torch

    from samfeat.student.onnx import compare, export_onnx

    photographs = None if calibration is None else _calibration_photographs(calibration)
    say("tracing the extractor, which takes a minute")
    export_onnx(output, extractor, calibration=photographs)
    if photographs is not None:
        say("quantised with {count} photographs", count=len(photographs))
        return
    agreement = compare(output, extractor, torch.rand(3, 120, 170, generator=torch.Generator().manual_seed(0)))
    say(
        "onnxruntime agrees with torch on an image of noise: maps within {maps:.0e}, "
        "{found} of {keypoints} keypoints, their descriptors within {features:.0e}",
        maps=agreement.maps,
        found=agreement.found,
        keypoints=agreement.keypoints,
        features=agreement.features,
    )


def _calibration_photographs(folder: Path) -> list[Any]:
    """Up to 32 photographs of a folder, evenly spread over their names, at most 640 pixels long."""
    import cv2

    from samfeat.images import read_image
    from samfeat.pipelines.extract import list_images

    files = list(list_images(folder).values())
    photographs = []
    for path in files[:: -(-len(files) // 32)]:
        pixels = read_image(path)
        scale = min(1, 640 / max(pixels.shape))
        size = (max(16, round(pixels.shape[1] * scale)), max(16, round(pixels.shape[0] * scale)))
        photographs.append(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    return photographs


@app.command()
def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="hpatches (image sequences), reconstruct (photo collections), localize (posed scenes), "
            "pose (relative pose of pairs), edges (human boundaries), or your own module:Class."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder of sequences, photographs, posed scenes, pairs or human boundaries.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for features, tables and figures; default runs/<benchmark>.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="samfeat, sift, orb, aliked, disk, xfeat, or an .h5 of features in hloc's layout. "
            "For edges: samfeat, canny or a teacher."
        ),
    ] = "samfeat",
    weights: WeightsOption = None,
    max_keypoints: KeypointsOption = None,
    device: DeviceOption = Device.auto,
    name: Annotated[str | None, typer.Option(help="Name of the method in tables and figures.")] = None,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            help="Ratio test: none, or keep matches closer than this fraction of the second best; may be given twice. "
            "For pose, reconstruct and localize, which measure both none and 0.8 by default."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict again, even if the settings have changed.")
    ] = False,
) -> None:
    """Evaluate features or edges. Predicts once, then evaluates what is stored. Run again to resume."""
    must_exist(data, weights)
    out = out or Path("runs") / benchmark.rpartition(":")[2]
    check_outputs([out], [data], outside=True)
    _import_pycolmap()
    from samfeat.pipelines.evaluate import evaluate as run
    from samfeat.pipelines.evaluation import find_evaluation
    from samfeat.pipelines.evaluation.comparison_page import write_comparison_page

    evaluation = find_evaluation(benchmark, **({"ratios": _ratios(ratio)} if ratio else {}))
    chosen = evaluation.load_method(method, weights=weights, max_keypoints=max_keypoints, device=device.value)
    with progress_bar(f"{name or chosen.name} on {benchmark}") as bar:
        run(evaluation, data, out, method=chosen, name=name, overwrite=overwrite, progress=bar)
    show_table((out / "table.md").read_text())
    page = write_comparison_page(out / "report.html", [out])
    say("results and figures in [bold]{out}[/], side by side in [bold]{page}[/]", out=out, page=page)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders written by `evaluate`.")],
    out: Annotated[Path, typer.Option(help="Output page.")] = Path("report.html"),
) -> None:
    """Combine several evaluations, with all their methods, on one page."""
    from samfeat.pipelines.evaluation.comparison_page import write_comparison_page

    must_exist(*folders)
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page is HTML; choose a name that ends in .html")
    say("[bold]{page}[/]", page=write_comparison_page(out, folders))


benchmark = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(benchmark, name="benchmark")


@benchmark.command()
def speed(
    out: Annotated[Path, typer.Option(help="Output table, in Markdown.")] = Path("bench/speed.md"),
    weights: WeightsOption = None,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with the original weights of XFeat, ALIKED and DISK.")
    ] = None,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the photograph.")] = "480x640",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of torch and OpenCV.")] = 2,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Images per call of SAMFeat.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Timed rounds.")] = 7,
    max_keypoints: Annotated[
        int, typer.Option(min=1, max=MOST_KEYPOINTS, help="Keypoints per image, for every method.")
    ] = 2048,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure torch.compile as well.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Time the students that ship, in every precision the device is fast in, next to SIFT, ORB and other methods."""
    must_exist(weights, peers)
    check_outputs([out], [weights, peers])
    if out.suffix != ".md":
        raise ValueError(f"{out}: the table is Markdown; choose a name that ends in .md")
    _import_pycolmap()
    from samfeat.pipelines.features.protocol import choose_device
    from samfeat.pipelines.speed import benchmark_speed, other_methods, parse_size, table
    from samfeat.student.extractor import SAMFeat
    from samfeat.student.weights import SHIPPED

    pixels, where = parse_size(size), choose_device(device.value)
    models = {name: SAMFeat.from_pretrained(name, max_keypoints=max_keypoints) for name in SHIPPED}
    if weights:
        models[Path(weights).stem] = SAMFeat.from_pretrained(weights, max_keypoints=max_keypoints)
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
    show_table(table(found))
    say("[bold]{out}[/]", out=out)


def _ratios(given: list[str]) -> tuple[float | None, ...]:
    try:
        return tuple(None if ratio == "none" else float(ratio) for ratio in given)
    except ValueError:
        raise ValueError(f"--ratio takes none or a number such as 0.8, got {', '.join(given)}") from None


def _method(name: str, weights: Path | None, max_keypoints: int | None, device: Device, **options: Any) -> Any:
    from samfeat.pipelines.features.methods import load_method

    chosen = {key: value for key, value in options.items() if value is not None}
    return load_method(name, weights=weights, max_keypoints=max_keypoints, device=device.value, **chosen)


@app.command("config")
def config_command(
    preset: Annotated[str, typer.Argument(help="default, paper, released, sample, or a .yaml file.")] = "default",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Configuration changes, as for `train`; they are checked and shown.")
    ] = None,
) -> None:
    """List every key of the training configuration with its value, where that comes from, and its meaning."""
    from samfeat.pipelines.config_reference import reference

    show_table(reference(preset, overrides or []))


def _import_pycolmap() -> None:
    """Import pycolmap if the command needs it, and restore our SIGTERM handler."""
    import pycolmap  # noqa: F401

    _take_sigterm_back()


def _take_sigterm_back() -> None:
    """Restore our SIGTERM handler, which pycolmap's logging library replaces on import to print a C++ stack."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _store_path(cache: str, name: str | None, *, default: str) -> str:
    """The store ``name`` of a cache.

    Raises:
        ValueError: the cache is not a folder for stores, or the name is not a valid file name.
    """
    folder = cache.rstrip("/")
    if not folder:
        raise ValueError(f"--cache {cache!r}: give the folder that the store goes into, such as teacher_cache")
    if folder.endswith((".zarr", ".zarr.zip")):
        raise ValueError(f"--cache {cache} names a store: give its folder, and pass the store's name with --name")
    if name is not None and (not name.strip(". ") or "/" in name or "\\" in name or name.startswith(".")):
        raise ValueError(f"--name {name!r}: give a plain name without folders; --cache says where the store goes")
    return f"{folder}/{(name or default).removesuffix('.zarr')}.zarr"


def _interrupt_once() -> None:
    """Make the first SIGINT or SIGTERM raise KeyboardInterrupt, and ignore later ones so that saving can finish."""
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        if stopping:
            complain("already stopping: finished work is being saved")
            return
        stopping = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _quiet_libraries() -> None:
    """Hide library output other than the one-line error message.

    Hides tracebacks from threads and destructors (the error is also raised where the result is awaited) and warnings
    from other packages. Our own warnings are printed as one line.
    """
    logger = logging.getLogger("samfeat")

    def hidden(unhandled: Any) -> None:
        logger.debug("unhandled", exc_info=(unhandled.exc_type, unhandled.exc_value, unhandled.exc_traceback))

    threading.excepthook = hidden
    sys.unraisablehook = hidden
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module="samfeat")
    warnings.showwarning = lambda message, *where: complain("[yellow]warning: {message}[/]", message=message)


def main() -> None:
    """Entry point of the console script."""
    if not os.environ.get("SAMFEAT_TRACEBACK"):
        _quiet_libraries()
    _interrupt_once()
    try:
        app(prog_name="samfeat-cli")
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # a normal exit aborts the process while library threads are running


if __name__ == "__main__":
    main()
