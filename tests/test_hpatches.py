import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.hpatches import (
    TOO_LARGE,
    FeatureCounts,
    HPatches,
    HPatchesResults,
    find_sequences,
)
from samfeat.pipelines.evaluation.protocol import read_results
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.features.protocol import Method

SHIFT = np.array([[1.0, 0, 20], [0, 1, -10], [0, 0, 1]])


def write_sequence(folder: Path, images: list[int], *, suffix: str = ".png", homography: np.ndarray = SHIFT) -> None:
    """Images of one grey value each, which tells :func:`lookup` its features."""
    folder.mkdir(parents=True)
    for number, value in enumerate(images, start=1):
        cv2.imwrite(str(folder / f"{number}{suffix}"), np.full((20, 30, 3), value, np.uint8))
        if number > 1:
            np.savetxt(folder / f"H_1_{number}", homography)


def lookup(features: dict[int, Features], name: str = "lookup", **config) -> tuple[Method, list[int]]:
    """A method that knows the features of an image by its grey value, and the list of images it was asked for."""
    asked: list[int] = []

    def extract(image: np.ndarray) -> Features:
        asked.append(int(image[0, 0, 0]))
        return features[asked[-1]]

    return Method(name, {"method": name, **config}, extract), asked


def features_at(points: list[tuple[float, float]]) -> Features:
    """Features that match those of equal rank, and nothing else."""
    points = np.array(points, np.float32).reshape(-1, 2)
    return {
        "keypoints": points,
        "scores": np.ones(len(points), np.float32),
        "descriptors": np.eye(8, dtype=np.float32)[: len(points)],
        "image_size": np.array([30, 20]),
    }


REFERENCE = [(0.0, 0.0), (10.0, 5.0), (20.0, 8.0), (25.0, 15.0)]
FEATURES = {
    0: features_at([]),
    10: features_at(REFERENCE),
    # 0, 1, 3.5 and 50 pixels from where SHIFT puts the reference's
    20: features_at([(20, -10), (31, -5), (43.5, -2), (45, 55)]),
    30: features_at([(20, -10), (30, -5)]),  # two exact matches
}
CURVE_20 = [0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75]


def test_the_protocol_in_closed_form(tmp_path):
    write_sequence(tmp_path / "data" / "i_light", [10, 20, 0], suffix=".ppm")
    write_sequence(tmp_path / "data" / "v_wall", [10, 30], suffix=".jpg")
    for name in ("i_dc", "v_talent"):
        write_sequence(tmp_path / "data" / name, [10, 30])
    (tmp_path / "data" / "notes").mkdir()
    method, asked = lookup(FEATURES)
    results = evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=method)
    assert asked == [10, 20, 0, 10, 30]

    curve = np.array(CURVE_20)
    assert results.mma["illumination"] == pytest.approx(curve / 2)  # the pair without matches counts as 0
    assert results.mma["viewpoint"] == pytest.approx(np.ones(10))
    assert results.mma["all"] == pytest.approx((curve + 0 + 1) / 3)  # over pairs, not over subsets
    assert results.auc5["illumination"] == pytest.approx((0.5 * 3 + 0.75 * 2) / 5 / 2)
    assert results.auc5["viewpoint"] == pytest.approx(1)
    assert results.matches == {"all": 2.0, "illumination": 2.0, "viewpoint": 2.0}
    assert results.features == FeatureCounts(mean=(4 + 4 + 0 + 4 + 2) / 5, min=0, max=4)
    assert [(p.sequence, p.image, p.matches) for p in results.pairs] == [
        ("i_light", 2, 4),
        ("i_light", 3, 0),
        ("v_wall", 2, 2),
    ]
    assert read_results(tmp_path / "out" / "lookup" / "results.json", HPatchesResults) == results
    for name in ("matches.png", "keypoints.png"):
        assert Image.open(tmp_path / "out" / "lookup" / name).height >= 3 * 320  # three pairs
    assert (
        "| lookup | all | 50.0 | 50.0 | 58.3 | 58.3 | 53.3 | 0.0 | 0.0 | 0.0 | 3 | 2 |"
        in (tmp_path / "out" / "table.md").read_text()
    )


def test_homographies_are_estimated_from_the_matches(tmp_path):
    """Exact matches give the true homography; with all of them 2 pixels to the right, every corner is 2 pixels off."""
    grid = [(x, y) for x in (3.0, 14.0, 27.0) for y in (2.0, 17.0)]
    moved = [(x + 20, y - 10) for x, y in grid]
    found = {10: features_at(grid), 20: features_at(moved), 30: features_at([(x + 2, y) for x, y in moved])}
    write_sequence(tmp_path / "data" / "wall", [10, 20, 30])
    results = evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=lookup(found)[0])
    assert [p.corner_error for p in results.pairs] == pytest.approx([0, 2], abs=1e-3)
    # recall: 1/2 from 0 on, rising to 1 at 2 pixels; nothing but the first pair counts at 1
    assert results.homography_auc["all"] == pytest.approx([0.5, (2 * 0.75 + 1) / 3, (2 * 0.75 + 3) / 5], abs=1e-3)
    assert (tmp_path / "out" / "homography.png").stat().st_size > 0


def test_names_without_a_prefix_have_no_subset(tmp_path):
    write_sequence(tmp_path / "data" / "graf", [10, 20])
    results = evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=lookup(FEATURES)[0])
    assert results.mma == {"all": CURVE_20}


def test_the_eight_large_sequences_are_left_out():
    assert len(TOO_LARGE) == 8
    assert sum(name.startswith("i_") for name in TOO_LARGE) == 57 - 52  # 57 + 59 sequences become 52 + 56
    assert sum(name.startswith("v_") for name in TOO_LARGE) == 59 - 56


def test_predicts_once_and_refuses_what_has_changed(tmp_path):
    write_sequence(tmp_path / "data" / "wall", [10, 20])
    first, _ = lookup(FEATURES, threshold=1)
    results = evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=first)

    again, asked = lookup(FEATURES, threshold=1)
    assert evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=again) == results
    assert asked == []

    other, asked = lookup(FEATURES, threshold=2)
    with pytest.raises(ValueError, match="threshold 1 there, 2 here"):
        evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=other)
    evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=other, overwrite=True)
    assert asked == [10, 20]

    cv2.imwrite(str(tmp_path / "data" / "wall" / "2.png"), np.full((20, 30, 3), 30, np.uint8))
    with pytest.raises(ValueError, match=r"2\.png has changed"):
        evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=other)


def test_methods_share_a_table_and_a_figure_on_the_same_data_only(tmp_path):
    write_sequence(tmp_path / "data" / "wall", [10, 20])
    evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=lookup(FEATURES, "one")[0])
    single = (tmp_path / "out" / "mma.png").read_bytes()
    evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=lookup(FEATURES, "one")[0], name="two")
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", "one", "two"]
    assert (tmp_path / "out" / "mma.png").read_bytes() != single

    method, asked = lookup(FEATURES, "three")
    np.savetxt(tmp_path / "data" / "wall" / "H_1_2", np.eye(3))
    with pytest.raises(ValueError, match=r"other data \(one, two\)"):
        evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=method)
    np.savetxt(tmp_path / "data" / "wall" / "H_1_2", SHIFT)
    write_sequence(tmp_path / "data" / "more", [10, 20])
    with pytest.raises(ValueError, match="other data"):
        evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=method)
    assert asked == []


def test_an_unreadable_image_is_an_error_here(tmp_path):
    write_sequence(tmp_path / "data" / "wall", [10, 20])
    (tmp_path / "data" / "wall" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2\.png is empty"):
        evaluate(HPatches(), tmp_path / "data", tmp_path / "out", method=lookup(FEATURES)[0])


def spoil_none(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: (s / "1.png").unlink(), FileNotFoundError, "lacks image 1"),
        (lambda s: (s / "2.png").unlink(), FileNotFoundError, "lacks image 2"),
        (lambda s: (s / "H_1_2").unlink(), FileNotFoundError, "lacks H_1_2"),
        (lambda s: cv2.imwrite(str(s / "2.ppm"), np.zeros((4, 4, 3), np.uint8)), ValueError, "keep one image 2"),
        (lambda s: (s / "H_1_2").write_text("1 0\n0 1\n"), ValueError, "3 x 3"),
        (lambda s: (s / "H_1_2").write_text("1 0 0\n0 1 0\n0 0 nan\n"), ValueError, "finite 3 x 3"),
        (lambda s: (s / "H_1_2").write_text("one"), ValueError, "numbers"),
        (spoil_none, ValueError, "no sequence"),
    ],
)
def test_incomplete_sequences_are_refused_in_one_line(tmp_path, spoil, error, message):
    write_sequence(tmp_path / "data" / "wall", [10, 20, 30])
    spoil(tmp_path / "data" / "wall")
    with pytest.raises(error, match=message) as caught:
        find_sequences(tmp_path / "data")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_sequences(tmp_path / "absent")


@pytest.mark.real
@pytest.mark.slow
def test_sift_on_real_sequences(tmp_path):
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "homography"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}: set SAMFEAT_DATA to the folder that holds homography/oxford")
    for name in ("boat", "leuven"):
        (tmp_path / name).symlink_to((root / "oxford" / name).resolve())
    results = evaluate(HPatches(), tmp_path, tmp_path / "out", method=load_method("sift", max_keypoints=1000))
    accuracy = {(p.sequence, p.image): p.accuracy[2] for p in results.pairs}
    assert len(accuracy) == 10
    assert accuracy["leuven", 2] > 0.8
    assert accuracy["boat", 2] > 0.7
    assert results.mma["all"][2] > 0.5
    assert results.matches["all"] > 300
