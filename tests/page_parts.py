"""Parts of an HTML page, read back for tests."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np


class Cells(HTMLParser):
    """Texts of the cells of all tables, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open = False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def jpegs(page: str) -> list[np.ndarray]:
    """The embedded photographs, uint8 [H, W, 3] in RGB, in order."""
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    return [cv2.imdecode(np.frombuffer(base64.b64decode(s), np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for s in sources]


def plots(page: str) -> dict[str, str]:
    """The SVG source of the embedded plots by the line below them."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)">\s*<figcaption>([^<]*)', page)
    return {title: base64.b64decode(source).decode() for source, title in found}
