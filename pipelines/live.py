"""Console output: lines, tables, log messages, progress.

File names, library messages and user input are untrusted: they may contain rich markup, control characters or bytes
that are not text. :func:`say` and :func:`complain` take a template of ours and arbitrary values; nothing else prints.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Number
from string import Formatter
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
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from samfeat.pipelines.train import Progress as TrainingProgress

INTERVAL = 30.0  # seconds between progress lines if there is no terminal
UNWRAPPED = 10_000  # columns of a table that is not drawn on a terminal
PLACE = "\ue000"  # stands for a value in a template while its markup is parsed; of the private use area

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Update = Callable[[float, int | None], None]


def printable(value: object) -> str:
    """``value`` as text on one line: control characters and bytes that are not UTF-8 are written as escapes.

    User name and password of a URL are left out.
    """
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", str(value)).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(template: str, /, **values: object) -> None:
    """Print a line on stdout.

    Args:
        template: a format string; it may contain rich markup.
        **values: values of its fields, shown as they are. Numbers may have a format, as in ``{error:.2f}``.
    """
    _print(console, template, values)


def complain(template: str, /, **values: object) -> None:
    """Print a line on stderr, like :func:`say`."""
    _print(errors, template, values)


def note(message: object) -> None:
    """Print untrusted lines."""
    for line in str(message).splitlines():
        _print(console, "{line}", {"line": line})


def show_table(table: str | Table) -> None:
    """Print a Markdown or rich table: drawn on a terminal, otherwise on lines that never wrap."""
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(table) if isinstance(table, str) else table, soft_wrap=False)
    elif isinstance(table, str):
        console.print(Text(table.rstrip("\n")))
    else:
        console.print(table, soft_wrap=False, width=UNWRAPPED)


def _print(to: Console, template: str, values: dict[str, object]) -> None:
    """Parse the markup of the template only, then insert the values."""
    markup, fields = "", []
    for literal, name, spec, _ in Formatter().parse(template):
        markup += literal
        if name is not None:
            value = values[name]
            fields.append(printable(format(value if isinstance(value, Number) else str(value), spec or "")))
            markup += PLACE
    line = Text()
    parts = Text.from_markup(markup)
    for field, part in zip([*fields, None], parts.split(PLACE, include_separator=True, allow_blank=True)):
        if field is None:
            line.append_text(part)
        else:
            before, place = part.divide([len(part) - 1])
            line.append_text(before).append(field, place.spans[0].style if place.spans else None)
    to.print(line)


class _ConsoleHandler(logging.Handler):
    """Print log messages: INFO on stdout, above any progress bar; the rest on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            to = errors if record.levelno >= logging.WARNING else console
            to.print(Text(printable(self.format(record)), style="yellow" if to is errors else ""))
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Show the package's log messages from INFO up. Repeated calls have no effect."""
    logger = logging.getLogger("samfeat")
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO)


@contextmanager
def progress_bar(title: str, *, bytes_: bool = False, rate: str = "") -> Iterator[Update]:
    """Progress display as a callback with (done, total); it appears on the first call.

    On a terminal it is a bar with the time left; elsewhere a line every :data:`INTERVAL` seconds with the number done,
    the rate and the time left. Fractions of a unit are allowed, such as 2.5 of 10 runs. A total of None is unknown, and
    so is the time left.

    Args:
        title: what is being done.
        bytes_: whether bytes are counted.
        rate: unit of the speed, such as ``images/s``; on a terminal no speed is shown by default.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        with _progress_lines(title, bytes_, rate) as update:
            yield update
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
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

        def update(done: float, total: int | None) -> None:
            nonlocal task
            if task is None:
                task = progress.add_task(printable(title), total=total)
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def _progress_lines(title: str, bytes_: bool, rate: str) -> Iterator[Update]:
    ended = threading.Event()
    latest: tuple[float, int | None] | None = None
    first: tuple[float, float] | None = None  # (time, done): what an earlier run did says nothing about the speed

    def update(done: float, total: int | None) -> None:
        nonlocal latest, first
        latest = done, total
        first = first or (time.monotonic(), done)

    def beat() -> None:
        while not ended.wait(INTERVAL):
            if latest is not None and first is not None:
                note(progress_line(title, *latest, latest[0] - first[1], time.monotonic() - first[0], bytes_, rate))

    thread = threading.Thread(target=beat, name="samfeat-progress", daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()


def progress_line(
    title: str, done: float, total: int | None, gained: float, seconds: float, bytes_: bool = False, rate: str = ""
) -> str:
    """One line of progress, such as ``matches: 12/200, 3.2 pairs/s, 0:01:02 left``.

    Args:
        title: what is being done.
        done: how much of ``total`` is done.
        total: how much there is to do; None if unknown.
        gained: how much of it was done in the last ``seconds``.
        seconds: since when.
        bytes_: whether bytes are counted; they are shown as megabytes.
        rate: unit of the speed; ``/s`` by default.
    """
    unit = 1e6 if bytes_ else 1
    end = "" if total is None else f"/{total / unit:.1f}" if bytes_ else f"/{total}"
    counted = f"{done / unit:.1f}{end} MB" if bytes_ else f"{done:g}{end}"
    speed = gained / seconds if seconds > 0 else 0.0
    if speed <= 0:
        return f"{title}: {counted}"
    unit_of_speed = " MB/s" if bytes_ else f" {rate}" if rate else "/s"
    line = f"{title}: {counted}, {speed / unit:.3g}{unit_of_speed}"
    if total is None:
        return line
    left = round((total - done) / speed)
    return f"{line}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


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
    """A line of loss terms, images/s and validation for every logged step, over a bar with the time left."""
    with progress_bar("training", rate="steps/s") as bar:

        def update(state: TrainingProgress) -> None:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in state.terms.items())
            bar(state.step, state.steps)
            say(
                "step {step:>6}  {terms}  [dim]{speed:.1f} images/s  MMA@3 {accuracy:.3f}[/]",
                step=state.step,
                terms=terms,
                speed=state.images_per_second,
                accuracy=state.validation.get("mma@3", float("nan")),
            )

        yield update
