"""Image pairs with ground-truth correspondences: projection through depth, and raw MegaDepth as a source of pairs.

A pair is cut as the released training set was: two images of a scene that see the same things, each cropped (never
resized) around one co-visible point, with the positions of up to 400 points of the first crop in the second one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from upath import UPath

from samfeat.pipelines.megadepth import SceneInfo, find_file, read_depth, read_scene_info, scene_files
from samfeat.teacher_cache.images import Box, SourceItem, check_crop_size, names_sha256, read_image, sha256_of
from samfeat.teacher_cache.schema import POINTS

DEPTH_TOLERANCE = 0.05  # relative, as MegaDepth's scenes have no common scale; multi-view stereo errs by a few percent
PIXEL_TOLERANCE = 1.5  # there and back again
MIN_VALID = 32  # fewer correspondences do not make a pair
TRIES = 20  # draws before a scene is given up for one item
_CANDIDATES = 25  # for every point that is kept
_CENTRES = 2048  # pixels among which the centre of the crops is sought


def correspondences(
    depth0: np.ndarray, depth1: np.ndarray, K0: np.ndarray, K1: np.ndarray, T0to1: np.ndarray, points0: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where points of image 0 appear in image 1, and whether they are seen there.

    p1 = K1 T (z0 K0^-1 p0), with the depth z0 interpolated bilinearly. A correspondence is valid where p0 and p1 have
    depth at their four neighbours, the depth of p1 is within ``DEPTH_TOLERANCE`` of the projected one, and the way
    back through the depth of image 1 ends within ``PIXEL_TOLERANCE`` of p0 and ``DEPTH_TOLERANCE`` of its depth.

    Args:
        depth0: [H0, W0], depth along the optical axis; 0 (or not finite) where unknown.
        depth1: [H1, W1], of image 1, in the same unit.
        K0: [3, 3], intrinsics of image 0 in pixels, with (0, 0) the centre of the top-left pixel.
        K1: [3, 3], of image 1.
        T0to1: [4, 4], camera 0 to camera 1.
        points0: [n, 2], (x, y) in image 0.

    Returns:
        points1: float64 [n, 2], (x, y) in image 1; NaN where there is no depth, or where it lies behind the camera.
        valid: bool [n].
    """
    T0to1 = np.asarray(T0to1, np.float64)
    points0 = np.asarray(points0, np.float64)
    z0 = _depth_at(depth0, points0)
    points1, z1_projected = _project(points0, z0, K0, K1, T0to1)
    z1 = _depth_at(depth1, points1)
    back, z0_back = _project(points1, z1, K1, K0, np.linalg.inv(T0to1))
    with np.errstate(invalid="ignore"):
        valid = (
            (np.abs(z1_projected - z1) <= DEPTH_TOLERANCE * z1)
            & (np.abs(z0_back - z0) <= DEPTH_TOLERANCE * z0)
            & (np.linalg.norm(back - points0, axis=1) <= PIXEL_TOLERANCE)
        )
    return points1, valid


def _depth_at(depth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear depth at ``points``, NaN outside and next to unknown depth. A whole coordinate needs no neighbour."""
    height, width = depth.shape
    with np.errstate(invalid="ignore"):
        inside = np.all((points >= 0) & (points <= (width - 1, height - 1)), axis=1)
    x, y = np.where(inside[:, None], points, 0).T
    left, top = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    right, bottom = np.ceil(x).astype(np.intp), np.ceil(y).astype(np.intp)
    corners = np.stack([depth[top, left], depth[top, right], depth[bottom, left], depth[bottom, right]])
    corners = corners.astype(np.float64)
    known = inside & np.all(np.isfinite(corners) & (corners > 0), axis=0)
    fx, fy = x - left, y - top
    weights = np.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy])
    return np.where(known, (weights * np.where(known, corners, 1)).sum(axis=0), np.nan)


def _project(
    points: np.ndarray, z: np.ndarray, K_from: np.ndarray, K_to: np.ndarray, T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points at depth ``z`` seen by another camera: (x, y) [n, 2] and depth [n]; NaN behind it."""
    rays = np.linalg.inv(K_from) @ np.vstack([points.T, np.ones(len(points))])
    x, y, w = K_to @ (T[:3, :3] @ (rays * z) + T[:3, 3:])
    w = np.where(w > 0, w, np.nan)
    return np.stack([x / w, y / w], axis=1), w


class _Cut(NamedTuple):
    """What one try at an item gave."""

    boxes: tuple[Box, Box]
    points: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class _View:
    """One image of a scene with its geometry."""

    path: str
    sha256: str
    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    pose: np.ndarray


class MegaDepthSource:
    """Pairs of raw MegaDepth, described by D2-Net's or LoFTR's scene files.

    ``root`` holds ``scene_info/*.npz``, the undistorted images (``Undistorted_SfM/<scene>/images/``) and the depth maps
    (``phoenix/S6/zl548/MegaDepth_v1/<scene>/dense0/depths/*.h5``, with or without the first folders).

    From each scene, ``pairs_per_scene`` pairs (i, j) with ``min_overlap <= overlap <= max_overlap`` are drawn, each
    one once before any is drawn twice. Every item then draws a co-visible point and crops both images around it. Where
    an image is smaller than the crop, or fewer than ``MIN_VALID`` points correspond, another pair and point of the
    scene are drawn, at most ``TRIES`` times. All draws follow from ``seed``, the scene's name and the item's number in
    the scene. Intrinsics are used as they are, like everybody's, without COLMAP's half pixel.

    Args:
        root: the folder described above.
        crop_size: (height, width) of the crops.
        pairs_per_scene: items of one scene (D2-Net: 100).
        min_overlap: least share of image i that image j sees (D2-Net: 0.5).
        max_overlap: largest such share (D2-Net: 1).
        max_scale_ratio: largest ratio of apparent sizes; infinite takes all (D2-Net's default).
        seed: seed of every draw.
        scenes: names of the scene files to use (without ``.npz``); all of them by default.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a scene file is damaged, or no pair passes the limits. Bad images are found by :meth:`item`.
    """

    paired = True

    def __init__(
        self,
        root: str | Path | UPath,
        *,
        crop_size: tuple[int, int] = (400, 400),
        pairs_per_scene: int = 100,
        min_overlap: float = 0.5,
        max_overlap: float = 1.0,
        max_scale_ratio: float = float("inf"),
        seed: int = 4212,
        scenes: Collection[str] | None = None,
    ) -> None:
        if pairs_per_scene < 1 or not 0 <= min_overlap <= max_overlap <= 1 or max_scale_ratio < 1:
            raise ValueError(
                "pairs_per_scene >= 1, 0 <= min_overlap <= max_overlap <= 1 and max_scale_ratio >= 1 are needed, got "
                f"{pairs_per_scene}, {min_overlap}, {max_overlap}, {max_scale_ratio}"
            )
        self.root = UPath(root)
        self.crop_size = check_crop_size(crop_size)
        self.pairs_per_scene = pairs_per_scene
        self.seed = seed
        self._limits = (min_overlap, max_overlap, max_scale_ratio)
        self._scenes: dict[str, SceneInfo] = {}
        self._eligible: dict[str, np.ndarray] = {}
        for path in scene_files(self.root, scenes):
            info = read_scene_info(path)
            eligible = self._within_limits(info)
            if len(eligible):
                self._scenes[info.name], self._eligible[info.name] = info, eligible
        if not self._scenes:
            raise ValueError(
                f"no pair of {self.root / 'scene_info'} has an overlap in [{min_overlap}, {max_overlap}] and a scale "
                f"ratio up to {max_scale_ratio}; widen the limits"
            )
        self._items = [(name, *pair) for name in self._scenes for pair in self._draw_pairs(name)]

    def __len__(self) -> int:
        return len(self._items)

    def item(self, k: int) -> SourceItem:
        """Pair ``k``: scene by scene, in the order of their names."""
        name, first, second = self._items[k]
        info, eligible = self._scenes[name], self._eligible[name]
        rng = self._rng(name, k % self.pairs_per_scene)
        reason = ""
        for _ in range(TRIES):
            views = (self._view(info, first), self._view(info, second))
            found = self._cut(views, rng)
            if not isinstance(found, str):
                return SourceItem(
                    images=tuple(_crop(view.image, box) for view, box in zip(views, found.boxes)),
                    names=tuple(f"{name}/{Path(view.path).name}#{k}" for view in views),
                    boxes=found.boxes,
                    sha256=tuple(view.sha256 for view in views),
                    points=found.points,
                    valid=found.valid,
                )
            reason = f"{views[0].path} and {views[1].path}: {found}"
            first, second = eligible[rng.integers(len(eligible))]
        raise ValueError(f"scene {name}: {TRIES} pairs in a row were of no use, at last {reason}; leave the scene out")

    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, number and digest of the drawn pairs."""
        min_overlap, max_overlap, max_scale_ratio = self._limits
        paths = {name: info.image_paths for name, info in self._scenes.items()}
        names = [f"{name} {paths[name][i]} {paths[name][j]}" for name, i, j in self._items]
        return {
            "kind": "megadepth",
            "crop_size": list(self.crop_size),
            "pairs_per_scene": self.pairs_per_scene,
            "overlap": [min_overlap, max_overlap],
            "max_scale_ratio": max_scale_ratio if np.isfinite(max_scale_ratio) else None,
            "seed": self.seed,
            "number": len(self),
            "names_sha256": names_sha256(names),
        }

    def _rng(self, scene: str, *numbers: int) -> np.random.Generator:
        digest = hashlib.sha256(scene.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *numbers])

    def _within_limits(self, info: SceneInfo) -> np.ndarray:
        min_overlap, max_overlap, max_scale_ratio = self._limits
        keep = (info.overlap >= min_overlap) & (info.overlap <= max_overlap)
        if np.isfinite(max_scale_ratio):
            if info.scale_ratio is None:
                raise ValueError(f"scene file {info.name} has no scale_ratio_matrix; leave max_scale_ratio infinite")
            keep &= info.scale_ratio <= max_scale_ratio
        return info.pairs[keep]

    def _draw_pairs(self, name: str) -> list[tuple[int, int]]:
        eligible, rng = self._eligible[name], self._rng(name)
        rounds = -(-self.pairs_per_scene // len(eligible))
        order = np.concatenate([rng.permutation(len(eligible)) for _ in range(rounds)])[: self.pairs_per_scene]
        return [(int(i), int(j)) for i, j in eligible[order]]

    def _view(self, info: SceneInfo, index: int) -> _View:
        image_path, depth_path = info.image_paths[index], info.depth_paths[index]
        K, pose = info.intrinsics[index], info.poses[index]
        if image_path is None or depth_path is None or K is None or pose is None:
            raise ValueError(f"scene {info.name}: image {index} has no depth; make the scene file again")
        data = find_file(self.root, image_path).read_bytes()
        image = read_image(data, name=str(self.root / image_path))
        depth = read_depth(find_file(self.root, depth_path))
        if depth.shape != image.shape[:2]:
            raise ValueError(
                f"{self.root / image_path} is {image.shape[1]}x{image.shape[0]} but its depth {depth_path} is "
                f"{depth.shape[1]}x{depth.shape[0]}; undistort the images with D2-Net's script"
            )
        return _View(image_path, sha256_of(data), image, depth, K, pose)

    def _cut(self, views: tuple[_View, _View], rng: np.random.Generator) -> _Cut | str:
        """Boxes and correspondences of a pair, or why there are none."""
        if any(view.depth.shape[axis] < self.crop_size[axis] for view in views for axis in (0, 1)):
            return f"an image is smaller than the {self.crop_size[1]}x{self.crop_size[0]} crop"
        known = np.flatnonzero(views[0].depth > 0)
        if len(known) == 0:
            return "the first has no depth"
        drawn = known[rng.integers(len(known), size=_CENTRES)]
        points0 = np.stack(np.divmod(drawn, views[0].depth.shape[1])[::-1], axis=1)
        points1, valid = _correspond(views, points0)
        if not valid.any():
            return "they see nothing in common"
        centre = int(np.argmax(valid))
        boxes = (self._box(views[0], points0[centre]), self._box(views[1], points1[centre]))
        points, valid = _spread(views, boxes)
        if valid.sum() < MIN_VALID:
            return f"only {int(valid.sum())} points correspond"
        return _Cut(boxes, points, valid)

    def _box(self, view: _View, centre: np.ndarray) -> Box:
        """The crop around ``centre``, pushed inside the image."""
        height, width = self.crop_size
        left = int(np.clip(int(centre[0]) - width // 2, 0, view.depth.shape[1] - width))
        top = int(np.clip(int(centre[1]) - height // 2, 0, view.depth.shape[0] - height))
        return left, top, width, height


def _correspond(views: tuple[_View, _View], points0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = views
    T0to1 = second.pose @ np.linalg.inv(first.pose)
    return correspondences(first.depth, second.depth, first.K, second.K, T0to1, points0)


def _spread(views: tuple[_View, _View], boxes: tuple[Box, Box]) -> tuple[np.ndarray, np.ndarray]:
    """Up to POINTS correspondences between two crops, spread over what both see, each at its cell's best corner.

    The pixel of largest Shi-Tomasi response in each small block of crop 0 is a candidate. Of the candidates that are
    seen in crop 1, the best one of each square cell is taken; about POINTS such cells tile what both crops see.

    Returns:
        points: float32 [2, POINTS, 2], (x, y) in the crops, best first, zero past the last valid one.
        valid: bool [POINTS].
    """
    (left, top, width, height), (left1, top1, width1, height1) = boxes
    block = max(1, int(np.sqrt(width * height / (POINTS * _CANDIDATES))))
    grey = cv2.cvtColor(_crop(views[0].image, boxes[0]), cv2.COLOR_RGB2GRAY)
    response = np.maximum(cv2.cornerMinEigenVal(grey, blockSize=3), 0)
    y, x = _best_of_cells(response, block)
    points0 = np.stack([x, y], axis=1)
    points1, valid = _correspond(views, points0 + (left, top))
    points1 -= (left1, top1)
    with np.errstate(invalid="ignore"):
        valid &= np.all((points1 >= 0) & (points1 <= (width1 - 1, height1 - 1)), axis=1)
    seen = np.full(response.shape, -1, np.intp)
    seen[y[valid], x[valid]] = np.flatnonzero(valid)
    cell = max(1, int(np.sqrt(valid.sum() * block**2 / POINTS)))
    y, x = _best_of_cells(np.where(seen >= 0, response, -1.0), cell)
    chosen = seen[y, x][:POINTS]
    points, mask = np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool)
    points[0, : len(chosen)], points[1, : len(chosen)] = points0[chosen], points1[chosen]
    mask[: len(chosen)] = True
    return points, mask


def _best_of_cells(response: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of the best pixel of each ``side`` x ``side`` cell, best first; negative responses do not count."""
    height, width = response.shape
    rows, columns = -(-height // side), -(-width // side)
    padded = np.full((rows * side, columns * side), -1.0)
    padded[:height, :width] = response
    cells = padded.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side * side)
    within = cells.argmax(axis=1)
    best = cells[np.arange(len(cells)), within]
    order = np.argsort(-best, kind="stable")
    order = order[best[order] >= 0]
    return order // columns * side + within[order] // side, order % columns * side + within[order] % side


def _crop(image: np.ndarray, box: Box) -> np.ndarray:
    left, top, width, height = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])
