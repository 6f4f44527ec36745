import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree

from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.edge_detectors import EdgeDetector, load_detector
from samfeat.pipelines.evaluation.edges import (
    EdgeResults,
    Edges,
    Score,
    count,
    find_photographs,
    read_boundaries,
    summarise,
)
from samfeat.pipelines.evaluation.protocol import read_results

SIZE = (60, 80)  # a diagonal of 100 pixels
REACH = 0.03  # of it: 3 pixels


def lines(*columns: int, rows: slice = np.s_[5:55]) -> np.ndarray:
    """Vertical lines of one pixel."""
    drawn = np.zeros(SIZE)
    drawn[rows, list(columns)] = 1
    return drawn


def f_of(strength: np.ndarray, *boundaries: np.ndarray) -> dict:
    return summarise([count(strength, boundaries, tolerance=REACH)])


def test_the_truth_against_itself_is_perfect():
    truth = lines(20, 60)
    score = f_of(truth, truth)
    assert (score.ods.f, score.ois.f) == (1, 1)
    assert score.ods.precision == score.ods.recall == 1


@pytest.mark.parametrize(("shift", "expected"), [(1, 1.0), (3, 1.0), (4, 0.0)])
def test_a_shift_counts_until_it_exceeds_the_tolerance(shift, expected):
    assert f_of(lines(20 + shift), lines(20)).ods.f == pytest.approx(expected)


def test_assignments_are_one_to_one():
    double = np.maximum(lines(19), lines(21))
    score = f_of(double, lines(20)).ods
    assert (score.precision, score.recall) == (0.5, 1.0)
    score = f_of(lines(20), double).ods
    assert (score.precision, score.recall) == (1.0, 0.5)


def test_precision_needs_one_person_recall_all_of_them():
    """Two people, one line each: a map of both lines is right everywhere, and found by each."""
    score = f_of(lines(20, 60), lines(20), lines(60)).ods
    assert (score.precision, score.recall) == (1.0, 1.0)
    score = f_of(lines(20), lines(20), lines(20, 60)).ods
    assert (score.precision, score.recall) == (1.0, pytest.approx(2 / 3))


def test_threshold_sweep_in_closed_form():
    """A right line at strength 0.8 and a wrong one at 0.4: precision 1/2 up to 0.4, then 1."""
    strength = 0.8 * lines(20) + 0.4 * lines(60)
    score = f_of(strength, lines(20))
    precision, recall = (np.array(getattr(score.curve, key)) for key in ("precision", "recall"))
    assert precision.tolist() == [0.5] * 40 + [1.0] * 40 + [0.0] * 19
    assert recall.tolist() == [1.0] * 80 + [0.0] * 19
    assert (score.threshold, score.ods) == (0.41, Score(precision=1.0, recall=1.0, f=1.0))


def test_ois_chooses_a_threshold_for_each_image_and_ods_one_for_all():
    """In one image the truth lies at 0.8 over noise at 0.6, in the other at 0.4 over noise at 0.2."""
    truth, noise = lines(20), lines(60)
    images = [count(a * truth + b * noise, [truth], tolerance=REACH) for a, b in ((0.8, 0.6), (0.4, 0.2))]
    score = summarise(images)
    assert score.ois.f == 1
    # up to 0.4 all 100 true pixels are found among 150 above 0.2; beyond 0.6 half of them, without noise
    assert score.threshold == 0.21
    assert score.ods == Score(precision=pytest.approx(2 / 3), recall=1.0, f=pytest.approx(0.8))


def test_average_precision_is_the_area_under_the_curve():
    """Recall 1/2 at precision 1, recall 1 at precision 1/2: linear in between, nothing where no threshold reaches."""
    truth = np.maximum(lines(20, rows=np.s_[5:30]), lines(60, rows=np.s_[5:30]))
    strength = 0.8 * lines(20, rows=np.s_[5:30]) + 0.4 * lines(60, 40, 70, rows=np.s_[5:30])
    score = f_of(strength, truth)
    at = np.linspace(0, 1, 101)
    by_hand = np.where(at <= 0.5, at / 0.5, 1 - (at - 0.5))  # from (0, 0), where no pixel is left, over (1/2, 1)
    assert score.ap == pytest.approx(by_hand.sum() / 100)


def test_one_assignment_is_the_largest_at_every_threshold():
    rng = np.random.default_rng(0)
    strength = np.where(rng.random(SIZE) < 0.15, rng.integers(1, 100, SIZE) / 100, 0)
    truth = rng.random(SIZE) < 0.08
    found = count(strength, [truth], tolerance=REACH).found
    for level in (1, 20, 50, 80, 99):
        pixels, drawn = np.argwhere(strength >= level / 100 - 1e-9), np.argwhere(truth)
        near = cKDTree(pixels).sparse_distance_matrix(cKDTree(drawn), REACH * 100, output_type="ndarray")
        graph = coo_array((np.ones(len(near)), (near["i"], near["j"])), shape=(len(pixels), len(drawn))).tocsr()
        assert found[level - 1] == np.count_nonzero(maximum_bipartite_matching(graph) >= 0)


def test_nothing_found_and_nothing_drawn_are_normal():
    assert f_of(np.zeros(SIZE), lines(20)).ods.f == 0
    assert f_of(lines(20), np.zeros(SIZE)).ods.f == 0
    with pytest.raises(ValueError, match="size of the edge map"):
        count(np.zeros(SIZE), [np.zeros((5, 5))])
    with pytest.raises(ValueError, match="at least one image"):
        summarise([])


def test_canny_strength_is_the_highest_threshold_of_an_edge():
    image = np.full((40, 60, 3), 60, np.uint8)
    image[:, 30:] = 160
    strength = load_detector("canny").detect(image)
    assert set(np.flatnonzero(strength.any(axis=0))) <= {28, 29, 30, 31}
    level = float(strength.max())
    grey = cv2.GaussianBlur(image[..., 0], (0, 0), 2.0)
    assert cv2.Canny(grey, 0.4 * level * 400, level * 400, L2gradient=True).any()
    above = level + 0.01
    assert not cv2.Canny(grey, 0.4 * above * 400, above * 400, L2gradient=True).any()


def write_data(folder: Path, images: dict[str, list[np.ndarray]]) -> None:
    """BSDS500's layout, in which a photograph is bright where the first person drew."""
    (folder / "images").mkdir(parents=True)
    (folder / "groundTruth").mkdir()
    for name, people in images.items():
        grey = (255 * people[0]).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{name}.png"), np.repeat(grey[..., None], 3, 2))
        cell = np.empty((1, len(people)), object)
        for i, drawn in enumerate(people):
            cell[0, i] = {"Segmentation": np.ones(SIZE, np.uint16), "Boundaries": drawn.astype(np.uint8)}
        savemat(folder / "groundTruth" / f"{name}.mat", {"groundTruth": cell})


def brightness(name: str = "bright", **config) -> tuple[EdgeDetector, list[int]]:
    """Edges where an image is bright, and a list that grows with every image."""
    calls: list[int] = []

    def detect(image: np.ndarray) -> np.ndarray:
        calls.append(1)
        return image[..., 0].astype(np.float32) / 255

    return EdgeDetector(name, {"method": name, **config}, detect, thinned=True), calls


def test_evaluation_predicts_once_and_writes_table_figure_and_gallery(tmp_path):
    write_data(tmp_path / "data", {"a": [lines(20), lines(20, 60)], "b": [lines(30)]})
    detector, calls = brightness(version=1)
    seen = []
    results = evaluate(
        Edges(), tmp_path / "data", tmp_path / "out", method=detector, progress=lambda *state: seen.append(state)
    )
    assert (len(calls), seen) == (2, [(1, 2), (2, 2)])
    assert results.summary.ods.precision == 1
    assert results.summary.ods.recall == pytest.approx((50 + 50 + 50) / (50 + 100 + 50))
    assert results.images == {"a": pytest.approx(0.8), "b": 1}
    assert read_results(tmp_path / "out" / "bright" / "results.json", EdgeResults) == results
    assert "| bright | 0.857 | 0.857 |" in (tmp_path / "out" / "table.md").read_text()
    stored = np.asarray(Image.open(tmp_path / "out" / "bright" / "edges" / "a.png"))
    assert stored.tolist() == (255 * lines(20)).tolist()
    for picture in ("edges.png", "gallery.png"):
        assert Image.open(tmp_path / "out" / picture).width > 200

    assert evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=detector) == results
    assert len(calls) == 2
    other, calls = brightness(version=2)
    with pytest.raises(ValueError, match="version 1 there, 2 here"):
        evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=other)
    evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=other, overwrite=True)
    assert len(calls) == 2
    cv2.imwrite(str(tmp_path / "data" / "images" / "b.png"), np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b\.png has changed"):
        evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=other)
    write_data(tmp_path / "others", {"c": [lines(20)]})
    with pytest.raises(ValueError, match=r"other data \(bright\)"):
        evaluate(Edges(), tmp_path / "others", tmp_path / "out", method=other, name="more")


def test_an_interrupted_run_goes_on(tmp_path):
    write_data(tmp_path / "data", {"a": [lines(20)], "b": [lines(30)]})
    detector, calls = brightness()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=detector, progress=stop)
    assert evaluate(Edges(), tmp_path / "data", tmp_path / "out", method=detector).summary.ods.f == 1
    assert len(calls) == 2


def test_the_learned_map_has_the_size_of_the_image(tmp_path):
    from samfeat.student.extractor import SAMFeat

    SAMFeat("default").save(tmp_path / "a.safetensors")
    detector = load_detector("samfeat", weights=tmp_path / "a.safetensors", device="cpu")
    strength = detector.detect(np.random.default_rng(0).integers(0, 255, (50, 71, 3), np.uint8))
    assert strength.shape == (50, 71)
    assert 0 <= strength.min() <= strength.max() <= 1


def test_the_classical_teacher_is_a_detector():
    image = np.full((60, 80, 3), 60, np.uint8)
    image[:, 40:] = (200, 60, 60)
    strength = load_detector("classical").detect(image)
    assert abs(int(strength.sum(axis=0).argmax()) - 40) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sobel"}, "canny"),
        ({"name": "canny", "weights": "a.safetensors"}, "no weights"),
    ],
)
def test_bad_detectors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_detector(**arguments)


def test_bad_data_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_photographs(tmp_path / "absent")
    with pytest.raises(ValueError, match="no groundTruth"):
        find_photographs(tmp_path)
    write_data(tmp_path / "data", {"a": [lines(20)]})
    (tmp_path / "data" / "images" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks a"):
        find_photographs(tmp_path / "data")
    savemat(tmp_path / "other.mat", {"x": 1})
    (tmp_path / "text.mat").write_text("no MATLAB file, whatever its name says")
    for name in ("other.mat", "text.mat"):
        with pytest.raises(ValueError, match="not a ground-truth file") as caught:
            read_boundaries(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.real
def test_people_agree_with_each_other_on_real_photographs():
    """The first person against the others is near the agreement of people that the benchmark reports, F = 0.8."""
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "edges/bsds500_val50"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}: set SAMFEAT_DATA to the folder that holds edges/bsds500_val50")
    counts = []
    for _, truth in list(find_photographs(root).values())[:10]:
        first, *others = read_boundaries(truth)
        counts.append(count(first.astype(float), others))
    assert 0.65 < summarise(counts).ods.f < 0.95
