"""A self-contained page of evaluations: tables, figures, and the pictures of all methods side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from samfeat.files import write_bytes
from samfeat.images import read_image
from samfeat.pipelines.pictures.draw import thumbnail
from samfeat.pipelines.pictures.pages import Picture, photograph, plot, render
from samfeat.pipelines.pictures.tables import Column, Table

PICTURE_SIDE = 1400  # pixels, the most of a picture's longer side


class _Group(NamedTuple):
    """One picture per method, all of the same kind."""

    name: str
    pictures: list[Picture]


class _Section(NamedTuple):
    """An evaluation, as passed to the template."""

    title: str
    folder: str
    meaning: str
    table: Table
    cells: list[list[str]]
    best: set[tuple[int, int]]
    plots: list[Picture]
    pictures: list[Picture]
    groups: list[_Group]


def write_comparison_page(path: str | Path, folders: Sequence[str | Path]) -> Path:
    """Write one page for the results in evaluation folders.

    Args:
        path: HTML file, written atomically.
        folders: evaluation folders, each with a ``table.json``, figures, and a folder for every method.

    Returns:
        the path.

    Raises:
        ValueError: no folder, or one that holds no evaluation.
    """
    if not folders:
        raise ValueError("a report needs at least one evaluation folder, got none")
    parts = [_part(Path(folder)) for folder in folders]
    title = f"Evaluation: {', '.join(part.title for part in parts)}"
    return write_bytes(path, render("comparison", title=title, parts=parts))


def _part(folder: Path) -> _Section:
    if not (folder / "table.json").is_file():
        raise ValueError(f"{folder} holds no table.json: give a folder that `samfeat-cli evaluate` has written")
    try:
        stored = json.loads((folder / "table.json").read_text())
        title, meaning = stored["title"], stored["meaning"]
        table = Table([Column(**column) for column in stored["columns"]], stored["rows"])
        cells, best = table.text(), table.best()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/table.json is damaged ({error!r}): run `samfeat-cli evaluate` again") from None
    plots = sorted(folder.glob("*.svg"))
    sheets = [png for png in sorted(folder.glob("*.png")) if not png.with_suffix(".svg").exists()]
    methods = sorted(results.parent for results in folder.glob("*/results.json"))
    names = sorted({png.relative_to(method).as_posix() for method in methods for png in _pictures(method)})
    what = f"{title} of {', '.join(method.name for method in methods)}"
    return _Section(
        title=title,
        folder=str(folder),
        meaning=meaning,
        table=table,
        cells=cells,
        best=best,
        plots=[plot(svg.stem, svg.read_bytes(), alt=f"Plot {svg.stem}: {what}") for svg in plots],
        pictures=[_picture(png, png.stem, f"{png.stem}: {what}") for png in sheets],
        groups=[
            _Group(
                name.removesuffix(".png"),
                [
                    _picture(method / name, method.name, f"{name.removesuffix('.png')} of {method.name}")
                    for method in methods
                    if (method / name).is_file()
                ],
            )
            for name in names
        ],
    )


def _pictures(method: Path) -> list[Path]:
    """Pictures of a method, without its predictions, which are images too when edges are evaluated."""
    return [png for png in method.rglob("*.png") if png.relative_to(method).parts[0] != "edges"]


def _picture(path: Path, title: str, alt: str) -> Picture:
    return photograph(title, thumbnail(read_image(path), PICTURE_SIDE), alt=alt)
