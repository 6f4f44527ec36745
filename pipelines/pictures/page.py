"""Pages for a browser: one HTML file each, with every picture inside, without a script and without an address."""

from __future__ import annotations

import base64
import html as markup
from collections.abc import Sequence

import numpy as np

from samfeat.pipelines.pictures.draw import jpeg


def page(title: str, body: str) -> bytes:
    """A whole page.

    Args:
        title: plain text.
        body: markup, such as the functions below give.
    """
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en">{head}\n<style>{STYLE}</style>\n<h1>{text(title)}</h1>\n{body}\n</html>\n'
    ).encode()


def text(plain: object) -> str:
    """Plain text as markup."""
    return markup.escape(str(plain))


def row(*figures: str) -> str:
    """Figures side by side, in as many lines as the window needs."""
    return f'<div class="row">{"".join(figures)}</div>\n'


def figure(title: str, picture: np.ndarray, *, wide: bool = False) -> str:
    """A picture, uint8 [H, W, 3] in RGB, with a line below it; embedded as JPEG."""
    source = base64.b64encode(jpeg(picture)).decode()
    kind = ' class="wide"' if wide else ""
    image = f'<img alt="" src="data:image/jpeg;base64,{source}">'
    return f"<figure{kind}>{image}<figcaption>{text(title)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of plain text; the first column is the head of its row."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>\n"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>\n"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem; padding: 0 1rem; color: #1b1b1b; }
h2 { margin-top: 2.5rem; } h3 { font: 600 13px ui-monospace, monospace; margin: 1.6rem 0 .3rem; }
p { color: #555; font-size: 13px; } .row { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 10px; }
figure { margin: 0; } figure img { display: block; width: 250px; border-radius: 3px; }
figure.wide img { width: 640px; } figcaption { font-size: 12px; color: #555; margin-top: 3px; }
.scale { display: inline-block; width: 90px; height: 9px; }
table { border-collapse: collapse; font-size: 12px; } thead { color: #555; }
th, td { text-align: left; vertical-align: top; padding: 2px 14px 2px 0; font-weight: 400; overflow-wrap: anywhere; }
tbody th { font-family: ui-monospace, monospace; } tbody tr { border-top: 1px solid #e6e6e6; }
figure.chart { width: 440px; } .chart svg { display: block; } .chart b { color: #1b1b1b; }
.column path { pointer-events: all; } .column:hover .values { visibility: visible; }
.values text { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round; }
"""
