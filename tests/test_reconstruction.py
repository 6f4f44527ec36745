import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from places import lookup, write_cameras, write_photographs, write_place

from samfeat.pipelines.evaluation.reconstruction import evaluate_reconstruct, find_collections
from samfeat.pipelines.features.methods import load_method


def shared_points(features) -> tuple[int, int]:
    """Points that two or more photographs show, and how often they are shown in all."""
    shown = [{tuple(np.round(d / np.linalg.norm(d), 3)) for d in f["descriptors"]} for f in features.values()]
    counts = [sum(point in one for one in shown) for point in set.union(*shown)]
    return sum(n > 1 for n in counts), sum(n for n in counts if n > 1)


def test_exact_features_give_the_exact_scene(tmp_path):
    posed, features = write_place(tmp_path / "place")
    method, asked = lookup(features)
    seen = []
    results = evaluate_reconstruct(
        tmp_path / "place", tmp_path / "out", method=method, progress=lambda *counts: seen.append(counts)
    )
    assert len(asked) == 8
    assert seen == sorted(seen)
    assert seen[-1] == (8 + 28 + 8, 8 + 28 + 8)
    facts = results["scenes"]["place"]
    assert (facts["images"], facts["registered"], facts["verified_pairs"]) == (8, 8, 28)
    points, observations = shared_points(features)
    assert facts["points"] == pytest.approx(points, abs=3)
    assert facts["observations"] == pytest.approx(observations, abs=10)
    assert facts["track_length"] == pytest.approx(facts["observations"] / facts["points"])
    assert facts["reprojection_error"] < 1e-3
    assert facts["centre_error"] < 1e-3
    assert facts["rotation_error"] < 1e-3
    assert max(e["centre"] for e in facts["errors"].values()) < 1e-3
    assert list(facts["errors"]) == list(posed)
    assert facts["auc1"] > 0.999
    assert "dense_points" not in facts or pycolmap.has_cuda
    folder = tmp_path / "out" / "lookup"
    assert json.loads((folder / "results.json").read_text()) == results
    assert {path.name for path in (folder / "place").iterdir()} == {
        *("database.db", "database.json", "sparse", "view.html", "view.png")
    }
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| place | lookup | 8 | {facts['features']:.0f} | 8 | {facts['points']} |" in table
    assert cv2.imread(str(tmp_path / "out" / "reconstruction.png")) is not None


def test_errors_grow_with_the_noise_of_the_keypoints(tmp_path):
    errors = []
    for noise in (0.1, 1.0):
        _, features = write_place(tmp_path / str(noise) / "place", noise=noise)
        results = evaluate_reconstruct(tmp_path / str(noise), tmp_path / f"out{noise}", method=lookup(features)[0])
        facts = results["scenes"]["place"]
        errors.append([facts["reprojection_error"], facts["centre_error"], facts["rotation_error"], -facts["auc1"]])
    assert all(large > small for small, large in zip(*errors, strict=True))
    assert errors[0][0] == pytest.approx(0.1, rel=0.5)  # of residuals with this deviation on both axes, less the fit


def test_unknown_cameras_are_calibrated_on_the_way(tmp_path):
    _, features = write_place(tmp_path / "place")
    out = tmp_path / "out"
    evaluate_reconstruct(tmp_path / "place", out, method=lookup(features)[0], calibrated=False)
    model = pycolmap.Reconstruction(out / "lookup" / "place" / "sparse")
    assert {camera.model.name for camera in model.cameras.values()} == {"SIMPLE_RADIAL"}
    focal = np.array([camera.params[0] for camera in model.cameras.values()])  # guessed as 768, it is 600 and 610
    assert np.abs(focal / 605 - 1).max() < 0.1
    with pytest.raises(ValueError, match="calibrated"):
        evaluate_reconstruct(tmp_path / "place", out, method=lookup(features)[0])


def test_photographs_without_truth_and_several_scenes(tmp_path):
    _, features = write_place(tmp_path / "data" / "known", 5)
    write_photographs(tmp_path / "data" / "album", [f"{k}.png" for k in range(5)])
    results = evaluate_reconstruct(tmp_path / "data", tmp_path / "out", method=lookup(features)[0])
    album, known = results["scenes"]["album"], results["scenes"]["known"]
    assert "centre_error" not in album
    assert known["centre_error"] < 1e-3
    assert [line.split("|")[1].strip() for line in (tmp_path / "out" / "table.md").open()][2:] == ["album", "known"]


def test_nothing_in_common_is_a_result(tmp_path):
    _, features = write_place(tmp_path / "place", 4)
    nothing = {grey: {key: v[:0] if key != "image_size" else v for key, v in f.items()} for grey, f in features.items()}
    results = evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=lookup(nothing)[0])
    facts = results["scenes"]["place"]
    assert (facts["registered"], facts["points"], facts["auc5"]) == (0, 0, 0)
    assert facts["reprojection_error"] is facts["centre_error"] is None
    assert "| - | - | - |" in (tmp_path / "out" / "table.md").read_text()


def test_computes_once_and_refuses_what_has_changed(tmp_path, monkeypatch):
    posed, features = write_place(tmp_path / "place", 5)
    method = lookup(features, threshold=1)[0]
    results = evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=method)
    with monkeypatch.context() as patch:
        for name in ("incremental_mapping", "estimate_two_view_geometry"):
            patch.setattr(pycolmap, name, None)
        again, asked = lookup(features, threshold=1)
        assert evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=again) == results
        assert asked == []
    with pytest.raises(ValueError, match=r"ratio"):
        evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=method, ratio=0.9)
    other = lookup(features, threshold=2)[0]
    with pytest.raises(ValueError, match="threshold 1 there, 2 here"):
        evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=other)
    evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=other, overwrite=True)
    named = evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=method, name="named")
    assert named["scenes"] == results["scenes"]  # of other folders, to the last digit
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["lookup", "named"]
    write_cameras(tmp_path / "place", dict(list(posed.items())[:3]))
    with pytest.raises(ValueError, match="other data"):
        evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=method, name="third")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from places import cameras, features_of, lookup
from samfeat.pipelines.evaluation.reconstruction import evaluate_reconstruct
folder, at = Path(sys.argv[2]), int(sys.argv[3])
features = {5 * k: features_of(camera, seed=5 * k) for k, camera in enumerate(cameras(5).values())}
kill = lambda done, total: done >= at and os.kill(os.getpid(), signal.SIGKILL)
evaluate_reconstruct(folder / "place", folder / "out", method=lookup(features)[0], progress=kill)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_results(tmp_path):
    _, features = write_place(tmp_path / "place", 5)
    method, asked = lookup(features)
    expected = evaluate_reconstruct(tmp_path / "place", tmp_path / "whole", method=method)
    for at in (3, 9, 18):  # while extracting 5 images, matching 10 pairs, mapping 5 images
        done = subprocess.run([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path, str(at)])
        assert done.returncode == -signal.SIGKILL
    asked.clear()
    assert evaluate_reconstruct(tmp_path / "place", tmp_path / "out", method=method) == expected
    assert asked == []


def test_what_is_no_scene_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_collections(tmp_path / "absent")
    with pytest.raises(ValueError, match="no scene"):
        find_collections(tmp_path)
    write_place(tmp_path / "place", 3)
    (tmp_path / "place" / "images" / "0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 0001\.png"):
        find_collections(tmp_path)


@pytest.mark.real
@pytest.mark.slow
def test_sift_on_a_real_scene(tmp_path):
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "multiview"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}: set SAMFEAT_DATA to the folder that holds multiview/fountain-P11")
    method = load_method("sift", max_keypoints=1000)
    facts = evaluate_reconstruct(root / "fountain-P11", tmp_path, method=method)["scenes"]["fountain-P11"]
    assert facts["registered"] == 11
    assert facts["points"] > 500
    assert facts["reprojection_error"] < 1
    assert facts["centre_error"] < 0.05  # metres; the cameras are 1.7 apart
    assert facts["rotation_error"] < 0.3
    assert facts["auc5"] > 0.9
