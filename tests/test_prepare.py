"""Photographs to COLMAP's models, against the cameras that took them."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from samfeat.pipelines.prepare import prepare_photos
from samfeat.pipelines.sample.render import SceneCamera, look_at, render_image
from samfeat.pipelines.sample.scenes import FOCAL, SIZE, intrinsics, load_photographs, room, sky
from samfeat.teacher_cache.sources.colmap import ColmapSource
from samfeat.teacher_cache.sources.colmap_model import read_model


def sampson(cameras, pair, points0, points1):
    """Sampson distances [n] in pixels; ``cameras`` gives K and the pose [3, 4] or [4, 4], world to camera, by name."""
    (K0, pose0), (K1, pose1) = (cameras[name] for name in pair)
    R = pose1[:3, :3] @ pose0[:3, :3].T
    t = pose1[:3, 3] - R @ pose0[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K1).T @ cross @ R @ np.linalg.inv(K0)
    p, q = (np.c_[points, np.ones(len(points))] for points in (points0, points1))
    lines1, lines0 = p @ F.T, q @ F
    norm = np.sqrt((lines1[:, :2] ** 2).sum(1) + (lines0[:, :2] ** 2).sum(1))
    return np.abs((q * lines1).sum(1)) / norm


def errors_in_the_photographs(out, cameras, *, crop_size):
    """Sampson distances of the pairs of ``out``, in the pixels of the photographs, by the cameras that took them."""
    taken, flat = (
        {image.name: image.camera for image in read_model(folder).images}
        for folder in (out / "models/0", out / "0/sparse")
    )
    source = ColmapSource(out, crop_size=crop_size, pairs_per_scene=10)
    found = []
    for item in (source.item(k) for k in range(len(source))):
        names = [name.split("#")[0].removeprefix("0/") for name in item.names]
        sides = [
            taken[name].pixels(flat[name].rays(item.points[side, item.valid] + np.array(item.boxes[side][:2], float)))
            for side, name in enumerate(names)
        ]
        found.append(sampson(cameras, names, *sides))
    return np.concatenate(found)


@pytest.mark.slow
def test_a_rendered_room_interrupted_and_taken_up_again(tmp_path):
    photos, out, cameras = tmp_path / "photos", tmp_path / "out", {}
    surfaces = room(load_photographs(), np.random.default_rng(3))
    photos.mkdir()
    for k, x in enumerate((-0.9, -0.3, 0.3, 0.9)):
        camera = SceneCamera(
            intrinsics(FOCAL), look_at(np.array([x, -1.6, -0.6]), np.array([0.2 * x, -1.3, 4.0])), SIZE
        )
        picture = np.clip(render_image(surfaces, camera, background=sky(np.random.default_rng(0))), 0, 1)
        cv2.imwrite(str(photos / f"view {k}.png"), np.rint(255 * picture[:, :, ::-1]).astype(np.uint8))
        cameras[f"view_{k}.png"] = camera.K, camera.pose
    (photos / "broken.jpg").write_bytes(b"")
    steps = []

    def impatient(step, done, total):
        steps.append((step, done, total))
        if step == "matching":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_photos(photos, out, max_size=640, progress=impatient)
    assert ("SIFT", 5, 5) in steps
    again = []
    summary = prepare_photos(photos, out, max_size=640, progress=lambda *step: again.append(step))
    assert again[0] == ("SIFT", 4, 5)  # the broken one is tried again
    assert again[-1] == ("undistorting", 1, 1)
    assert (summary.photos, summary.models, summary.registered) == (5, 1, 4)
    assert summary.left_out == ("broken.jpg",)
    assert (summary.points > 200, summary.error < 1) == (True, True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    assert prepare_photos(photos, out, max_size=640) == summary
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")} == before
    distances = errors_in_the_photographs(out, cameras, crop_size=(240, 240))
    assert np.median(distances) < 0.3
    assert (distances < 1.5).mean() > 0.97


@pytest.mark.real
@pytest.mark.slow
def test_measured_cameras_of_a_fountain(tmp_path):
    root = Path(os.environ.get("SAMFEAT_DATA", "../shared/data")) / "multiview" / "fountain-P11"
    if not root.is_dir():
        pytest.skip(f"{root} is absent; set SAMFEAT_DATA to the folder of photographs")
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [f"{k:04}.jpg" for k in range(3, 8)]
    for name in names:
        shutil.copy(root / "images" / name, photos)
    measured = json.loads((root / "cameras_1024.json").read_text())
    cameras = {name: (np.array(each["K"]), np.c_[each["R_w2c"], each["t_w2c"]]) for name, each in measured.items()}
    summary = prepare_photos(photos, tmp_path / "out", matching="sequential", max_size=640)
    assert (summary.registered, summary.left_out) == (5, ())
    distances = errors_in_the_photographs(tmp_path / "out", cameras, crop_size=(240, 240))
    assert np.median(distances) < 0.3  # pixels of 1024x683; the measured cameras themselves err by 0.1 to 0.3
    assert (distances < 1.5).mean() > 0.98


@pytest.mark.parametrize("number", [0, 2])
def test_too_few_photographs(tmp_path, number):
    photographs(tmp_path / "photos", number)
    with pytest.raises(ValueError, match=f"holds {number} photographs"):
        prepare_photos(tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_photographs_of_nothing_in_common(tmp_path):
    photographs(tmp_path / "photos", 3)
    with pytest.raises(ValueError, match="0 of 3 photographs could be registered, 3 are needed") as error:
        prepare_photos(tmp_path / "photos", tmp_path / "out", max_size=200)
    assert "\n" not in str(error.value)


def test_other_folders_and_settings_are_refused(tmp_path):
    photographs(tmp_path / "photos", 3)
    with pytest.raises(ValueError, match="lies inside"):
        prepare_photos(tmp_path / "photos", tmp_path / "photos" / "out")
    with pytest.raises(ValueError, match="is not a folder"):
        prepare_photos(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ValueError, match="choose exhaustive or sequential"):
        prepare_photos(tmp_path / "photos", tmp_path / "out", matching="all")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        prepare_photos(tmp_path / "photos", tmp_path / "full")
    (tmp_path / "out").mkdir()
    begun = {"photos": ["0.png", "1.png"], "matching": "exhaustive", "max_size": 800}
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="begun with other max_size and photos"):
        prepare_photos(tmp_path / "photos", tmp_path / "out")


def test_names_that_differ_in_blanks_alone(tmp_path):
    photographs(tmp_path / "photos", 3)
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "photos/a b.png")
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "photos/a_b.png")
    with pytest.raises(ValueError, match=r"two photographs are called a_b\.png"):
        prepare_photos(tmp_path / "photos", tmp_path / "out")


def photographs(folder, number):
    folder.mkdir()
    for k in range(number):
        noise = np.random.default_rng(k).integers(0, 256, size=(60, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{k}.png"), noise)
