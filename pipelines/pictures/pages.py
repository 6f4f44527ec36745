"""Self-contained HTML pages from the templates in this folder; each is one file without external resources.

All values are escaped. Pages follow the reader's light or dark scheme and fit any window.
"""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from samfeat.pipelines.pictures.draw import jpeg


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        title: caption below it.
        source: its data, as a ``data:`` address.
        alt: alternative text.
        plot: whether it is a drawing on a transparent background, whose black lines turn white in dark mode.
    """

    title: str
    source: str
    alt: str
    plot: bool = False


def photograph(title: str, picture: np.ndarray, *, alt: str = "") -> Picture:
    """uint8 [H, W, 3] in RGB, embedded as JPEG; ``alt`` defaults to the title."""
    return Picture(title, f"data:image/jpeg;base64,{_base64(jpeg(picture))}", alt or title)


def plot(title: str, svg: bytes, *, alt: str) -> Picture:
    """A drawing on a transparent background; browsers do not run scripts inside an SVG used as an image."""
    return Picture(title, f"data:image/svg+xml;base64,{_base64(svg)}", alt, plot=True)


def render(template: str, **values: Any) -> bytes:
    """Render the page template of that name."""
    return _templates().get_template(f"{template}.html").render(**values).encode()


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
