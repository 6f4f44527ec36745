"""All benchmarks on one page: every bar with its latest figure, hit or miss, the run before it, and all tables.

    python tests/benchmarks/write_page.py [--folder bench]

Writes ``report.md`` and the self-contained ``report.html``. Figures of other machines than that of the latest are left
out: they can't be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import markdown
from figures import BARS, Bar
from matplotlib.figure import Figure

from samfeat.files import write_bytes
from samfeat.pipelines.pictures.charts import svg
from samfeat.pipelines.pictures.pages import plot, render
from samfeat.pipelines.pictures.tables import markdown_table

HEADER = ("figure", "now", "bar", "", "run before", "change", "what it compares")


def measured(folder: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The latest machine, and its figures in the order of measurement."""
    lines = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
    latest = lines[-1]
    found: dict[str, list[float]] = {}
    for line in lines:
        if (line["processor"], line["flags"]) == (latest["processor"], latest["flags"]):
            for name, value in line["figures"].items():
                found.setdefault(name, []).append(value)
    return latest, found


def met(bar: Bar, value: float) -> bool:
    """Whether a figure reaches its bar."""
    return value >= bar.value if bar.best == "higher" else value <= bar.value


def rows(found: dict[str, list[float]]) -> Iterator[list[str]]:
    """A row for every bar."""
    for name, bar in BARS.items():
        values = found.get(name, [])
        shown = [f"{value:.3g} {bar.unit}".strip() for value in values]
        yield [
            name,
            shown[-1] if shown else "not measured",
            f"{'at least' if bar.best == 'higher' else 'at most'} {bar.value:g} {bar.unit}".strip(),
            ("hit" if met(bar, values[-1]) else "miss") if values else "",
            shown[-2] if len(shown) > 1 else "",
            f"{100 * (values[-1] / values[-2] - 1):+.0f} %" if len(values) > 1 and values[-2] else "",
            bar.meaning,
        ]


def trend(found: dict[str, list[float]]) -> Figure | None:
    """Figures over the runs, as multiples of their bars; above 1 is a hit."""
    lines = {name: values for name, values in found.items() if len(values) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(8, 0.45 * len(lines) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(lines.items()):
        bar = BARS[name]
        shares = [value / bar.value if bar.best == "higher" else bar.value / max(value, 1e-12) for value in values]
        axes.plot(shares, [place] * len(shares), color="#777777", linewidth=1)
        axes.scatter(shares[:-1], [place] * (len(shares) - 1), s=14, color="#777777")
        axes.scatter(shares[-1:], [place], s=40, color="#009e73" if shares[-1] >= 1 else "#d55e00")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="multiple of the bar: right of the line is a hit; large: the latest run")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    return figure


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    folder = parser.parse_args().folder
    if not (folder / "figures.jsonl").is_file():
        sys.exit(f"{folder} holds no figures.jsonl: run the benchmarks first, with `make bench`")
    latest, found = measured(folder)
    table = list(rows(found))
    versions = ", ".join(f"{name} {version}" for name, version in latest["versions"].items())
    about = (
        f"{latest['processor']} ({', '.join(latest['flags']) or 'no flags'}), {latest['threads']} threads; {versions}"
    )
    texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.md")) if path.stem != "report"}
    parts = [f"# Benchmarks\n\n{about}\n\n{markdown_table(HEADER, table)}"]
    parts += [f"## {name}\n\n{text}" for name, text in texts.items()]
    write_bytes(folder / "report.md", "\n".join(parts).encode())
    drawn = trend(found)
    page = render(
        "benchmarks",
        title="Benchmarks",
        about=about,
        header=HEADER,
        rows=table,
        trend=drawn and plot("Figures over the runs", svg(drawn), alt="Figures over the runs, as multiples of bars"),
        tables={name: markdown.markdown(text, extensions=["tables"]) for name, text in texts.items()},
    )
    print(write_bytes(folder / "report.html", page))


if __name__ == "__main__":
    main()
