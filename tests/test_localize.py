import json
import os
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from scipy.spatial.transform import Rotation
from synthetic_scenes import lookup, write_aachen, write_place

from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.camera_poses import Pose, pose_errors
from samfeat.pipelines.evaluation.localize import Localize, LocalizedQuery, write_poses
from samfeat.pipelines.features.methods import load_method


def read_poses(path: Path) -> dict[str, Pose]:
    """By SciPy, which takes the scalar last."""
    poses = {}
    for line in path.read_text().splitlines():
        name, *values = line.split()
        w, x, y, z, *translation = map(float, values)
        poses[name] = Pose(Rotation.from_quat([x, y, z, w]).as_matrix(), np.array(translation))
    return poses


def test_exact_features_give_the_exact_poses(tmp_path):
    posed, features = write_place(tmp_path / "place")
    method, asked = lookup(features)
    seen = []
    results = evaluate(
        Localize(ratios=(None,)),
        tmp_path / "place",
        tmp_path / "out",
        method=method,
        progress=lambda *counts: seen.append(counts),
    )
    assert len(asked) == 8
    assert seen == sorted(seen)
    assert seen[-1] == (8 + 10 + 15 + 3, 8 + 10 + 15 + 3)
    facts = results.scenes["place"]["none"]
    queries = facts.queries["all"]
    assert (queries.images, queries.localized, queries.recall) == (3, 3, [1, 1, 1])
    assert queries.centre_error < 1e-3
    assert queries.rotation_error < 1e-3
    assert facts.points > 200
    for entry in facts.poses.values():
        assert entry.centre < 1e-3
        assert entry.inliers == entry.matches > 150
    folder = tmp_path / "out" / "lookup" / "place" / "ratio-none"
    assert {path.name for path in folder.iterdir()} == {
        *("database.db", "database.json", "map", "poses.txt", "view.html", "view.png")
    }
    found = read_poses(folder / "poses.txt")
    truth = [posed[name].pose for name in found]
    errors = pose_errors(list(found.values()), truth)
    assert list(found) == ["0001.png", "0004.png", "0007.png"]
    assert max(*errors.centres, *errors.rotations) < 1e-3
    row = f"| place | all | lookup | none | {facts.points} | 100.0 | {queries.inliers:.0f} | 100.0 | 100.0 | 100.0 |"
    assert row in (tmp_path / "out" / "table.md").read_text()
    assert cv2.imread(str(tmp_path / "out" / "localization.png")) is not None


@pytest.mark.parametrize("nvm", [False, True])
def test_aachen_gives_the_file_that_the_benchmark_takes(tmp_path, nvm):
    posed, features = write_aachen(tmp_path / "aachen", nvm=nvm)
    results = evaluate(
        Localize(ratios=(None,)), tmp_path / "aachen", tmp_path / "out", method=lookup(features)[0], name="ours"
    )
    queries = results.scenes["aachen"]["none"].queries
    assert {subset: (q.images, q.localized) for subset, q in queries.items()} == {
        "all": (3, 3),
        "day": (1, 1),
        "night": (2, 2),
    }
    assert queries["all"].recall is None
    found = read_poses(tmp_path / "out" / "ours" / "aachen" / "ratio-none" / "Aachen_v1_1_eval_[ours].txt")
    assert list(found) == ["2010.jpg", "IMG_1.jpg", "IMG_2.jpg"]
    truth = [camera.pose for name, camera in posed.items() if name.startswith("query")]
    errors = pose_errors(list(found.values()), truth)
    assert max(*errors.centres, *errors.rotations) < 1e-3
    assert "| aachen | night | ours |" in (tmp_path / "out" / "table.md").read_text()


def test_a_query_of_another_place_is_not_localised(tmp_path):
    _, features = write_place(tmp_path / "place")
    lost = features[5]  # of 0001.png, a query
    rng = np.random.default_rng(0)
    features[5] = {**lost, "descriptors": rng.normal(size=lost["descriptors"].shape).astype(np.float32)}
    features[20] = {key: v[:3] if key != "image_size" else v for key, v in features[20].items()}  # 0004.png
    results = evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=lookup(features)[0])
    facts = results.scenes["place"]["none"]
    queries = facts.queries["all"]
    assert facts.poses["0004.png"] == LocalizedQuery(inliers=0, matches=3)
    assert queries.recall[0] == pytest.approx(1 / 3)
    found = read_poses(tmp_path / "out" / "lookup" / "place" / "ratio-none" / "poses.txt")
    assert "0004.png" not in found
    assert len(found) == queries.localized


def test_recall_counts_what_is_within_both_thresholds(tmp_path):
    """True poses of the queries that the answers miss by a known distance or angle."""
    posed, features = write_place(tmp_path / "place")
    path = tmp_path / "place" / "cameras.json"
    values = json.loads(path.read_text())
    extent = max(
        np.linalg.norm(a.pose.centre - b.pose.centre)
        for x, a in posed.items()
        for y, b in posed.items()
        if not {x, y} & {"0001.png", "0004.png", "0007.png"}
    )
    values["0001.png"]["t_w2c"][0] += 0.0008 * extent  # medium
    turn = Rotation.from_rotvec([0, 0, np.radians(7)]).as_matrix()  # coarse, about its own centre
    values["0004.png"]["R_w2c"] = (turn @ posed["0004.png"].pose.rotation).tolist()
    values["0004.png"]["t_w2c"] = (turn @ posed["0004.png"].pose.translation).tolist()
    path.write_text(json.dumps(values))
    facts = evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=lookup(features)[0]).scenes[
        "place"
    ]["none"]
    assert facts.queries["all"].recall == pytest.approx([1 / 3, 2 / 3, 1])
    assert facts.poses["0001.png"].centre == pytest.approx(0.0008 * extent, rel=0.02)
    assert facts.poses["0004.png"].rotation == pytest.approx(7, abs=0.01)


def test_computes_once_and_refuses_what_has_changed(tmp_path, monkeypatch):
    _, features = write_place(tmp_path / "place", 6)
    method = lookup(features)[0]
    results = evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=method)
    with monkeypatch.context() as patch:
        for name in ("triangulate_points", "estimate_two_view_geometry"):
            patch.setattr(pycolmap, name, None)
        again, asked = lookup(features)
        assert evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=again) == results
        assert asked == []
    both = evaluate(Localize(ratios=(None, 0.9)), tmp_path / "place", tmp_path / "out", method=method)
    assert both.scenes["place"]["none"] == results.scenes["place"]["none"]
    assert set(both.scenes["place"]) == {"none", "0.9"}
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[4].strip() for row in rows] == ["none", "0.9"]
    second = evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=method, name="second")
    assert second.scenes == results.scenes


def test_images_of_another_size_are_refused(tmp_path):
    _, features = write_place(tmp_path / "place", 6)
    cv2.imwrite(str(tmp_path / "place" / "images" / "0002.png"), np.full((240, 320, 3), 10, np.uint8))
    features[10] = {**features[10], "image_size": np.array([320, 240])}
    with pytest.raises(ValueError, match=r"0002\.png has 320 x 240 pixels, its camera 640 x 480"):
        evaluate(Localize(ratios=(None,)), tmp_path / "place", tmp_path / "out", method=lookup(features)[0])


def test_names_that_agree_without_their_folders_are_refused(tmp_path):
    pose = Pose(np.eye(3), np.zeros(3))
    assert write_poses(tmp_path / "a.txt", {"x/a.jpg": pose}).read_text() == "a.jpg 1.0 0.0 0.0 0.0 0.0 0.0 0.0\n"
    with pytest.raises(ValueError, match="two queries are called"):
        write_poses(tmp_path / "a.txt", {"x/a.jpg": pose, "y/a.jpg": pose})


@pytest.mark.real
@pytest.mark.slow
def test_sift_on_a_real_scene(tmp_path):
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "multiview"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}: set SAMFEAT_DATA to the folder that holds multiview/fountain-P11")
    method = load_method("sift", max_keypoints=1000)
    queries = (
        evaluate(Localize(ratios=(None,)), root / "fountain-P11", tmp_path, method=method)
        .scenes["fountain-P11"]["none"]
        .queries
    )
    assert queries["all"].localized == 4
    assert queries["all"].centre_error < 0.03  # metres
    assert queries["all"].rotation_error < 0.1
