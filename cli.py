"""samfeat-cli: options and one call each. All that is heavy is imported inside the commands."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from samfeat.cli_features import features
from samfeat.cli_options import Device, DeviceOption, errors, must_exist
from samfeat.pipelines.live import console, progress_bar, training_line

USER_ERROR, INTERRUPTED = 2, 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


class OneLineErrors(TyperGroup):
    """Every mistake of the user is one line on stderr and exit code 2; Ctrl-C and SIGTERM are exit code 75.

    ``SAMFEAT_TRACEBACK=1`` shows the traceback instead, for reporting a bug.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that a queue preempts
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors.print("interrupted: what is finished is kept, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        except ConnectionError as error:
            errors.print(f"interrupted: {_one_line(error)}", markup=False, style="red")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get("SAMFEAT_TRACEBACK") or not _is_of_the_user(error):
                raise
            errors.print(f"error: {_one_line(error)}", markup=False, style="red")
            raise typer.Exit(USER_ERROR) from None
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Local features taught by the Segment Anything Model.\n\n"
    "The whole way on the embedded sample: [bold]sample[/], [bold]teacher-cache[/], [bold]inspect-cache[/], "
    "[bold]train[/], [bold]evaluate[/], [bold]match[/]. Every command has its own --help.",
)


class TeacherName(StrEnum):
    """Teachers of stage one."""

    classical = "classical"
    sam_vit_h = "sam_vit_h"
    sam_vit_l = "sam_vit_l"
    sam_vit_b = "sam_vit_b"


class Matching(StrEnum):
    """Which photographs are compared with which."""

    exhaustive = "exhaustive"
    sequential = "sequential"


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write it; made where absent.")] = Path("sample"),
    seed: Annotated[int, typer.Option(help="Seed of poses, light and noise.")] = 0,
) -> None:
    """Write the embedded sample: a small data set with exact geometry, in raw MegaDepth's own layout."""
    from samfeat.pipelines.sample import write_sample

    with progress_bar("rendering the sample") as bar:
        summary = write_sample(folder, seed=seed, progress=bar)
    console.print(
        f"[bold]{folder}[/]: {summary.images} images of {summary.scenes} scenes, "
        f"{len(summary.heldout)} held-out sequences"
    )


@app.command()
def prepare(
    photos: Annotated[Path, typer.Argument(help="A folder of photographs of the same things, from many places.")],
    out: Annotated[Path, typer.Argument(help="Folder of the reconstruction, for teacher-cache --data.")],
    matching: Annotated[
        Matching, typer.Option(help="Which photographs are compared: all, or neighbours in the order of their names.")
    ] = Matching.exhaustive,
    max_size: Annotated[
        int, typer.Option(min=200, help="Longer side of the images that are written, in pixels.")
    ] = 1600,
) -> None:
    """Reconstruct a folder of photographs with COLMAP, so that real pairs can be trained on. Run again to go on."""
    must_exist(photos)
    from samfeat.pipelines.prepare import prepare_photos

    with ExitStack() as bars:
        steps: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in steps:
                bars.close()
                steps[step] = bars.enter_context(progress_bar(step))
            steps[step](done, total)

        summary = prepare_photos(photos, out, matching=matching.value, max_size=max_size, progress=progress)
    console.print(
        f"[bold]{out}[/]: {summary.registered} of {summary.photos} photographs registered, "
        f"{summary.models} model{'s' * (summary.models > 1)}, {summary.points} points, "
        f"reprojection error {summary.error:.2f} px"
    )
    for name in summary.left_out:
        errors.print(f"left out {name}: it could not be registered", markup=False)


@app.command("teacher-cache")
def teacher_cache(
    data: Annotated[
        str, typer.Option(help="Raw MegaDepth, COLMAP's models, MTLDesc's released set, or any folder of photographs.")
    ],
    cache: Annotated[str, typer.Option(help="Folder for the store; other stores in it stay.")] = "teacher_cache",
    name: Annotated[str | None, typer.Option(help="Name of the store; by default <data>-<teacher>.")] = None,
    teacher: Annotated[
        TeacherName, typer.Option(help="classical needs no weights and no GPU.")
    ] = TeacherName.classical,
    checkpoint: Annotated[
        Path | None, typer.Option(help="SAM's checkpoint; downloaded from the official address where not given.")
    ] = None,
    crop_size: Annotated[int | None, typer.Option(min=64, help="Side of the crops in pixels; 400 by default.")] = None,
    pairs_per_scene: Annotated[
        int | None, typer.Option(min=1, help="Pairs of each MegaDepth scene or COLMAP model; 100 by default.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Base detector of the keypoint labels: sift, gftt, ... or a student's weights.")
    ] = None,
    device: DeviceOption = Device.auto,
    shard_images: Annotated[int, typer.Option(min=2, help="Images of a shard, the unit that is done or not.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of crops, pairs and label homographies.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Shards in flight in each process; by default one a processor, or 2.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes on this machine.")] = 0,
    devices: Annotated[str, typer.Option(help="GPUs of this machine, such as 0,1,2: one worker process each.")] = "",
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler, such as tcp://10.0.0.1:8786.")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="K/N: make the K-th of N parts; N such runs, anywhere, fill one store.")
    ] = "1/1",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check what is stored, and make damaged or skipped images again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few images and say what a run would take.")
    ] = False,
) -> None:
    """Stage one: run the teacher over images and store what it sees. Run again to go on after an interruption.

    DATA and CACHE may be URLs, such as s3://bucket/folder.
    """
    from samfeat.pipelines.build_cache import build_cache, parse_part
    from samfeat.pipelines.caching.cluster import Workers
    from samfeat.pipelines.caching.inputs import make_teacher, open_source
    from samfeat.pipelines.caching.plan import make_plan
    from samfeat.teacher_cache.keypoints import LabelConfig

    part = parse_part(shard)
    crew = Workers(threads, processes=workers, devices=tuple(filter(None, devices.split(","))), scheduler=scheduler)
    source = open_source(data, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)
    with progress_bar("fetching SAM's checkpoint", bytes_=True) as bar:
        made = make_teacher(
            teacher.value,
            checkpoint=checkpoint,
            downloads=Path("" if "://" in cache else cache) / "checkpoints",
            device=device.value,
            progress=bar,
        )
    folder = Path(data.rpartition("://")[2]).resolve().name
    path = f"{cache.rstrip('/')}/{name or f'{folder}-{teacher.value}'}.zarr"
    chosen = LabelConfig(detector=labels) if labels else LabelConfig()
    if dry_run:
        console.print(str(make_plan(path, source, made, labels=chosen, shard_images=shard_images)))
        return
    with progress_bar(f"{teacher.value} teacher", rate="images/s") as bar:
        summary = build_cache(
            path,
            source,
            made,
            labels=chosen,
            seed=seed,
            shard_images=shard_images,
            workers=crew,
            part=part,
            strict=strict,
            repair=repair,
            report=console.print,
            progress=bar,
        )
    console.print(f"[bold]{summary.path}[/]: {summary.images} images, {summary.written} of them written now")
    if summary.failures:
        for failed, reason in summary.failures:
            errors.print(f"skipped {failed}: {reason}", markup=False)
        raise ValueError(f"{len(summary.failures)} of {summary.images} images could not be used; all others are stored")


@app.command("inspect-cache")
def inspect_cache(
    cache: Annotated[str, typer.Argument(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    image: Annotated[str | None, typer.Option(help="Show one image: its name, or a part of it.")] = None,
    pair: Annotated[int | None, typer.Option(help="Show one pair, by number.")] = None,
    out: Annotated[Path, typer.Option(help="Picture that --image and --pair write.")] = Path("inspect.png"),
    html: Annotated[Path | None, typer.Option(help="Write a self-contained gallery.")] = None,
    gallery: Annotated[int, typer.Option(min=1, help="Images in the gallery, evenly from the store.")] = 24,
    verify: Annotated[bool, typer.Option("--verify", help="Check every stored value.")] = False,
    recompute: Annotated[int, typer.Option(min=0, help="With --verify: images to give to the teacher again.")] = 3,
    checkpoint: Annotated[Path | None, typer.Option(help="SAM's checkpoint, for --verify with a SAM teacher.")] = None,
) -> None:
    """Look at the stored targets: a summary, pictures, a gallery, a check of everything."""
    from samfeat.pipelines import inspect_cache as inspect

    stores = inspect.open_stores(cache)
    if image is not None:
        console.print(inspect.picture_of_image(stores, image, out))
    elif pair is not None:
        console.print(inspect.picture_of_pair(stores, pair, out))
    else:
        for store in stores:
            console.print(inspect.summary(store))
    if html is not None:
        with progress_bar("drawing the gallery") as bar:
            console.print(inspect.write_gallery(stores, html, images=gallery, progress=bar))
    if verify:
        with progress_bar("verifying") as bar:
            problems = inspect.verify(
                stores, recompute=recompute, checkpoint=checkpoint, report=console.print, progress=bar
            )
        if problems:
            for problem in problems[:50]:
                errors.print(problem, markup=False)
            raise ValueError(
                f"{len(problems)} problems found: the teacher-cache command that made it, with --repair, mends them"
            )
        console.print("[green]verified[/]: everything in order")


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Configuration changes, such as optimiser.batch_size=4 losses.wsc=0.")
    ] = None,
    cache: Annotated[str, typer.Option(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/default"),
    preset: Annotated[str, typer.Option(help="default, paper, released, sample, or a .yaml file.")] = "default",
    resume: Annotated[str, typer.Option(help="auto goes on from the run's checkpoint where there is one.")] = "never",
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Train on one batch only, to see the losses fall.")
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes that share every batch, with GPUs one each. torchrun works as well.")
    ] = 1,
) -> None:
    """Stage two: train the student from cached targets. Ctrl-C saves; --resume auto goes on."""
    if resume not in ("never", "auto"):
        raise ValueError(f"--resume {resume}: choose never or auto")
    if "://" not in cache:
        must_exist(Path(cache))
    from samfeat.pipelines.config import load_config
    from samfeat.pipelines.train import train as run

    config = load_config(preset, overrides or [])
    if devices > 1 and "RANK" not in os.environ:
        from samfeat.pipelines.training.processes import launch

        raise typer.Exit(launch(devices, sys.argv[1:], report=errors.print))
    with training_line() as line:
        summary = run(cache, out, config, resume=resume == "auto", overfit=overfit, report=console.print, progress=line)
    if not summary.last:
        return  # the first process of several tells it
    first, last = summary.first, summary.last
    console.print(
        f"[bold]{summary.folder}[/]: {summary.steps} steps. Held-out views: MMA@3 {first['mma@3']:.3f} untrained, "
        f"[bold]{last['mma@3']:.3f}[/] trained ({last['matches']:.0f} matches a pair)"
    )
    console.print(f"how it went: {summary.folder / 'report.html'}")


@app.command()
def ablate(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Tables, such as IV V warping (all by default), and key=value changes.")
    ] = None,
    cache: Annotated[str, typer.Option(help="The cache folder, or one store; may be a URL.")] = "teacher_cache",
    data: Annotated[Path | None, typer.Option(help="Sequences, as of `evaluate`, to measure every student on.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, tables and plots.")] = Path("runs/ablations"),
    seeds: Annotated[int, typer.Option(min=1, help="How often every row is trained.")] = 3,
    preset: Annotated[str, typer.Option(help="What the rows change; as for `train`.")] = "sample",
    file: Annotated[Path | None, typer.Option(help="Tables of your own, in the form of ablations.yaml.")] = None,
) -> None:
    """Train variations of the student and tabulate them beside the paper's. Run again to go on."""
    must_exist(*([] if "://" in cache else [Path(cache)]), *([data] if data else []), *([file] if file else []))
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
            report=console.print,
            progress=bar,
        )
    console.print(f"[bold]{summary.report}[/]: {summary.runs} training runs, tables and plots")
    if summary.failures:
        raise ValueError(f"{len(summary.failures)} of {summary.runs} runs failed; the tables name them")


def _is_of_the_user(error: Exception) -> bool:
    """Whether an error comes from what was asked for, not from a mistake of the program."""
    known = isinstance(error, (ValueError, OSError, ImportError))  # fsspec names the package that a URL needs
    return known or type(error).__module__.startswith("botocore.") or type(error).__name__ == "OutOfMemoryError"


def _one_line(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU has not enough free memory: choose a smaller teacher, or smaller images, or --device cpu"
    if isinstance(error, OSError) and error.errno is not None:
        import errno

        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return (
                f"{where}no space left on the disk: free some, then run the same command again; finished work is kept"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{where}no permission to write or read there: choose another folder, or change its permissions"
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split())


app.add_typer(features)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
