"""Writes the embedded sample set: small, free of downloads, and laid out like raw MegaDepth.

``scene_info/<scene>.npz``, ``Undistorted_SfM/<scene>/images/*.jpg`` and
``phoenix/S6/zl548/MegaDepth_v1/<scene>/dense0/depths/*.h5`` hold the training scenes: 0000 is Middlebury's motorcycle,
a real stereo pair with measured disparities; the others are rendered rooms of real photographs with exact depth.
``heldout/<v_name|i_name>/{1..6}.png, H_1_{2..6}`` holds planar sequences in the layout of HPatches, of photographs that
no training scene shows: ``v_`` with other viewpoints, ``i_`` with other light. The scene files carry what the choice of
pairs needs, not the sparse points.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import h5py
import numpy as np

from samfeat.pipelines.sample.render import SceneCamera, look_at, render_depth, render_image
from samfeat.pipelines.sample.scenes import (
    CREDITS,
    FOCAL,
    SIZE,
    Photographs,
    develop,
    draw_light,
    intrinsics,
    load_photographs,
    photograph_on_plane,
    room,
    sky,
    slanted_light,
    viewpoint,
)
from samfeat.teacher_cache.sources.correspondences import correspondences

ROOMS = 10
VIEWS = 6  # of a room and of a held-out sequence
HELD_OUT_SEQUENCES = ("v_coffee", "v_grace_hopper", "v_chelsea", "i_flower", "i_coffee")
MARKER = "sample.json"  # written last: a folder that has it is complete
_FORMAT = "samfeat-sample-1"
_OVERLAP_STEP = 8  # pixels between the points that overlaps are counted on

_MOTORCYCLE_FOCAL, _MOTORCYCLE_CENTRE = 994.978, (311.193, 254.877)  # pixels; scikit-image, data.stereo_motorcycle
_MOTORCYCLE_OFFSET, _MOTORCYCLE_BASELINE = 31.086, 0.193001  # pixels between the principal points; metres


@dataclass(frozen=True)
class SampleSummary:
    """What a sample folder holds.

    Attributes:
        format: name and version of the layout.
        seed: the seed that it was drawn with.
        scenes: number of training scenes.
        images: number of training images.
        heldout: names of the held-out sequences.
        photographs: whose they are.
    """

    format: str
    seed: int
    scenes: int
    images: int
    heldout: tuple[str, ...]
    photographs: str


@dataclass(frozen=True)
class RenderedView:
    """One picture of a scene: uint8 [H, W, 3], its depth along the optical axis [H, W] (0 unknown), and its camera."""

    image: np.ndarray
    depth: np.ndarray
    camera: SceneCamera


def write_sample(
    folder: str | Path, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> SampleSummary:
    """Writes the sample set, or finds it there and leaves it alone.

    The folder appears only when it is complete; until then the work goes to ``<folder>.partial``.

    Args:
        folder: where to; must not hold anything else.
        seed: of scenes, viewpoints, light and noise. Equal seeds write equal pictures.
        progress: called with (pictures done, pictures in all) from worker threads.

    Raises:
        ValueError: the folder holds something else, or a sample of another seed.
        OSError: it cannot be written.
    """
    folder = Path(folder).resolve()
    if (found := read_summary(folder)) is not None:
        if (found.format, found.seed) != (_FORMAT, seed):
            raise ValueError(f"{folder} holds {found.format} of seed {found.seed}; remove it or choose another folder")
        return found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a sample; choose another folder or remove it")
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    summary = SampleSummary(_FORMAT, seed, ROOMS + 1, 2 + ROOMS * VIEWS, HELD_OUT_SEQUENCES, CREDITS)
    done = _PictureCounter(summary.images + VIEWS * len(HELD_OUT_SEQUENCES), progress)
    photographs = load_photographs()
    jobs = [partial(_write_motorcycle, partial_folder, done)]
    jobs += [
        partial(_write_room, partial_folder, f"{k:04d}", photographs, (seed, k), done) for k in range(1, ROOMS + 1)
    ]
    for k, name in enumerate(HELD_OUT_SEQUENCES):
        jobs.append(partial(_write_sequence, partial_folder / "heldout" / name, photographs, (seed, 1000 + k), done))
    try:
        _run(jobs)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    (partial_folder / MARKER).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    partial_folder.replace(folder)
    return summary


def read_summary(folder: str | Path) -> SampleSummary | None:
    """The summary of a complete sample folder; None where there is none."""
    marker = Path(folder) / MARKER
    if not marker.is_file():
        return None
    try:
        values = json.loads(marker.read_text())
        return SampleSummary(**{**values, "heldout": tuple(values["heldout"])})
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{marker} is damaged; remove the folder and write the sample again") from None


def _run(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs ``jobs`` in threads; after an error, those that have not begun are dropped."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for running in [pool.submit(job) for job in jobs]:
            running.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _PictureCounter:
    """Counts pictures across threads."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._lock = 0, threading.Lock()

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def _write_room(
    folder: Path, scene: str, photographs: Photographs, seed: tuple[int, ...], done: _PictureCounter
) -> None:
    surfaces = room(photographs, np.random.default_rng(seed))
    views = {}
    for k in range(VIEWS):
        rng = np.random.default_rng((*seed, k))
        camera = viewpoint(rng)
        picture = render_image(surfaces, camera, background=sky(rng))
        views[f"{k}"] = RenderedView(develop(picture, draw_light(rng), rng), render_depth(surfaces, camera), camera)
        done.advance()
    _write_scene(folder, scene, views)


def _write_motorcycle(folder: Path, done: _PictureCounter) -> None:
    import skimage.data

    left, right, disparity = skimage.data.stereo_motorcycle()
    disparity = np.where(np.isfinite(disparity), disparity, np.nan).astype(np.float64)
    views = {}
    for name, image, shift, values in (
        ("left", left, 0.0, disparity),
        ("right", right, _MOTORCYCLE_OFFSET, disparity_of_right_view(disparity)),
    ):
        K = np.array(
            [
                [_MOTORCYCLE_FOCAL, 0, _MOTORCYCLE_CENTRE[0] + shift],
                [0, _MOTORCYCLE_FOCAL, _MOTORCYCLE_CENTRE[1]],
                [0, 0, 1],
            ]
        )
        pose = np.eye(4)
        pose[0, 3] = -_MOTORCYCLE_BASELINE if shift else 0.0
        depth = np.nan_to_num(_MOTORCYCLE_FOCAL * _MOTORCYCLE_BASELINE / (values + _MOTORCYCLE_OFFSET))
        views[name] = RenderedView(image, depth, SceneCamera(K, pose, disparity.shape))
        done.advance()
    _write_scene(folder, "0000", views)


def disparity_of_right_view(disparity: np.ndarray) -> np.ndarray:
    """Disparities of the left view (x_right = x_left - d) as the right view sees them; NaN where there are none.

    Neighbours of a row whose disparities differ by less than a pixel belong to one surface, on which the disparity is
    interpolated; the nearest surface wins.
    """
    height, width = disparity.shape
    near, far = disparity[:, :-1], disparity[:, 1:]
    rows, columns = np.nonzero(np.abs(near - far) < 1)
    near, far = near[rows, columns], far[rows, columns]
    start, stop = columns - near, columns + 1 - far
    found = np.full((height, width), -np.inf)
    for step in (0, 1):  # the interval is shorter than two pixels
        x = np.ceil(start) + step
        inside = (x <= stop) & (x >= 0) & (x < width)
        share = (x - start) / (stop - start)
        values = near + share * (far - near)
        np.maximum.at(found, (rows[inside], x[inside].astype(np.intp)), values[inside])
    return np.where(np.isfinite(found), found, np.nan)


def _write_scene(folder: Path, scene: str, views: dict[str, RenderedView]) -> None:
    image_folder = Path("Undistorted_SfM") / scene / "images"
    depth_folder = Path("phoenix/S6/zl548/MegaDepth_v1") / scene / "dense0" / "depths"
    for part in (image_folder, depth_folder, Path("scene_info")):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, view in views.items():
        _write_picture(folder / image_folder / f"{name}.jpg", view.image)
        with h5py.File(folder / depth_folder / f"{name}.h5", "w") as file:
            file.create_dataset("depth", data=view.depth.astype(np.float32), compression="gzip", shuffle=True)
    overlap, scale_ratio = relations(list(views.values()))
    np.savez(
        folder / "scene_info" / f"{scene}.npz",
        image_paths=[(image_folder / f"{name}.jpg").as_posix() for name in views],
        depth_paths=[(depth_folder / f"{name}.h5").as_posix() for name in views],
        intrinsics=[view.camera.K for view in views.values()],
        poses=[view.camera.pose for view in views.values()],
        overlap_matrix=overlap,
        scale_ratio_matrix=scale_ratio,
    )


def relations(views: list[RenderedView]) -> tuple[np.ndarray, np.ndarray]:
    """Overlap and scale-ratio matrices, -1 where there are none, as D2-Net's preprocessing defines them.

    Overlap (i, j) is the share of the points of i that j sees as well, here of a regular grid of pixels; the scale
    ratio is the least of max(a / b, b / a) over these points, a and b being depth over focal length in i and j.
    """
    overlap, scale_ratio = np.full((2, len(views), len(views)), -1.0)
    for i, first in enumerate(views):
        y, x = np.mgrid[: first.depth.shape[0] : _OVERLAP_STEP, : first.depth.shape[1] : _OVERLAP_STEP]
        known = first.depth[y, x] > 0
        points0 = np.stack([x[known], y[known]], axis=1)
        rays = np.linalg.inv(first.camera.K) @ np.vstack([points0.T, np.ones(len(points0))])
        z0 = first.depth[points0[:, 1], points0[:, 0]]
        for j, second in enumerate(views):
            if i == j:
                continue
            T0to1 = second.camera.pose @ np.linalg.inv(first.camera.pose)
            _, seen = correspondences(first.depth, second.depth, first.camera.K, second.camera.K, T0to1, points0)
            overlap[i, j] = seen.mean()
            if seen.any():
                z1 = (T0to1[2, :3] @ (rays * z0) + T0to1[2, 3])[seen]
                ratio = z0[seen] / first.camera.K[0, 0] * second.camera.K[0, 0] / z1
                scale_ratio[i, j] = np.maximum(ratio, 1 / ratio).min()
    return overlap, scale_ratio


def _write_sequence(folder: Path, photographs: Photographs, seed: tuple[int, ...], done: _PictureCounter) -> None:
    """Six pictures of one photograph and the homographies between them."""
    kind, name = folder.name.split("_", 1)
    photograph = photographs[name]
    surface = photograph_on_plane(photograph)
    distance = FOCAL / (1.1 * photograph.shape[1])  # the photograph, one metre wide, is enlarged 1.1 times
    folder.mkdir(parents=True)
    first = SceneCamera(intrinsics(FOCAL), look_at(np.array([0, 0, -distance]), np.zeros(3)), SIZE)
    for k in range(VIEWS):
        rng = np.random.default_rng((*seed, k))
        camera = first if k == 0 or kind == "i" else _oblique(distance, np.deg2rad(10 * k), rng)
        picture = render_image([surface], camera, background=np.full((*SIZE, 3), 0.5, np.float32))
        if kind == "i" and k > 0:
            picture = picture * slanted_light(rng)
        _write_picture(folder / f"{k + 1}.png", develop(picture, draw_light(rng), rng))
        if k > 0:
            np.savetxt(folder / f"H_1_{k + 1}", plane_homography(first, camera), fmt="%.10g")
        done.advance()


def _oblique(distance: float, tilt: float, rng: np.random.Generator) -> SceneCamera:
    """A camera that looks at the origin of the plane z = 0, off its normal by ``tilt`` radians."""
    turn, away = rng.uniform(0, 2 * np.pi), distance * rng.uniform(0.8, 1.2)
    direction = np.array([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), -np.cos(tilt)])
    target = np.array([*rng.uniform(-0.08, 0.08, size=2), 0])
    focal = FOCAL * rng.uniform(0.75, 1.3)
    return SceneCamera(intrinsics(focal), look_at(away * direction, target, roll=rng.uniform(-0.45, 0.45)), SIZE)


def plane_homography(first: SceneCamera, second: SceneCamera) -> np.ndarray:
    """H [3, 3] with p2 ~ H p1 for pixels of the plane z = 0, scaled to H[2, 2] = 1."""
    to_first, to_second = (camera.K @ camera.pose[:3][:, [0, 1, 3]] for camera in (first, second))
    H = to_second @ np.linalg.inv(to_first)
    return H / H[2, 2]


def _write_picture(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] RGB; JPEG at quality 95, where the suffix says so."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), image[:, :, ::-1], options):
        raise OSError(f"{path} cannot be written; is the disk full?")
