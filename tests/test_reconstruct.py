import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from synthetic_scenes import POINTS, cameras, lookup, write_cameras, write_photographs, write_place
from typer.testing import CliRunner

from samfeat import cli
from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.protocol import read_results
from samfeat.pipelines.evaluation.reconstruct import Reconstruct, ReconstructResults, find_collections
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
    results = evaluate(
        Reconstruct(ratios=(0.8,)),
        tmp_path / "place",
        tmp_path / "out",
        method=method,
        progress=lambda *counts: seen.append(counts),
    )
    assert len(asked) == 8
    assert seen == sorted(seen)
    assert seen[-1] == (8 + 28 + 8, 8 + 28 + 8)
    facts = results.scenes["place"]["0.8"]
    assert (facts.images, facts.registered, facts.verified_pairs) == (8, 8, 28)
    points, observations = shared_points(features)
    assert facts.points == pytest.approx(points, abs=3)
    assert facts.observations == pytest.approx(observations, abs=10)
    assert facts.track_length == pytest.approx(facts.observations / facts.points)
    assert facts.reprojection_error < 1e-3
    assert facts.centre_error < 1e-3
    assert facts.rotation_error < 1e-3
    assert max(e.centre for e in facts.errors.values()) < 1e-3
    assert list(facts.errors) == list(posed)
    assert facts.auc1 > 0.999
    assert facts.dense_points is None or pycolmap.has_cuda
    folder = tmp_path / "out" / "lookup"
    assert read_results(folder / "results.json", ReconstructResults) == results
    assert {path.name for path in (folder / "place" / "ratio-0.8").iterdir()} == {
        *("database.db", "database.json", "sparse", "view.html", "view.png")
    }
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| place | lookup | 0.8 | 8 | {facts.features:.0f} | 8 | {facts.points} |" in table
    assert cv2.imread(str(tmp_path / "out" / "reconstruction.png")) is not None


def test_errors_grow_with_the_noise_of_the_keypoints(tmp_path):
    errors = []
    for noise in (0.1, 1.0):
        _, features = write_place(tmp_path / str(noise) / "place", noise=noise)
        results = evaluate(
            Reconstruct(ratios=(0.8,)), tmp_path / str(noise), tmp_path / f"out{noise}", method=lookup(features)[0]
        )
        facts = results.scenes["place"]["0.8"]
        errors.append([facts.reprojection_error, facts.centre_error, facts.rotation_error, -facts.auc1])
    assert all(large > small for small, large in zip(*errors, strict=True))
    assert errors[0][0] == pytest.approx(0.1, rel=0.5)  # of residuals with this deviation on both axes, less the fit


def test_unknown_cameras_are_calibrated_on_the_way(tmp_path):
    _, features = write_place(tmp_path / "place")
    out = tmp_path / "out"
    guessed = Reconstruct(ratios=(0.8,), calibrated=False)
    evaluate(guessed, tmp_path / "place", out, method=lookup(features)[0])
    model = pycolmap.Reconstruction(out / "lookup" / "place" / "ratio-0.8" / "sparse")
    assert {camera.model.name for camera in model.cameras.values()} == {"SIMPLE_RADIAL"}
    focal = np.array([camera.params[0] for camera in model.cameras.values()])  # guessed as 768, it is 600 and 610
    assert np.abs(focal / 605 - 1).max() < 0.1
    with pytest.raises(ValueError, match="calibrated"):
        evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", out, method=lookup(features)[0])


def test_photographs_without_truth_and_several_scenes(tmp_path):
    _, features = write_place(tmp_path / "data" / "known", 5)
    write_photographs(tmp_path / "data" / "album", [f"{k}.png" for k in range(5)])
    results = evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "data", tmp_path / "out", method=lookup(features)[0])
    album, known = results.scenes["album"]["0.8"], results.scenes["known"]["0.8"]
    assert album.centre_error is album.auc1 is None
    assert known.centre_error < 1e-3
    assert [line.split("|")[1].strip() for line in (tmp_path / "out" / "table.md").open()][2:] == ["album", "known"]


def test_nothing_in_common_is_a_result(tmp_path):
    _, features = write_place(tmp_path / "place", 4)
    nothing = {grey: {key: v[:0] if key != "image_size" else v for key, v in f.items()} for grey, f in features.items()}
    results = evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=lookup(nothing)[0])
    facts = results.scenes["place"]["0.8"]
    assert (facts.registered, facts.points, facts.auc5) == (0, 0, 0)
    assert facts.reprojection_error is facts.centre_error is None
    assert "| - | - | - |" in (tmp_path / "out" / "table.md").read_text()


def test_computes_once_and_refuses_what_has_changed(tmp_path, monkeypatch):
    posed, features = write_place(tmp_path / "place", 5)
    method = lookup(features, threshold=1)[0]
    results = evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=method)
    with monkeypatch.context() as patch:
        for name in ("incremental_mapping", "estimate_two_view_geometry"):
            patch.setattr(pycolmap, name, None)
        again, asked = lookup(features, threshold=1)
        assert evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=again) == results
        assert asked == []
    both = evaluate(Reconstruct(ratios=(None, 0.8)), tmp_path / "place", tmp_path / "out", method=method)
    assert both.scenes["place"]["0.8"] == results.scenes["place"]["0.8"]
    assert set(both.scenes["place"]) == {"none", "0.8"}
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split("|")[3].strip() for row in rows[2:]] == ["none", "0.8"]
    other = lookup(features, threshold=2)[0]
    with pytest.raises(ValueError, match="threshold 1 there, 2 here"):
        evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=other)
    evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=other, overwrite=True)
    named = evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=method, name="named")
    assert named.scenes == results.scenes  # of other folders, to the last digit
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["lookup", "named"]
    write_cameras(tmp_path / "place", dict(list(posed.items())[:3]))
    with pytest.raises(ValueError, match="other data"):
        evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=method, name="third")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from synthetic_scenes import cameras, features_of, lookup
from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.reconstruct import Reconstruct
folder, at = Path(sys.argv[2]), int(sys.argv[3])
features = {5 * k: features_of(camera, seed=5 * k) for k, camera in enumerate(cameras(5).values())}
kill = lambda done, total: done >= at and os.kill(os.getpid(), signal.SIGKILL)
evaluate(Reconstruct(ratios=(0.8,)), folder / "place", folder / "out", method=lookup(features)[0], progress=kill)
"""


@pytest.mark.parametrize(
    "moments",
    [(9,), pytest.param((3, 9, 18), marks=pytest.mark.slow)],  # while extracting 5 images, matching 10 pairs, mapping 5
)
def test_a_killed_run_goes_on_to_the_same_results(tmp_path, moments):
    _, features = write_place(tmp_path / "place", 5)
    method, asked = lookup(features)
    expected = evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "whole", method=method)
    for at in moments:
        done = subprocess.run([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path, str(at)])
        assert done.returncode == -signal.SIGKILL
    asked.clear()
    assert evaluate(Reconstruct(ratios=(0.8,)), tmp_path / "place", tmp_path / "out", method=method) == expected
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


def write_patterned(folder: Path, count: int = 5) -> None:
    """A scene whose points are patches of noise, the same ones in every photograph."""
    patches = np.random.default_rng(7).integers(0, 255, (len(POINTS), 4, 4, 3), dtype=np.uint8)
    for name, camera in cameras(count).items():
        image = np.full((*camera.size, 3), 128, np.uint8)
        local = POINTS @ camera.pose.rotation.T + camera.pose.translation
        pixels = local @ camera.matrix.T
        for number in np.argsort(-local[:, 2]):  # the nearest is painted last
            x, y = np.rint(pixels[number, :2] / pixels[number, 2]).astype(int) - 8
            if 0 <= x < camera.size[1] - 16 and 0 <= y < camera.size[0] - 16:
                image[y : y + 16, x : x + 16] = cv2.resize(patches[number], (16, 16), interpolation=cv2.INTER_CUBIC)
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), image)


def test_the_file_that_extract_writes_of_a_scene_is_one_that_evaluate_reads(tmp_path):
    """Against the method itself, which names nothing."""
    data, out, run = tmp_path / "data", tmp_path / "out", CliRunner()
    write_patterned(data / "church")
    words = ["--method", "sift", "--max-keypoints", "400"]
    made = run.invoke(cli.app, ["extract", str(data / "church"), str(tmp_path / "f.h5"), *words])
    assert made.exit_code == 0, made.output
    found = []
    for folder in (data, data / "church"):
        for method in (words, ["--method", str(tmp_path / "f.h5")]):
            place = out / f"{folder.name}-{len(found)}"
            ended = run.invoke(
                cli.app,
                ["evaluate", "reconstruct", "--data", str(folder), "--out", str(place), "--ratio", "0.8", *method],
            )
            assert ended.exit_code == 0, ended.output
            (path,) = place.glob("*/results.json")
            found.append(read_results(path, ReconstructResults).scenes)
    assert found[0]["church"]["0.8"].registered == 5
    assert found[0]["church"]["0.8"].points > 50
    assert found[1:] == [found[0]] * 3
    shutil.copytree(data / "church", data / "tower")
    ended = run.invoke(
        cli.app,
        [
            "evaluate",
            "reconstruct",
            "--data",
            str(data),
            "--out",
            str(out / "both"),
            "--method",
            str(tmp_path / "f.h5"),
        ],
    )
    assert ended.exit_code == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "'0000.png', which may be 'church/0000.png' or 'tower/0000.png'" in line


@pytest.mark.real
@pytest.mark.slow
def test_sift_on_a_real_scene(tmp_path):
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "multiview"
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}: set SAMFEAT_DATA to the folder that holds multiview/fountain-P11")
    method = load_method("sift", max_keypoints=1000)
    facts = evaluate(Reconstruct(ratios=(0.8,)), root / "fountain-P11", tmp_path, method=method).scenes["fountain-P11"][
        "0.8"
    ]
    assert facts.registered == 11
    assert facts.points > 500
    assert facts.reprojection_error < 1
    assert facts.centre_error < 0.05  # metres; the cameras are 1.7 apart
    assert facts.rotation_error < 0.3
    assert facts.auc5 > 0.9
