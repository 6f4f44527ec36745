import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np

from samfeat.pipelines.pictures.page import figure, page, row, table


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


def test_pictures_are_inside_the_page():
    picture = np.full((40, 60, 3), (200, 30, 30), np.uint8)
    text = page("a <b>", row(figure("one & two", picture, wide=True), figure("", picture))).decode()
    assert "<h1>a &lt;b&gt;</h1>" in text
    assert "one &amp; two" in text
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
    assert len(sources) == text.count("<img") == 2
    for source in sources:
        decoded = cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert decoded.shape == picture.shape
        assert np.abs(decoded.astype(int) - picture).max() <= 4


def test_tables_keep_their_text():
    parser = Cells()
    parser.feed(table(("", "a"), [("<x>", 1), ("y & z", "</td>")]))
    assert parser.rows == [["", "a"], ["<x>", "1"], ["y & z", "</td>"]]
