"""Results of ablations: mean and spread over seeds next to the paper's numbers, as Markdown, JSON and plots.

Rows are compared seed by seed: the same seed means the same held-out images, the same data order and, for equal
networks, the same initial weights, so differences vary far less than the accuracies themselves.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samfeat.files import write_bytes, write_json
from samfeat.pipelines.pictures.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MMA = ("mma@1", "mma@3", "mma@5")
CHOSEN = "mma@3"  # as in the paper's tables
VALIDATION = "held-out views"


class Spread(NamedTuple):
    """Mean and sample standard deviation of ``number`` values; the deviation is None for a single one."""

    mean: float
    deviation: float | None
    number: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and spread of values; None of none."""
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def paired(values: Mapping[str, float], reference: Mapping[str, float]) -> list[float]:
    """Differences from the reference, of the keys (seeds) that both have."""
    return [value - reference[key] for key, value in values.items() if key in reference]


def write_report(folder: str | Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``<table>.json`` and ``<table>.png`` of some tables, and ``ablations.md`` of all tables in the folder.

    Args:
        folder: of the ablations.
        results: by table: ``title``, ``measure``, ``paper`` (what its numbers are), ``reference`` (a row),
            ``protocol``, and ``rows`` by name. A row has ``paper`` (its number, or None), ``failed`` (reasons), and
            either ``figures`` (accuracies in [0, 1], by what they were measured on, then by seed) and ``untrained``
            (before training, by seed, on held-out views), or ``seconds`` (of training steps, one list a round).

    Returns:
        path of ``ablations.md``.
    """
    folder = Path(folder)
    for name, table in results.items():
        write_json(folder / f"{name}.json", {**table, "summary": _summary(table)})
        write_bytes(folder / f"{name}.png", _plot(table))
    pages = [
        _page(path.stem, json.loads(path.read_text()))
        for path in sorted(folder.glob("*.json"), key=lambda path: (not path.stem.isupper(), path.stem))
    ]
    return write_bytes(folder / "ablations.md", "\n".join(["# Ablations\n", *pages]).encode())


# -- statistics --------------------------------------------------------------------------------------------------------


def _summary(table: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, deviation and count by row and column, in per cent, milliseconds or times; empty cells are left out."""
    columns = _time_columns(table) if table["measure"] == "step_time" else _accuracy_columns(table)
    return {
        row: {column: cell._asdict() for column, cells in columns.items() if (cell := cells[row])}
        for row in table["rows"]
    }


def _accuracy_columns(table: Mapping[str, Any]) -> dict[str, dict[str, Spread | None]]:
    rows = table["rows"]
    columns: dict[str, dict[str, Spread | None]] = {}
    for place in _places(table):
        for name in MMA:
            columns[f"{place}: {name.upper()}"] = {
                row: spread(list(_percent(values, place, name).values())) for row, values in rows.items()
            }
        reference = _percent(rows[table["reference"]], place, CHOSEN)
        columns[f"{place}: difference at 3"] = {
            row: spread(paired(_percent(values, place, CHOSEN), reference)) for row, values in rows.items()
        }
    return columns


def _time_columns(table: Mapping[str, Any]) -> dict[str, dict[str, Spread | None]]:
    rounds = {row: [1e3 * float(np.median(steps)) for steps in values["seconds"]] for row, values in _rows(table)}
    steps = {row: [1e3 * s for steps in values["seconds"] for s in steps] for row, values in _rows(table)}
    reference = rounds[table["reference"]]
    return {
        "median [ms/step]": {row: spread([float(np.median(s))] if s else []) for row, s in steps.items()},
        "fastest [ms/step]": {row: spread([min(s)] if s else []) for row, s in steps.items()},
        "times the reference": {
            row: spread([own / other for own, other in zip(values, reference)]) for row, values in rounds.items()
        },
    }


def _percent(row: Mapping[str, Any], place: str, name: str) -> dict[str, float]:
    return {seed: 100 * figures[name] for seed, figures in row["figures"].get(place, {}).items()}


def _untrained(table: Mapping[str, Any]) -> Spread | None:
    """MMA@3 in per cent of all rows' students before training, on held-out views."""
    return spread([100 * figures[CHOSEN] for _, row in _rows(table) for figures in row["untrained"].values()])


def _places(table: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(place for _, row in _rows(table) for place in row["figures"]))


def _rows(table: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return list(table["rows"].items())


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _page(name: str, table: Mapping[str, Any]) -> str:
    timed = table["measure"] == "step_time"
    columns = _time_columns(table) if timed else _accuracy_columns(table)
    header = [
        "row",
        *columns,
        *(["paper", "paper's " + ("ratio" if timed else "difference")] if table["paper"] else []),
    ]
    lines = []
    for label, row in _rows(table):
        cells = [_cell(cells[label], ratio=column.startswith("times")) for column, cells in columns.items()]
        if table["paper"]:
            cells += _paper_cells(row["paper"], table["rows"][table["reference"]]["paper"], ratio=timed)
        lines.append([label + (" (failed)" if row["failed"] else ""), *cells])
    notes = [_protocol(table), f"Compared with: {table['reference']}."]
    if not timed and (untrained := _untrained(table)):
        notes.append(f"Before training: {untrained} at 3 pixels on {VALIDATION}.")
    if table["paper"]:
        notes.append(f"Paper: {table['paper']}.")
    failed = dict.fromkeys(f"{label}: {reason}" for label, row in _rows(table) for reason in row["failed"])
    return "\n".join(
        [f"## {table['title']}\n", " ".join(notes) + "\n", markdown_table(header, lines), f"![{name}]({name}.png)\n"]
        + [f"Failed: {reason}\n" for reason in failed]
    )


def _cell(cell: Spread | None, *, ratio: bool) -> str:
    if cell is None:
        return "–"
    if ratio:
        return f"{cell.mean:.2f}" + ("" if cell.deviation is None else f" ± {cell.deviation:.2f}")
    return str(cell)


def _paper_cells(number: float | None, reference: float | None, *, ratio: bool) -> list[str]:
    if number is None or reference is None:
        return ["–" if number is None else f"{number:.1f}", "–"]
    return [f"{number:.1f}", f"{number / reference:.2f}" if ratio else f"{number - reference:+.1f}"]


def _protocol(table: Mapping[str, Any]) -> str:
    protocol = table["protocol"]
    length = f"{protocol['steps']} steps" if protocol["steps"] else f"{protocol['epochs']} epochs"
    stores = ", ".join(f"{s['name']} ({s['images']} images, {s['teacher']} teacher)" for s in protocol["stores"])
    changed = " ".join([f"preset `{protocol['preset']}`", *(f"`{change}`" for change in protocol["overrides"])])
    if table["measure"] == "step_time":
        counts = [len(steps) for _, row in _rows(table) for steps in row["seconds"]]
        return f"Batches of {protocol['batch_size']} pairs, {sum(counts)} steps timed in turns; {changed}; {stores}."
    seeds = max((len(f) for _, row in _rows(table) for f in row["figures"].values()), default=0)
    return (
        f"{length} of {protocol['batch_size']} pairs, {seeds} of {protocol['seeds']} seeds; {changed}; {stores}. "
        "Per cent, mean ± standard deviation over seeds; differences are taken seed by seed."
    )


# -- plots -------------------------------------------------------------------------------------------------------------


def _plot(table: Mapping[str, Any]) -> bytes:
    """Rows from top to bottom; one panel per measurement, and one for the paper's numbers."""
    from matplotlib.figure import Figure

    labels = list(table["rows"])
    timed = table["measure"] == "step_time"
    panels = ["step"] if timed else _places(table)
    count = len(panels) + bool(table["paper"])
    figure = Figure(figsize=(2.4 + 3.2 * max(count, 1), 1.5 + 0.42 * len(labels)), layout="constrained")
    axes = figure.subplots(1, max(count, 1), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        if timed:
            _draw_times(axis, table)
        else:
            _draw_seeds(axis, table, panel)
    if table["paper"]:
        numbers = [np.nan if row["paper"] is None else row["paper"] for _, row in _rows(table)]
        axes[-1].plot(numbers, range(len(labels)), "D", color="0.35", markersize=6)
        axes[-1].set(title="paper", xlabel=table["paper"])
        if timed:
            axes[-1].set_xlim(left=0)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
    axes[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    figure.suptitle(table["title"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _draw_seeds(axis: Axes, table: Mapping[str, Any], place: str) -> None:
    """Every seed as a thin line from row to row, with means and spreads over it."""
    seeds = sorted({seed for _, row in _rows(table) for seed in row["figures"].get(place, {})}, key=int)
    for seed in seeds:
        points = [(_percent(row, place, CHOSEN).get(seed, np.nan), k) for k, (_, row) in enumerate(_rows(table))]
        axis.plot(*zip(*points), "-o", color="C0", alpha=0.35, linewidth=0.8, markersize=3)
    for k, (_, row) in enumerate(_rows(table)):
        if cell := spread(list(_percent(row, place, CHOSEN).values())):
            axis.errorbar(cell.mean, k, xerr=cell.deviation, fmt="o", color="C0", markersize=7, capsize=3)
    untrained = _untrained(table) if place == VALIDATION else None
    if untrained:
        axis.axvline(untrained.mean, color="0.5", linestyle=":", label="untrained")
        axis.legend(frameon=False, fontsize="small")
    axis.set(title=place, xlabel="MMA@3 [%]")


def _draw_times(axis: Axes, table: Mapping[str, Any]) -> None:
    """All steps as points, and their medians."""
    for k, (_, row) in enumerate(_rows(table)):
        steps = [1e3 * s for steps in row["seconds"] for s in steps]
        if steps:
            axis.plot(steps, [k] * len(steps), "|", color="C0", alpha=0.5)
            axis.plot(np.median(steps), k, "o", color="C0", markersize=7)
    axis.set(title="measured", xlabel="training step [ms]", xlim=(0, None))
