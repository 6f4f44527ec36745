import json
import re

import numpy as np
import pytest
from page_parts import Cells, jpegs, plots

from samfeat.pipelines.evaluation.comparison_page import write_comparison_page
from samfeat.pipelines.pictures.charts import LinePlot, line_chart, save_figure
from samfeat.pipelines.pictures.draw import save_png

COLOURS = {"aliked": (0, 200, 0), "samfeat": (0, 0, 200), "sheet": (200, 0, 0), "prediction": (9, 9, 9)}


def picture(path, colour, size=(60, 80)):
    save_png(path, np.full((*size, 3), COLOURS[colour], np.uint8))


def write_table(folder, rows):
    columns = [
        {"title": "method", "meaning": "", "form": "", "best": ""},
        {"title": "AUC@5", "meaning": "area, in %", "form": ".1f", "best": "highest"},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(
        json.dumps({"title": folder.name, "meaning": "Pairs of <photographs>.", "columns": columns, "rows": rows})
    )


@pytest.fixture
def evaluation(tmp_path):
    """An evaluation of two methods, one of which has no picture of the second scene."""
    folder = tmp_path / "pose"
    write_table(folder, [["aliked", 90.123], ["samfeat", 50.0]])
    save_figure(folder / "recall", line_chart(LinePlot("", {"a": [(0, 1.0), (1, 2.0)]})))
    picture(folder / "gallery.png", "sheet", size=(1000, 3000))
    for method in ("samfeat", "aliked"):
        (folder / method).mkdir()
        (folder / method / "results.json").write_text("{}")
        picture(folder / method / "matches.png", method)
        picture(folder / method / "edges" / "1.png", "prediction")
    picture(folder / "samfeat" / "scene" / "view.png", "samfeat")
    return folder


def test_methods_stand_side_by_side(evaluation, tmp_path):
    page = write_comparison_page(tmp_path / "report.html", [evaluation]).read_text()
    cells = Cells()
    cells.feed(page)
    assert cells.rows == [["method", "AUC@5"], ["aliked", "90.1"], ["samfeat", "50.0"]]
    assert re.findall(r'best">([^<]*)', page) == ["90.1"]
    assert "area, in %; the highest is best" in page
    assert "Pairs of &lt;photographs&gt;." in page
    shown = jpegs(page)
    for image, colour in zip(shown, ("sheet", "aliked", "samfeat", "samfeat"), strict=True):
        np.testing.assert_allclose(image, np.broadcast_to(COLOURS[colour], image.shape), atol=4)
    assert shown[0].shape == (467, 1400, 3)  # large pictures are made smaller
    assert plots(page) == {"recall": (evaluation / "recall.svg").read_text()}  # sharp, and not as PNG beside it
    assert re.findall("<h[123]>([^<]*)", page) == ["Evaluation: pose", "matches", "scene/view"]
    assert all(re.findall(r'<img[^>]* alt="([^"]*)"', page))
    assert "http" not in page


def test_several_evaluations_share_a_page(evaluation, tmp_path):
    write_table(tmp_path / "hpatches", [["samfeat", 47.6]])
    page = write_comparison_page(tmp_path / "report.html", [tmp_path / "hpatches", evaluation]).read_text()
    assert re.findall("<h[12]>([^<]*)", page) == ["Evaluation: hpatches, pose", "hpatches", "pose"]


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no table\.json: give a folder that `samfeat-cli evaluate` has written"
    ):
        write_comparison_page(tmp_path / "report.html", [tmp_path])
    with pytest.raises(ValueError, match="at least one evaluation folder"):
        write_comparison_page(tmp_path / "report.html", [])
    for damaged in ("", "[]", '{"columns": [{}], "rows": []}'):
        (tmp_path / "table.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged"):
            write_comparison_page(tmp_path / "report.html", [tmp_path])
    assert not (tmp_path / "report.html").exists()
