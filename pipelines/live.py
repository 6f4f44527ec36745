"""What a terminal shows while something takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from samfeat.pipelines.train import Progress as TrainingProgress

console = Console(highlight=False)


@contextmanager
def progress_bar(title: str, *, bytes_: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an ETA, as a function of (done, total); it appears with the first call."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if bytes_ else MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=120,
    ) as progress:
        task: TaskID | None = None

        def update(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(title, total=total)
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def training_line() -> Iterator[Callable[[TrainingProgress], None]]:
    """A line of loss terms, images/s and validation for every logged step, over a bar with an ETA."""
    with progress_bar("training") as bar:

        def update(state: TrainingProgress) -> None:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in state.terms.items())
            accuracy = state.validation.get("mma@3", float("nan"))
            bar(state.step, state.steps)
            console.print(
                f"step {state.step:>6}  {terms}  [dim]{state.images_per_second:.1f} images/s  MMA@3 {accuracy:.3f}[/]"
            )

        yield update
