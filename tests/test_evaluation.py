"""The registry of evaluations, and the recipe for another one."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_evaluation import CountKeypoints, KeypointCount

from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation import EVALUATIONS, find_evaluation
from samfeat.pipelines.evaluation.comparison_page import write_comparison_page
from samfeat.pipelines.evaluation.protocol import Evaluation, read_results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photographs(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in "ab":
        cv2.imwrite(
            str(tmp_path / "data" / f"{name}.png"),
            np.kron(rng.integers(0, 255, (12, 12)), np.ones((9, 9))).astype(np.uint8),
        )
    return tmp_path / "data"


def test_every_evaluation_of_the_registry_is_one():
    for name in EVALUATIONS:
        evaluation = find_evaluation(name)
        assert isinstance(evaluation, Evaluation)
        assert evaluation.meaning
    assert find_evaluation("pose", ratios=(0.8,)).ratios == (0.8,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aachen", {}, "choose one of hpatches, pose"),
        ("nowhere:Class", {}, "No module named 'nowhere'"),
        ("toy_evaluation:Nothing", {}, "Nothing"),
        ("hpatches", {"ratios": (0.8,)}, "hpatches has no option ratios"),
        ("pose", {"ratios": (1.5,)}, r"in \(0, 1\]"),
        ("localize", {"ratios": (0.8, 0.8)}, "different"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_evaluation(name, **options)
    assert "\n" not in str(caught.value)


def test_an_evaluation_from_outside_is_named_by_its_module(photographs, tmp_path):
    evaluation = find_evaluation("toy_evaluation:CountKeypoints")
    out = tmp_path / "out"
    for name, most in (("few", 5), ("many", 20)):
        evaluate(evaluation, photographs, out, method=evaluation.load_method("sift", max_keypoints=most), name=name)
    assert (out / "table.md").read_text() == "| method | keypoints |\n| --- | --: |\n| few | 10 |\n| many | 40 |\n"
    assert read_results(out / "few" / "results.json", KeypointCount).keypoints == {"a.png": 5, "b.png": 5}
    assert ' best">40<' in write_comparison_page(tmp_path / "page.html", [out]).read_text()


def test_results_of_another_version_are_one_line(photographs, tmp_path):
    method = CountKeypoints().load_method("sift", max_keypoints=5)
    evaluate(CountKeypoints(), photographs, tmp_path / "out", method=method, name="old")
    path = tmp_path / "out" / "old" / "results.json"
    path.write_text(path.read_text().replace("keypoints", "points"))
    with pytest.raises(ValueError, match="another version") as caught:
        evaluate(CountKeypoints(), photographs, tmp_path / "out", method=method, name="new")
    assert "\n" not in str(caught.value)


def test_the_recipe_in_contributing_is_what_is_tested():
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## Add an evaluation", 1)[1].split("```python\n", 1)[1]
    code = recipe.split("```", 1)[0]
    tested = (ROOT / "tests" / "toy_evaluation.py").read_text()
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) > 10
    assert all(line in tested.splitlines() for line in lines)
