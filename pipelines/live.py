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
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from samfeat.pipelines.train import Progress as TrainingProgress

console = Console(highlight=False)


@contextmanager
def progress_bar(title: str, *, bytes_: bool = False, rate: str = "") -> Iterator[Callable[[float, int], None]]:
    """A progress bar with an ETA, as a function of (done, total); it appears with the first call.

    Parts of a unit count, such as 2.5 of 10 runs.

    Args:
        title: what is going on.
        bytes_: whether bytes are counted.
        rate: unit of the speed to show, such as ``images/s``; none by default.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if bytes_ else MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *([_Rate(rate)] if rate else []),
        console=console,
        speed_estimate_period=120,
    ) as progress:
        task: TaskID | None = None

        def update(done: float, total: int) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(title, total=total)
            progress.update(task, completed=done, total=total)

        yield update


class _Rate(ProgressColumn):
    """How many units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The speed of the last minutes, or of the whole task once it is finished."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {self.unit}" if speed else "")


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
