"""A made-up place: points in space, cameras around them, and photographs whose features are known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pycolmap

from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method

SIZE = (480, 640)
MATRIX = np.array([[600.0, 0, 325.0], [0, 610, 236.0], [0, 0, 1]])
POINTS = np.random.default_rng(3).uniform((-3, -2, -1.5), (3, 2, 1.5), (220, 3))
CODES = np.random.default_rng(4).normal(size=(220, 32)).astype(np.float32)


def camera_around(angle: float, height: float = 0.0, distance: float = 9.0) -> PosedCamera:
    """A camera on a circle about the points (degrees), looking at their middle."""
    turn = np.radians(angle)
    centre = np.array([distance * np.sin(turn), height, -distance * np.cos(turn)])
    forward = -centre / np.linalg.norm(centre)
    right = np.cross((0, 1, 0), forward)
    right /= np.linalg.norm(right)
    rotation = np.array([right, np.cross(forward, right), forward])
    return PosedCamera(MATRIX, SIZE, Pose(rotation, -rotation @ centre))


def cameras(count: int) -> dict[str, PosedCamera]:
    """Cameras on an arc of 100 degrees, at heights that differ, by image name."""
    angles = np.linspace(-50, 50, count)
    return {f"{k:04}.png": camera_around(a, 1.5 * np.sin(2.1 * k), 9 + 0.8 * np.cos(k)) for k, a in enumerate(angles)}


def features_of(
    camera: PosedCamera, *, lens: pycolmap.Camera | None = None, noise: float = 0.0, seed: int = 0
) -> Features:
    """Where the camera sees the points (all of ``lens`` or, without one, of the pinhole), in a random order."""
    rng = np.random.default_rng(seed)
    local = POINTS @ camera.pose.rotation.T + camera.pose.translation
    if lens is None:
        pixels = cv2.projectPoints(local, np.zeros(3), np.zeros(3), camera.matrix, None)[0][:, 0]
    else:
        pixels = np.array([lens.img_from_cam(point) for point in local]) - 0.5
    pixels = pixels + rng.normal(0, 1, pixels.shape) * noise
    seen = ((pixels > 0) & (pixels < (SIZE[1] - 1, SIZE[0] - 1))).all(1)
    order = rng.permutation(np.flatnonzero(seen))
    lengths = rng.uniform(0.5, 2, (len(order), 1)).astype(np.float32)  # weighted descriptors, as ours are
    unit = CODES[order] / np.linalg.norm(CODES[order], axis=1, keepdims=True)
    return {
        "keypoints": pixels[order].astype(np.float32),
        "scores": np.ones(len(order), np.float32),
        "descriptors": unit * lengths,
        "image_size": np.array([SIZE[1], SIZE[0]]),
    }


def write_photographs(folder: Path, names: list[str]) -> dict[str, int]:
    """Photographs of one grey each, by which :func:`lookup` knows them; their grey by name."""
    greys = {name: 5 * number for number, name in enumerate(names)}
    for name, grey in greys.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((*SIZE, 3), grey, np.uint8))
    return greys


def write_cameras(folder: Path, posed: dict[str, PosedCamera]) -> None:
    """``cameras.json`` of a folder."""
    values = {
        name: {
            "K": camera.matrix.tolist(),
            "R_w2c": camera.pose.rotation.tolist(),
            "t_w2c": camera.pose.translation.tolist(),
            "size": [camera.size[1], camera.size[0]],
        }
        for name, camera in posed.items()
    }
    (folder / "cameras.json").write_text(json.dumps(values))


def lookup(features: dict[int, Features], name: str = "lookup", **config) -> tuple[Method, list[int]]:
    """A method that knows the features of a photograph by its grey, and the list of those it was asked for."""
    asked: list[int] = []

    def extract(image: np.ndarray) -> Features:
        asked.append(int(image[0, 0, 0]))
        return features[asked[-1]]

    return Method(name, {"method": name, **config}, extract), asked


def write_place(folder: Path, count: int = 8, **kwargs) -> tuple[dict[str, PosedCamera], dict[int, Features]]:
    """A scene with true cameras in ``folder``; the cameras, and the features by grey."""
    posed = cameras(count)
    greys = write_photographs(folder / "images", list(posed))
    write_cameras(folder, posed)
    return posed, {greys[name]: features_of(posed[name], seed=greys[name], **kwargs) for name in posed}


def aachen_lens(number: int) -> pycolmap.Camera:
    """A camera with distortion, as Aachen's have."""
    params = [600.0 + number, 320.0, 240.0, 0.03]
    return pycolmap.Camera(
        model="SIMPLE_RADIAL", width=SIZE[1], height=SIZE[0], params=params, has_prior_focal_length=True
    )


def write_aachen(folder: Path, *, nvm: bool = False) -> tuple[dict[str, PosedCamera], dict[int, Features]]:
    """Aachen Day-Night v1.1 in small: 6 database images, a day and two night queries; true cameras, features by grey.

    Args:
        folder: to write.
        nvm: VisualSFM's model and the list of intrinsics in place of COLMAP's model.
    """
    names = [f"db/{k}.jpg" for k in range(4)] + ["sequences/gopro3/0001.png", "sequences/gopro3/0002.png"]
    queries = ["query/day/milestone/2010.jpg", "query/night/nexus5x/IMG_1.jpg"]
    queries.append("query/night/nexus5x_additional_night/IMG_2.jpg")
    posed = dict(zip([*names, *queries], cameras(9).values(), strict=True))
    lenses = {name: aachen_lens(k) for k, name in enumerate(posed)}
    greys = write_photographs(folder / "images_upright", list(posed))
    features = {greys[n]: features_of(posed[n], lens=lenses[n], seed=greys[n]) for n in posed}

    def intrinsics(name: str) -> str:
        return " ".join([name, "SIMPLE_RADIAL", "640", "480", *map(str, lenses[name].params)]) + "\n"

    (folder / "queries").mkdir()
    (folder / "queries" / "day_time_queries_with_intrinsics.txt").write_text(intrinsics(queries[0]))
    (folder / "queries" / "night_time_queries_with_intrinsics.txt").write_text("".join(map(intrinsics, queries[1:])))
    model = folder / "3D-models" / "aachen_v_1_1"
    model.mkdir(parents=True)
    if nvm:
        lines = ["NVM_V3 ", "", str(len(names))]
        for name in names:
            x, y, z, w = pycolmap.Rotation3d(posed[name].pose.rotation).quat
            values = (600, w, x, y, z, *posed[name].pose.centre, 0.03, 0)
            lines.append(" ".join([name, *map(repr, map(float, values))]))
        (model / "aachen_v_1_1.nvm").write_text("\n".join([*lines, "", "0", ""]))
        (model / "database_intrinsics_v1_1.txt").write_text("".join(map(intrinsics, names)))
    else:
        write_model(model, {name: (lenses[name], posed[name]) for name in names})
    pairs = [(query, name) for query in queries for name in names[:5]]
    (folder / "pairs-query-netvlad50.txt").write_text("".join(f"{a} {b}\n" for a, b in pairs))
    return posed, features


def write_model(folder: Path, posed: dict[str, tuple[pycolmap.Camera, PosedCamera]]) -> None:
    """COLMAP's model of posed cameras; the k-th of 30 points is seen by images k % N, k % N + 1 and k % N + 2."""
    model = pycolmap.Reconstruction()
    for number, (name, (lens, camera)) in enumerate(posed.items(), start=1):
        lens = pycolmap.Camera(lens.todict())
        lens.camera_id = number
        model.add_camera_with_trivial_rig(lens)
        local = POINTS[:30] @ camera.pose.rotation.T + camera.pose.translation
        pixels = np.array([lens.img_from_cam(point) for point in local])
        image = pycolmap.Image(name=name, keypoints=pixels, camera_id=number, image_id=number)
        rigid = pycolmap.Rigid3d(pycolmap.Rotation3d(camera.pose.rotation), camera.pose.translation)
        model.add_image_with_trivial_frame(image, rigid)
    for k, point in enumerate(POINTS[:30]):
        first = k % len(posed)
        seen = [number for number in (first, first + 1, first + 2) if number < len(posed)]
        track = pycolmap.Track([pycolmap.TrackElement(number + 1, k) for number in seen])
        model.add_point3D(point, track, np.zeros(3, np.uint8))
    model.write(folder)
