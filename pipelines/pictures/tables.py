"""Tables of results: as Markdown, and for pages with the best values marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Cell = str | float | None


class Column(NamedTuple):
    """A column of numbers, or of text if it has no format.

    Attributes:
        title: its head.
        meaning: a sentence for readers who do not know the benchmark.
        form: format of its numbers; empty for text.
        best: whether the largest or the smallest number is best; empty if neither.
    """

    title: str
    meaning: str = ""
    form: str = ""
    best: Literal["", "highest", "lowest"] = ""


class Table(NamedTuple):
    """Results of several methods.

    Attributes:
        columns: column heads; one is ``method``, and other text columns say what a row was measured on.
        rows: one cell per column; None for an unknown number.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> list[list[str]]:
        """The cells as printed."""
        return [
            [
                "-" if value is None else format(value, column.form) if column.form else str(value)
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the best printed numbers among methods measured on the same thing."""
        printed = self.text()
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(printed):
            key = (cell for cell, column in zip(row, self.columns) if not column.form and column.title != "method")
            groups.setdefault(tuple(key), []).append(number)
        found = set()
        for rows in groups.values():
            for place, column in enumerate(self.columns):
                known = [row for row in rows if column.best and self.rows[row][place] is not None]
                if len(known) > 1:
                    choose = max if column.best == "highest" else min
                    best = choose(float(printed[row][place]) for row in known)
                    found |= {(row, place) for row in known if float(printed[row][place]) == best}
        return found

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown_table([column.title for column in self.columns], self.text())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
