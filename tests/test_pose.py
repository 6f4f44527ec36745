import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.pose import (
    PosePair,
    PoseResults,
    RelativePose,
    epipolar_errors,
    estimate_pose,
    find_pairs,
    pose_error,
)
from samfeat.pipelines.evaluation.protocol import read_results
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method

K0 = np.array([[300.0, 0, 160], [0, 310, 120], [0, 0, 1]])
K1 = np.array([[280.0, 0, 150], [0, 285, 125], [0, 0, 1]])


def relative_pose(angles=(3, -8, 5), translation=(1.0, 0.2, -0.1)) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    pose[:3, 3] = translation
    return pose


def pair_of(pose: np.ndarray) -> PosePair:
    return PosePair("0.png", "1.png", K0, K1, pose)


def views(pose: np.ndarray, number: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Exact projections of random points into two cameras."""
    points = np.random.default_rng(1).uniform((-2, -1.5, 4), (2, 1.5, 9), (number, 3))
    first, second = points @ K0.T, (points @ pose[:3, :3].T + pose[:3, 3]) @ K1.T
    return first[:, :2] / first[:, 2:], second[:, :2] / second[:, 2:]


@pytest.mark.parametrize("angle", [0.0, 1e-5, 0.1, 12.5, 90.0, 180.0])
def test_rotation_error_is_the_angle_of_the_difference(angle):
    pose = relative_pose()
    turned = Rotation.from_rotvec(np.radians(angle) * np.array([2, -1, 2]) / 3).as_matrix() @ pose[:3, :3]
    error = pose_error(turned, pose[:3, 3], pose)
    assert error.rotation == pytest.approx(angle, abs=1e-5)
    assert error.translation == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("direction", "angle"), [((2, 0, 0), 0), ((-5, 0, 0), 0), ((1, 1, 0), 45), ((-1, 0.0, 1), 45)])
def test_translation_has_neither_length_nor_sign(direction, angle):
    pose = relative_pose(translation=(3, 0, 0))
    error = pose_error(pose[:3, :3], np.array(direction, float), pose)
    assert error.translation == pytest.approx(angle)
    assert error.worse == pytest.approx(angle, abs=1e-6)


def test_epipolar_error_is_opencvs_sampson_like_distance():
    pose = relative_pose()
    points0, points1 = views(pose)
    assert epipolar_errors(points0, points1, pair_of(pose)).max() < 1e-20
    moved = points1 + (0, 4)
    x, y, z = pose[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:3, :3]
    rays0, rays1 = (cv2.undistortPoints(p[:, None], k, None)[:, 0] for p, k in ((points0, K0), (moved, K1)))
    lines1, lines0 = (
        cv2.computeCorrespondEpilines(p[:, None], which, essential)[:, 0] for p, which in ((rays0, 1), (rays1, 2))
    )
    expected = (
        np.sum(np.pad(rays1, ((0, 0), (0, 1)), constant_values=1) * lines1, 1) ** 2
        + np.sum(np.pad(rays0, ((0, 0), (0, 1)), constant_values=1) * lines0, 1) ** 2
    )  # OpenCV's lines are normalised, so these are squared distances
    assert epipolar_errors(points0, moved, pair_of(pose)) == pytest.approx(expected, rel=1e-6)


def test_exact_matches_give_the_exact_pose_and_wrong_ones_do_not_disturb_it():
    pose = relative_pose()
    points0, points1 = views(pose)
    error, inliers = estimate_pose(points0, points1, pair_of(pose))
    assert error is not None
    assert error.worse < 1e-4
    assert inliers == 60
    noise = np.random.default_rng(2).uniform(0, 240, (40, 2))
    error, inliers = estimate_pose(np.r_[points0, noise], np.r_[points1, noise[::-1]], pair_of(pose))
    assert error is not None
    assert error.worse < 0.05
    assert inliers >= 60
    assert estimate_pose(points0[:4], points1[:4], pair_of(pose)) == (None, 0)


def features_of(points: np.ndarray) -> Features:
    return {
        "keypoints": points.astype(np.float32),
        "scores": np.ones(len(points), np.float32),
        "descriptors": np.eye(60, dtype=np.float32)[: len(points)],
        "image_size": np.array([320, 240]),
    }


def write_images(folder: Path, *names: str) -> None:
    """Images of one grey value each: their number."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((240, 320, 3), number, np.uint8))


def row(*values) -> str:
    return " ".join(str(x) for value in values for x in (np.ravel(value) if isinstance(value, np.ndarray) else [value]))


def check(pairs: list[PosePair], name0: str, name1: str, pose: np.ndarray) -> None:
    assert len(pairs) == 1
    pair = pairs[0]
    assert (pair.image0, pair.image1) == (name0, name1)
    for given, wanted in ((pair.intrinsics0, K0), (pair.intrinsics1, K1), (pair.pose, pose)):
        assert given == pytest.approx(wanted)


def test_superglues_pairs(tmp_path):
    pose = relative_pose()
    write_images(tmp_path, "images/0.png", "images/1.png")
    (tmp_path / "pairs_with_gt.txt").write_text(row("0.png", "1.png", 0, 0, K0, K1, pose) + "\n\n")
    (tmp_path / "license.txt").write_text("some words\nand more\n")
    pairs, paths = find_pairs(tmp_path)
    check(pairs, "0.png", "1.png", pose)
    assert paths == {name: tmp_path / "images" / name for name in ("0.png", "1.png")}


def test_glue_factorys_pairs(tmp_path):
    pose = relative_pose()
    write_images(tmp_path, "images/s/0.png", "images/s/1.png")
    line = row("s/0.png", "s/1.png", K0, K1, pose[:3, :3].copy(), pose[:3, 3].copy())
    (tmp_path / "pairs_calibrated.txt").write_text(line + "\n")
    check(find_pairs(tmp_path)[0], "s/0.png", "s/1.png", pose)


@pytest.mark.parametrize("folder", ["megadepth_test_1500_scene_info", "scene_info", "."])
def test_loftrs_scenes(tmp_path, folder):
    write_images(tmp_path, "Undistorted_SfM/0015/images/0.png", "Undistorted_SfM/0015/images/1.png")
    (tmp_path / folder).mkdir(exist_ok=True)
    world0, pose = relative_pose((40, 3, -7), (3, 2, 1)), relative_pose()
    names = np.array([None, "Undistorted_SfM/0015/images/0.png", "Undistorted_SfM/0015/images/1.png"], object)
    members = {"image_paths": names, "depth_paths": names, "intrinsics": [None, K0, K1]}
    members["poses"] = [None, world0, pose @ world0]
    arrays = {key: np.empty(3, object) for key in members}
    for key, values in members.items():
        for i, value in enumerate(values):
            arrays[key][i] = value
    infos = np.empty(1, object)
    infos[0] = ((1, 2), 0.4, np.zeros((0, 2)))
    np.savez(tmp_path / folder / "0015_0.1_0.3.npz", pair_infos=infos, **arrays)
    pairs, paths = find_pairs(tmp_path)
    check(pairs, str(names[1]), str(names[2]), pose)
    assert all(path.is_file() for path in paths.values())


def test_cameras_of_a_scene_give_all_pairs(tmp_path):
    write_images(tmp_path, "wall/images/0.png", "wall/images/1.png", "wall/images/2.png")
    worlds = [relative_pose((10 * i, 4, 2), (i, 1, 0)) for i in range(3)]
    cameras = {
        f"{i}.png": {"K": k.tolist(), "R_w2c": w[:3, :3].tolist(), "t_w2c": w[:3, 3].tolist(), "size": [640, 480]}
        for i, (k, w) in enumerate(zip((K0, K1, K0), worlds, strict=True))
    }
    (tmp_path / "wall" / "cameras.json").write_text(json.dumps(cameras))
    pairs, paths = find_pairs(tmp_path)
    assert [(p.image0, p.image1) for p in pairs] == [
        ("wall/0.png", "wall/1.png"), ("wall/0.png", "wall/2.png"), ("wall/1.png", "wall/2.png"),
    ]  # fmt: skip
    assert paths["wall/2.png"] == tmp_path / "wall/images/2.png"
    point = np.array([1.0, 2, 3, 1])
    assert pairs[1].pose @ worlds[0] @ point == pytest.approx(worlds[2] @ point)


def test_evaluation_from_stored_features(tmp_path):
    pose = relative_pose()
    points0, points1 = views(pose)
    data = tmp_path / "data"
    write_images(data, "0.png", "1.png", "2.png")
    lines = [row(a, b, 0, 0, K0, K1, pose) for a, b in (("0.png", "1.png"), ("0.png", "2.png"))]
    (data / "pairs.txt").write_text("\n".join(lines))
    known = [features_of(points0), features_of(points1), features_of(points1[:3])]
    asked: list[int] = []

    def extract(image: np.ndarray) -> Features:
        asked.append(int(image[0, 0, 0]))
        return known[asked[-1]]

    method = Method("known", {"method": "known", "version": 1}, extract)
    seen = []
    results = evaluate(
        RelativePose(), data, tmp_path / "out", method=method, progress=lambda *state: seen.append(state)
    )
    assert asked == [0, 1, 2]
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert results.ratios["none"].auc == pytest.approx(
        [0.5] * 3, abs=1e-3
    )  # one pair is exact, the other has too few matches
    assert results.ratios["none"].failed == 1
    assert results.ratios["none"].precision == pytest.approx(1)
    assert results.ratios["none"].pairs[1].rotation_error is None
    assert read_results(tmp_path / "out" / "known" / "results.json", PoseResults) == results
    assert "| known | none | 50.0 | 50.0 | 50.0 | 100.0 | 32 |" in (tmp_path / "out" / "table.md").read_text()
    assert Image.open(tmp_path / "out" / "pose.png").width > 500
    assert Image.open(tmp_path / "out" / "known" / "matches, ratio none.png").width > 500

    assert evaluate(RelativePose(), data, tmp_path / "out", method=method) == results
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="version 1 there, 2 here"):
        evaluate(
            RelativePose(), data, tmp_path / "out", method=Method("known", {"method": "known", "version": 2}, extract)
        )
    (data / "pairs.txt").write_text(lines[0])
    with pytest.raises(ValueError, match=r"other data \(known\)"):
        evaluate(RelativePose(), data, tmp_path / "out", method=method, name="again")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, ValueError, "lists no pair"),
        ({"p.txt": row("0.png", "1.png", 0, 0, K0, K1, np.eye(4))}, FileNotFoundError, r"lacks 0\.png"),
        ({"p.txt": row("0.png", "1.png", 0, 0, K0, K1, np.eye(4)) + "\n0 1 2"}, ValueError, "line 2: 3 fields"),
        ({"p.txt": row("0.png", "1.png", 0, 0, K0, K1, np.eye(4)) + "x"}, ValueError, "line 1"),
        ({"cameras.json": '{"0.png": {"K": 1}}'}, ValueError, "K, R_w2c, t_w2c and size"),
        ({"cameras.json": "no json"}, ValueError, "K, R_w2c, t_w2c and size"),
        ({"0.npz": "no zip"}, ValueError, "not a usable scene file"),
    ],
)
def test_bad_lists_are_refused_in_one_line(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message) as caught:
        find_pairs(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_pairs(tmp_path / "absent")
