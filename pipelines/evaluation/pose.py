"""Relative pose from matches: the area under the curve of pose errors, by the protocol of SuperGlue (CVPR 2020).

Mutual nearest neighbours, the essential matrix by PoseLib's LO-RANSAC with non-linear refinement, and the larger of the
two angles by which rotation and direction of translation are off. Images keep their own size.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import poselib
from upath import UPath

from samfeat.pipelines.evaluate import collect_results, error_auc, predict, shown_pairs, write_results, write_table
from samfeat.pipelines.evaluation.camera_poses import Pose, read_cameras, rotation_angle
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.match import matched_points
from samfeat.pipelines.pictures.draw import draw_errors, error_figure, panel, save_png
from samfeat.pipelines.sources.megadepth import find_file, read_scene_info
from samfeat.teacher_cache.images import read_image

THRESHOLDS = (5, 10, 20)  # degrees
RANSAC = {"max_epipolar_error": 1.0, "success_prob": 0.9999, "max_iterations": 10_000, "seed": 0}  # error in pixels
RIGHT_MATCH = 5e-4  # squared symmetric epipolar distance in normalised coordinates, SuperGlue's limit


class PosePair(NamedTuple):
    """Two images and how one camera stands to the other.

    Attributes:
        image0, image1: names, relative to the folder of the data.
        intrinsics0, intrinsics1: K, float64 [3, 3], in pixels.
        pose: float64 [4, 4], takes points from the coordinates of camera 0 to those of camera 1.
    """

    image0: str
    image1: str
    intrinsics0: np.ndarray
    intrinsics1: np.ndarray
    pose: np.ndarray


class PoseError(NamedTuple):
    """How far off a pose is, in degrees: its rotation, and the direction of its translation, whose sign is unknown."""

    rotation: float
    translation: float

    @property
    def worse(self) -> float:
        """The larger of the two."""
        return max(self.rotation, self.translation)


def pose_error(rotation: np.ndarray, translation: np.ndarray, pose: np.ndarray) -> PoseError:
    """The error of a rotation [3, 3] and a translation [3], of any length and sign, against ``pose`` [4, 4]."""
    cross = np.linalg.norm(np.cross(translation, pose[:3, 3]))
    angle = np.degrees(np.arctan2(cross, abs(np.dot(translation, pose[:3, 3]))))
    return PoseError(rotation_angle(rotation, pose[:3, :3]), float(angle))


def epipolar_errors(points0: np.ndarray, points1: np.ndarray, pair: PosePair) -> np.ndarray:
    """float64 [M]: squared symmetric epipolar distance of matches [M, 2] in normalised image coordinates."""
    x, y, z = pair.pose[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pair.pose[:3, :3]
    rays0, rays1 = _rays(points0, pair.intrinsics0), _rays(points1, pair.intrinsics1)
    lines1, lines0 = rays0 @ essential.T, rays1 @ essential
    residual = np.sum(rays1 * lines1, axis=1) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = residual * (1 / np.sum(lines1[:, :2] ** 2, axis=1) + 1 / np.sum(lines0[:, :2] ** 2, axis=1))
    return np.nan_to_num(errors, nan=np.inf, posinf=np.inf)


def _rays(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    return np.pad(points.astype(np.float64), ((0, 0), (0, 1)), constant_values=1) @ np.linalg.inv(intrinsics).T


def estimate_pose(points0: np.ndarray, points1: np.ndarray, pair: PosePair) -> tuple[PoseError | None, int]:
    """The error of the pose that matches [M, 2] agree on, and how many do; None where fewer than five matches do."""
    if len(points0) < 5:
        return None, 0
    cameras = [_camera(intrinsics) for intrinsics in (pair.intrinsics0, pair.intrinsics1)]
    points = [points.astype(np.float64) for points in (points0, points1)]
    found, statistics = poselib.estimate_relative_pose(*points, *cameras, RANSAC, {})
    inliers = int(statistics["num_inliers"])
    return (None, inliers) if inliers < 5 else (pose_error(found.R, found.t, pair.pose), inliers)


def _camera(intrinsics: np.ndarray) -> dict[str, Any]:
    """A pinhole camera as PoseLib takes it; it does not use the size of the image."""
    (fx, _, cx), (_, fy, cy), _ = intrinsics.tolist()
    return {"model": "PINHOLE", "width": round(2 * cx), "height": round(2 * cy), "params": [fx, fy, cx, cy]}


def find_pairs(folder: str | Path) -> tuple[list[PosePair], dict[str, Path]]:
    """The pairs of a folder and the paths of their images by name.

    Understood are, in this order:

    - ``*.txt`` with 38 fields a line, as SuperGlue's: two names, two EXIF rotations (not used: images are taken as they
      stand), K of both row by row, and the 4 x 4 pose; or with 32 as glue-factory's: two names, two K, R, t;
    - ``*.npz`` here or in a folder whose name begins with ``scene_info`` or ends with it (MegaDepth-1500 and ScanNet as
      LoFTR lists them);
    - ``cameras*.json`` here or one folder below, with K, R_w2c and t_w2c by image; all pairs of a file are taken.

    Images lie beside these files or in a folder ``images`` there.

    Raises:
        FileNotFoundError: no such folder, or an image is missing.
        ValueError: no list of pairs, or a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the one that holds images and a list of pairs")
    readers: tuple[tuple[Sequence[str], Callable[[Path, Path], list[PosePair]]], ...] = (
        (("*.txt",), _read_text),
        (("*.npz", "scene_info*/*.npz", "*scene_info/*.npz"), _read_scene),
        (("cameras*.json", "*/cameras*.json"), _read_cameras),
    )
    for patterns, read in readers:
        lists = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        pairs = [pair for path in lists for pair in read(path, folder)]
        if pairs:
            names = dict.fromkeys(name for pair in pairs for name in (pair.image0, pair.image1))
            return pairs, {name: _find_image(folder, name) for name in names}
    raise ValueError(f"{folder} lists no pair: put a .txt of SuperGlue, .npz of LoFTR or cameras.json there")


def _find_image(folder: Path, name: str) -> Path:
    parent, _, last = name.rpartition("/")
    for path in (folder / name, folder / parent / "images" / last, folder / "images" / name):
        if path.is_file():
            return path
    try:
        return Path(str(find_file(UPath(folder), name)))
    except ValueError:
        raise FileNotFoundError(f"{folder} lacks {name}, which the list of pairs names: copy it there") from None


def _read_text(path: Path, folder: Path) -> list[PosePair]:
    pairs = []
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if lines and {len(line) for line in lines}.isdisjoint({32, 38}):
        return []  # some other text, such as a licence
    for number, fields in enumerate(lines, start=1):
        try:
            if len(fields) not in (32, 38):
                raise ValueError(f"{len(fields)} fields")
            values = np.array(fields[4 if len(fields) == 38 else 2 :], np.float64)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; a line has 2 names and 36 or 30 numbers") from None
        pose = np.eye(4)
        pose[:3] = values[18:30].reshape(3, 4) if len(fields) == 38 else _joined(values[18:27], values[27:30])
        pairs.append(PosePair(fields[0], fields[1], values[:9].reshape(3, 3), values[9:18].reshape(3, 3), pose))
    return pairs


def _read_scene(path: Path, folder: Path) -> list[PosePair]:
    scene = read_scene_info(path)
    cameras: list[Any] = list(zip(scene.image_paths, scene.intrinsics, scene.poses, strict=True))  # whole in a pair
    pairs = []
    for i, j in scene.pairs[: len(scene.pairs) // 2].tolist():  # the second half is the first in the other order
        (image0, k0, pose0), (image1, k1, pose1) = cameras[i], cameras[j]
        pairs.append(PosePair(image0, image1, k0, k1, pose1 @ np.linalg.inv(pose0)))
    return pairs


def _read_cameras(path: Path, folder: Path) -> list[PosePair]:
    prefix, cameras = path.parent.relative_to(folder), read_cameras(path.parent) or {}
    pairs = []
    for (a, camera0), (b, camera1) in itertools.combinations(sorted(cameras.items()), 2):
        pose = _matrix(camera1.pose) @ np.linalg.inv(_matrix(camera0.pose))
        names = (prefix / a).as_posix(), (prefix / b).as_posix()
        pairs.append(PosePair(*names, camera0.matrix, camera1.matrix, pose))
    return pairs


def _matrix(pose: Pose) -> np.ndarray:
    return np.vstack([np.column_stack([pose.rotation, pose.translation]), [0, 0, 0, 1]])


def _joined(rotation: Any, translation: Any) -> np.ndarray:
    return np.column_stack([np.reshape(np.array(rotation, np.float64), (3, 3)), np.array(translation, np.float64)])


def evaluate_pose(
    folder: str | Path,
    output: str | Path,
    *,
    method: Method,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a method on pairs of images with known relative pose.

    Writes ``<output>/<name>/features.h5``, ``results.json`` and ``matches.png``, and from the results of all methods in
    ``output`` the table ``table.md`` and the figure ``pose.png``.

    Args:
        folder: images and pairs, see :func:`find_pairs`.
        output: folder of this evaluation, for any number of methods.
        method: what is evaluated.
        name: what the method is called in the output; by default its own name.
        overwrite: compute features anew that are stored already.
        progress: called with (done, total), first over images whose features had to be computed, then over pairs.

    Returns:
        what ``results.json`` holds: ``name``, ``method`` (configuration), ``dataset``, ``thresholds`` (degrees),
        ``estimation``, ``auc`` (one a threshold, in [0, 1]), ``precision`` (mean share of matches whose epipolar error
        is below ``RIGHT_MATCH``), mean ``matches`` and ``inliers``, ``failed`` (pairs without a pose), and one entry a
        pair in ``pairs``; an error is None where there was no pose.

    Raises:
        FileNotFoundError: a folder or an image is missing.
        ValueError: a bad list or image; stored features of another configuration or other images; or results on
            other pairs in ``output``.
    """
    pairs, paths = find_pairs(folder)
    name = name or method.name
    dataset = {"pairs": len(pairs), "images": len(paths), "sha256": _sha256(pairs)}
    collect_results(output, dataset, replacing=name)
    store = Path(output) / name / "features.h5"
    features = predict(paths, store, method=method, overwrite=overwrite, progress=progress)
    measured = []
    for done, pair in enumerate(pairs, start=1):
        measured.append(_measure(pair, *matched_points(features(pair.image0), features(pair.image1))))
        if progress:
            progress(done, len(pairs))
    results = {
        "name": name,
        "method": dict(method.config),
        "dataset": dataset,
        "thresholds": list(THRESHOLDS),
        "estimation": {"poselib": poselib.__version__, **RANSAC},
        "auc": error_auc(_errors(measured), THRESHOLDS),
        **{key: float(np.mean([entry[key] for entry in measured])) for key in ("precision", "matches", "inliers")},
        "failed": sum(entry["rotation_error"] is None for entry in measured),
        "pairs": measured,
    }
    write_results(Path(output) / name, results)
    rows = [[_picture(pair, entry, paths, features)] for pair, entry in shown_pairs(list(zip(pairs, measured)))]
    save_png(Path(output) / name / "matches.png", panel(rows, height=320))
    write_comparison(output, dataset)
    return results


def _measure(pair: PosePair, points0: np.ndarray, points1: np.ndarray) -> dict[str, Any]:
    right = epipolar_errors(points0, points1, pair) < RIGHT_MATCH
    error, inliers = estimate_pose(points0, points1, pair)
    return {
        "images": [pair.image0, pair.image1],
        "rotation_error": None if error is None else error.rotation,
        "translation_error": None if error is None else error.translation,
        "matches": len(points0),
        "inliers": inliers,
        "precision": float(right.mean()) if len(right) else 0.0,
    }


def _errors(measured: Sequence[Mapping[str, Any]]) -> list[float]:
    """The larger error of every pair in degrees, infinity where there is no pose."""
    return [
        np.inf
        if entry["rotation_error"] is None
        else PoseError(entry["rotation_error"], entry["translation_error"]).worse
        for entry in measured
    ]


def _picture(
    pair: PosePair, entry: Mapping[str, Any], paths: Mapping[str, Path], features: Callable[[str], Features]
) -> tuple[str, np.ndarray]:
    """Title and matches of a pair, green where they agree with the true pose, red at ten times the limit."""
    points0, points1 = matched_points(features(pair.image0), features(pair.image1))
    errors = np.sqrt(epipolar_errors(points0, points1, pair))
    image0, image1 = read_image(paths[pair.image0]), read_image(paths[pair.image1])
    off = _errors([entry])[0]
    title = f"{pair.image0}, {pair.image1}: off by {off:.1f} deg, {100 * entry['precision']:.0f} % right"
    return title, draw_errors(image0, image1, points0, points1, errors, worst=np.sqrt(10 * RIGHT_MATCH))


def write_comparison(output: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes ``table.md`` and ``pose.png`` of all methods in an evaluation folder."""
    found = collect_results(output, dataset)
    rows = []
    for results in found:
        shares = [f"{100 * value:.1f}" for value in (*results["auc"], results["precision"])]
        counts = [f"{results['matches']:.0f}", f"{results['inliers']:.0f}", str(results["failed"])]
        rows.append([results["name"], *shares, *counts])
    header = ["method", *(f"AUC@{t}" for t in THRESHOLDS), "precision", "matches/pair", "inliers/pair", "failed"]
    write_table(Path(output) / "table.md", header, rows)
    errors = {results["name"]: _errors(results["pairs"]) for results in found}
    areas = {results["name"]: results["auc"] for results in found}
    error_figure(Path(output) / "pose.png", errors, areas, thresholds=THRESHOLDS, xlabel="Pose error [degrees]")


def _sha256(pairs: Sequence[PosePair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.image0} {pair.image1}".encode())
        digest.update(pair.intrinsics0.tobytes() + pair.intrinsics1.tobytes() + pair.pose.tobytes())
    return digest.hexdigest()
