"""One page of evaluations: tables, figures, and the methods' pictures side by side, in a single file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samfeat.pipelines.files import write_bytes
from samfeat.pipelines.pictures.draw import thumbnail
from samfeat.pipelines.pictures.page import figure, page, row, table, text
from samfeat.teacher_cache.images import read_image

FIGURE_SIDE, PICTURE_SIDE = 1200, 900  # pixels


def write_evaluation_report(path: str | Path, folders: Sequence[str | Path]) -> Path:
    """Writes a page of what evaluations left in their folders.

    Args:
        path: HTML file to write, whole or not at all.
        folders: evaluation folders, each with a ``table.md``, figures, and a folder for every method.

    Returns:
        the path.

    Raises:
        ValueError: no folder, or one that holds no evaluation.
    """
    if not folders:
        raise ValueError("a report needs at least one evaluation folder, got none")
    return write_bytes(path, page("Evaluation", "".join(_section(Path(folder)) for folder in folders)))


def _section(folder: Path) -> str:
    if not (folder / "table.md").is_file():
        raise ValueError(f"{folder} holds no table.md: give a folder that `samfeat-cli evaluate` has written")
    header, _, *rows = [_cells(line) for line in (folder / "table.md").read_text().splitlines()]
    figures = [_figure(png, png.stem, FIGURE_SIDE) for png in sorted(folder.glob("*.png"))]
    parts = [f"<h2>{text(folder.name)}</h2>", table(header, rows), row(*figures)]
    methods = sorted(results.parent for results in folder.glob("*/results.json"))
    names = {png.relative_to(method).as_posix() for method in methods for png in _pictures(method)}
    for name in sorted(names):
        shown = [_figure(method / name, method.name, PICTURE_SIDE) for method in methods if (method / name).is_file()]
        parts.append(f"<h3>{text(name.removesuffix('.png'))}</h3>{row(*shown)}")
    return "".join(parts)


def _pictures(method: Path) -> list[Path]:
    """A method's pictures, not its predictions, which are images as well where edges are evaluated."""
    return [png for png in method.rglob("*.png") if png.relative_to(method).parts[0] != "edges"]


def _figure(path: Path, title: str, side: int) -> str:
    return figure(title, thumbnail(read_image(path), side), wide=True)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
