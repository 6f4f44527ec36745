import base64
import re

import cv2
import numpy as np
import pytest
from test_page import Cells

from samfeat.pipelines.evaluate import write_results, write_table
from samfeat.pipelines.evaluation.report import write_evaluation_report
from samfeat.pipelines.pictures.draw import save_png

COLOURS = {"figure": (200, 0, 0), "aliked": (0, 200, 0), "samfeat": (0, 0, 200), "prediction": (9, 9, 9)}


def picture(path, colour, size=(60, 80)):
    save_png(path, np.full((*size, 3), COLOURS[colour], np.uint8))


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation of two methods, one of which has no picture of the second scene."""
    folder = tmp_path / "pose"
    write_table(folder / "table.md", ["method", "AUC@5"], [["aliked", "90.1"], ["samfeat", "50.0"]])
    picture(folder / "pose.png", "figure", size=(1000, 3000))
    for method in ("samfeat", "aliked"):
        write_results(folder / method, {"name": method, "dataset": {}})
        picture(folder / method / "matches.png", method)
        picture(folder / method / "edges" / "1.png", "prediction")
    picture(folder / "samfeat" / "scene" / "view.png", "samfeat")
    return folder


def images(page):
    sources = re.findall(r'<img[^>]*src="data:image/jpeg;base64,([^"]*)"[^>]*><figcaption>([^<]*)', page)
    return [
        (title, cv2.imdecode(np.frombuffer(base64.b64decode(source), np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
        for source, title in sources
    ]


def test_methods_stand_side_by_side(evaluation, tmp_path):
    page = write_evaluation_report(tmp_path / "report.html", [evaluation]).read_text()
    cells = Cells()
    cells.feed(page)
    assert cells.rows == [["method", "AUC@5"], ["aliked", "90.1"], ["samfeat", "50.0"]]
    shown = images(page)
    assert [title for title, _ in shown] == ["pose", "aliked", "samfeat", "samfeat"]
    for (_, image), colour in zip(shown, ("figure", "aliked", "samfeat", "samfeat"), strict=True):
        np.testing.assert_allclose(image, np.broadcast_to(COLOURS[colour], image.shape), atol=4)
    assert shown[0][1].shape == (400, 1200, 3)  # large pictures are made smaller
    assert re.findall("<h[23]>([^<]*)", page) == ["pose", "matches", "scene/view"]
    assert "http" not in page


def test_several_evaluations_share_a_page(evaluation, tmp_path):
    other = tmp_path / "hpatches"
    write_table(other / "table.md", ["method", "MMA@3"], [["samfeat", "47.6"]])
    page = write_evaluation_report(tmp_path / "report.html", [other, evaluation]).read_text()
    assert re.findall("<h2>([^<]*)", page) == ["hpatches", "pose"]


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no table\.md: give a folder that `samfeat-cli evaluate` has written"):
        write_evaluation_report(tmp_path / "report.html", [tmp_path])
    with pytest.raises(ValueError, match="at least one evaluation folder"):
        write_evaluation_report(tmp_path / "report.html", [])
    assert not (tmp_path / "report.html").exists()
