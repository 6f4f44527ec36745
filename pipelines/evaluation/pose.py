"""Relative pose from matches: the area under the curve of pose errors, by the protocol of SuperGlue (CVPR 2020).

Mutual nearest neighbours, the essential matrix by PoseLib's LO-RANSAC with non-linear refinement, and the larger of the
angular errors of rotation and translation direction. Images keep their own size.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import poselib
from upath import UPath

from samfeat.images import read_image
from samfeat.pipelines.evaluation.camera_poses import Pose, read_cameras, rotation_angle
from samfeat.pipelines.evaluation.per_scene import RATIO_MEANING, RATIOS, check_ratios, ratio_label
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Results, predict, shown_pairs
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.metrics import error_auc, matched_points
from samfeat.pipelines.pictures.charts import error_chart
from samfeat.pipelines.pictures.draw import draw_errors, panel, save_png
from samfeat.pipelines.pictures.tables import Cell, Column, Table
from samfeat.teacher_cache.sources.megadepth import find_file, read_scene_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (5, 10, 20)  # degrees
RANSAC = {"max_epipolar_error": 1.0, "success_prob": 0.9999, "max_iterations": 10_000, "seed": 0}  # error in pixels
RIGHT_MATCH = 5e-4  # squared symmetric epipolar distance in normalised coordinates, SuperGlue's limit


class PosePair(NamedTuple):
    """Two images and the relative pose of their cameras.

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
    """Errors of a pose in degrees: of its rotation, and of the direction of its translation up to sign."""

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
    """Error of the pose estimated from matches [M, 2], and its number of inliers; None for fewer than five inliers."""
    if len(points0) < 5:
        return None, 0
    cameras = [_camera(intrinsics) for intrinsics in (pair.intrinsics0, pair.intrinsics1)]
    points = [points.astype(np.float64) for points in (points0, points1)]
    found, statistics = poselib.estimate_relative_pose(*points, *cameras, RANSAC, {})
    inliers = int(statistics["num_inliers"])
    return (None, inliers) if inliers < 5 else (pose_error(found.R, found.t, pair.pose), inliers)


def _camera(intrinsics: np.ndarray) -> dict[str, Any]:
    """A pinhole camera for PoseLib, which does not use the image size."""
    (fx, _, cx), (_, fy, cy), _ = intrinsics.tolist()
    return {"model": "PINHOLE", "width": round(2 * cx), "height": round(2 * cy), "params": [fx, fy, cx, cy]}


def find_pairs(folder: str | Path) -> tuple[list[PosePair], dict[str, Path]]:
    """The pairs of a folder, and the paths of their images by name. Supported, in this order:

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


@dataclass(frozen=True)
class MeasuredPair:
    """Accuracy of the estimated pose of a pair; the errors, in degrees, are None if there is no pose.

    Attributes:
        images: names of the two images.
        rotation_error: see :class:`PoseError`.
        translation_error: see :class:`PoseError`.
        matches: number of matches.
        inliers: of the essential matrix.
        precision: share of matches whose epipolar error is below ``RIGHT_MATCH``.
    """

    images: list[str]
    rotation_error: float | None
    translation_error: float | None
    matches: int
    inliers: int
    precision: float

    @property
    def worse(self) -> float:
        """The larger error in degrees, infinity if there is no pose."""
        if self.rotation_error is None or self.translation_error is None:
            return float("inf")
        return max(self.rotation_error, self.translation_error)


@dataclass(frozen=True)
class MeasuredPairs:
    """Results over all pairs with one ratio.

    Attributes:
        auc: area under the curve of pose errors up to each threshold, in [0, 1].
        precision: mean over pairs.
        matches: mean over pairs.
        inliers: mean over pairs.
        failed: number of pairs without a pose.
        pairs: one entry per pair.
    """

    auc: list[float]
    precision: float
    matches: float
    inliers: float
    failed: int
    pairs: list[MeasuredPair]


@dataclass(frozen=True, kw_only=True)
class PoseResults(Results):
    """Pose errors.

    Attributes:
        thresholds: in degrees.
        estimation: options of PoseLib and its version.
        ratios: by ratio of distances, ``none`` or a number.
    """

    thresholds: list[int]
    estimation: dict[str, Any]
    ratios: dict[str, MeasuredPairs]


@dataclass(frozen=True)
class RelativePose(Evaluation[Method, PoseResults]):
    """Relative pose of pairs of images, see :func:`find_pairs`. Draws ``matches.png`` of some pairs for every method.

    Attributes:
        ratios: maximum ratio of the distances to the best and the second best descriptor, at unit length; None for no
            ratio test.
    """

    ratios: tuple[float | None, ...] = RATIOS

    results = PoseResults
    title = "Relative pose"
    meaning = (
        "Pairs of photographs with known relative pose. The essential matrix of the matches gives a rotation and a "
        "direction of translation; the larger of the two angles by which they are off is the error of the pair."
    )

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def run(self, job: Job[Method]) -> PoseResults:
        """Match and measure every pair with every ratio."""
        pairs, paths = find_pairs(job.data)
        shared = job.start({"pairs": len(pairs), "images": len(paths), "sha256": _sha256(pairs)})
        features = predict(job, paths)
        measured: dict[str, MeasuredPairs] = {}
        for number, ratio in enumerate(self.ratios):
            entries = []
            for done, pair in enumerate(pairs, start=1 + number * len(pairs)):
                points = matched_points(features(pair.image0), features(pair.image1), ratio=ratio)
                entries.append(_measure(pair, *points))
                if job.progress:
                    job.progress(done, len(self.ratios) * len(pairs))
            measured[ratio_label(ratio)] = _summary(entries)
            rows = [
                [_picture(pair, entry, paths, features, ratio)]
                for pair, entry in shown_pairs(list(zip(pairs, entries)))
            ]
            save_png(job.folder / f"matches, ratio {ratio_label(ratio)}.png", panel(rows, height=320))
        estimation = {"poselib": poselib.__version__, **RANSAC}
        return PoseResults(**shared, thresholds=list(THRESHOLDS), estimation=estimation, ratios=measured)

    def table(self, found: Sequence[PoseResults]) -> Table:
        """One row per method and ratio."""
        columns = [Column("method"), Column("ratio", RATIO_MEANING)]
        columns += [
            Column(f"AUC@{t}", f"area under the curve of pose errors up to {t} degrees, in %", ".1f", "highest")
            for t in THRESHOLDS
        ]
        columns += [
            Column("precision", "mean share of matches that agree with the true pose, in %", ".1f", "highest"),
            Column("matches/pair", "mean number of matches", ".0f"),
            Column("inliers/pair", "mean number of matches that agree with the estimated pose", ".0f"),
            Column("failed", "pairs without a pose", "d", "lowest"),
        ]
        rows: list[list[Cell]] = []
        for results in found:
            for ratio, m in results.ratios.items():
                shares = [100 * share for share in (*m.auc, m.precision)]
                rows.append([results.name, ratio, *shares, m.matches, m.inliers, m.failed])
        return Table(columns, rows)

    def figures(self, found: Sequence[PoseResults]) -> dict[str, Figure]:
        """Recall over the pose error, and the areas below."""
        lines = {f"{r.name}, ratio {ratio}": m for r in found for ratio, m in r.ratios.items()}
        errors = {label: [pair.worse for pair in m.pairs] for label, m in lines.items()}
        areas = {label: m.auc for label, m in lines.items()}
        return {"pose": error_chart(errors, areas, thresholds=THRESHOLDS, xlabel="Pose error [degrees]")}


def _measure(pair: PosePair, points0: np.ndarray, points1: np.ndarray) -> MeasuredPair:
    right = epipolar_errors(points0, points1, pair) < RIGHT_MATCH
    error, inliers = estimate_pose(points0, points1, pair)
    return MeasuredPair(
        images=[pair.image0, pair.image1],
        rotation_error=None if error is None else error.rotation,
        translation_error=None if error is None else error.translation,
        matches=len(points0),
        inliers=inliers,
        precision=float(right.mean()) if len(right) else 0.0,
    )


def _summary(entries: list[MeasuredPair]) -> MeasuredPairs:
    return MeasuredPairs(
        auc=error_auc([entry.worse for entry in entries], THRESHOLDS),
        precision=float(np.mean([entry.precision for entry in entries])),
        matches=float(np.mean([entry.matches for entry in entries])),
        inliers=float(np.mean([entry.inliers for entry in entries])),
        failed=sum(entry.rotation_error is None for entry in entries),
        pairs=entries,
    )


def _picture(
    pair: PosePair,
    entry: MeasuredPair,
    paths: Mapping[str, Path],
    features: Callable[[str], Features],
    ratio: float | None,
) -> tuple[str, np.ndarray]:
    """Title and matches of a pair: green if they agree with the true pose, red at ten times the limit."""
    points0, points1 = matched_points(features(pair.image0), features(pair.image1), ratio=ratio)
    errors = np.sqrt(epipolar_errors(points0, points1, pair))
    image0, image1 = read_image(paths[pair.image0]), read_image(paths[pair.image1])
    title = f"{pair.image0}, {pair.image1}: off by {entry.worse:.1f} deg, {100 * entry.precision:.0f} % right"
    return title, draw_errors(image0, image1, points0, points1, errors, worst=np.sqrt(10 * RIGHT_MATCH))


def _sha256(pairs: Sequence[PosePair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.image0} {pair.image1}".encode())
        digest.update(pair.intrinsics0.tobytes() + pair.intrinsics1.tobytes() + pair.pose.tobytes())
    return digest.hexdigest()
