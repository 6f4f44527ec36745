"""Image pairs with ground-truth correspondences: which pairs, how they are cut, and raw MegaDepth as a source of them.

A pair is cut as the released training set was: two images of a scene that see the same things, each cropped (never
resized) around one co-visible point, with the positions of up to 400 points of the first crop in the second one.
COLMAP's models as a source of pairs are in ``samfeat.pipelines.sources.colmap_pairs``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from upath import UPath

from samfeat.pipelines.sources.correspondences import Camera, Pinhole, correspondences
from samfeat.pipelines.sources.megadepth import SceneInfo, find_file, read_depth, read_scene_info, scene_files
from samfeat.teacher_cache.images import Box, SourceItem, check_crop_size, names_sha256, read_image, sha256_of
from samfeat.teacher_cache.schema import POINTS

MIN_VALID = 32  # fewer correspondences do not make a pair
TRIES = 20  # draws before a scene is given up for one item
_CANDIDATES = 25  # for every point that is kept
_CENTRES = 2048  # pixels among which the centre of the crops is sought


@dataclass(frozen=True)
class View:
    """One image of a scene.

    Attributes:
        name: what the store calls it, unique in its scene.
        path: of its file, relative to the data set's root.
        sha256: hex digest of its file.
        image: uint8 [H, W, 3], RGB.
        camera: its intrinsics.
        pose: [4, 4], world to camera.
        depth: [H, W], along the optical axis, 0 where unknown; None without depth.
    """

    name: str
    path: str
    sha256: str
    image: np.ndarray
    camera: Camera
    pose: np.ndarray
    depth: np.ndarray | None = None


class Cut(NamedTuple):
    """Two crops and what corresponds in them: float32 [2, POINTS, 2], (x, y), best first, and bool [POINTS]."""

    boxes: tuple[Box, Box]
    points: np.ndarray
    valid: np.ndarray


class CoVisible(Protocol):
    """What two views of a scene see in common."""

    views: tuple[View, View]

    def cut(self, crop_size: tuple[int, int], rng: np.random.Generator) -> Cut | str:
        """Crops around something that both views see; or in a few words why there are none."""
        ...


class PairSource(ABC):
    """Pairs of images of the same scene, as a source of items.

    From each scene ``pairs_per_scene`` of the eligible pairs are drawn, each one once before any is drawn twice. Every
    item then cuts crops around something that both images see. Where an image is smaller than the crop, or fewer than
    ``MIN_VALID`` points correspond, another pair of the scene is drawn, at most ``TRIES`` times. All draws follow from
    ``seed``, the scene's name and the item's number in the scene.
    """

    paired = True

    def __init__(
        self, eligible: Mapping[str, np.ndarray], *, crop_size: tuple[int, int], pairs_per_scene: int, seed: int
    ) -> None:
        """``eligible``: int [n, 2] for every scene, the pairs of its images, n > 0."""
        if pairs_per_scene < 1:
            raise ValueError(f"pairs_per_scene >= 1 is needed, got {pairs_per_scene}")
        self.crop_size, self.pairs_per_scene, self.seed = check_crop_size(crop_size), pairs_per_scene, seed
        self._eligible = eligible
        self._items = [(name, *pair) for name in eligible for pair in self._draw_pairs(name)]

    def __len__(self) -> int:
        return len(self._items)

    @abstractmethod
    def _co_visible(self, scene: str, first: int, second: int) -> CoVisible:
        """Two images of a scene; ``ValueError`` or ``OSError`` where their files cannot be used."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, number and digest of the drawn pairs."""

    def item(self, k: int) -> SourceItem:
        """Pair ``k``: scene by scene, in the order of their names."""
        name, first, second = self._items[k]
        eligible, rng = self._eligible[name], self._rng(name, k % self.pairs_per_scene)
        reason = ""
        for _ in range(TRIES):
            pair = self._co_visible(name, first, second)
            found = pair.cut(self.crop_size, rng)
            if not isinstance(found, str):
                return SourceItem(
                    images=tuple(crop(view.image, box) for view, box in zip(pair.views, found.boxes)),
                    names=tuple(f"{name}/{view.name}#{k}" for view in pair.views),
                    boxes=found.boxes,
                    sha256=tuple(view.sha256 for view in pair.views),
                    points=found.points,
                    valid=found.valid,
                )
            reason = f"{pair.views[0].path} and {pair.views[1].path}: {found}"
            first, second = eligible[rng.integers(len(eligible))]
        raise ValueError(f"scene {name}: {TRIES} pairs in a row were of no use, at last {reason}; leave the scene out")

    def _rng(self, scene: str, *numbers: int) -> np.random.Generator:
        digest = hashlib.sha256(scene.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *numbers])

    def _draw_pairs(self, name: str) -> list[tuple[int, int]]:
        eligible, rng = self._eligible[name], self._rng(name)
        rounds = -(-self.pairs_per_scene // len(eligible))
        order = np.concatenate([rng.permutation(len(eligible)) for _ in range(rounds)])[: self.pairs_per_scene]
        return [(int(i), int(j)) for i, j in eligible[order]]


class DepthPair:
    """Two views with depth: everything that both see corresponds."""

    def __init__(self, views: tuple[View, View]) -> None:
        self.views = views
        self._depths = [view.depth for view in views if view.depth is not None]
        self._T0to1 = views[1].pose @ np.linalg.inv(views[0].pose)

    def cut(self, crop_size: tuple[int, int], rng: np.random.Generator) -> Cut | str:
        """Crops around the first of some random pixels that the other view sees too."""
        if smaller(self.views, crop_size):
            return f"an image is smaller than the {crop_size[1]}x{crop_size[0]} crop"
        known = np.flatnonzero(self._depths[0] > 0)
        if len(known) == 0:
            return "the first has no depth"
        drawn = known[rng.integers(len(known), size=_CENTRES)]
        points0 = np.stack(np.divmod(drawn, self._depths[0].shape[1])[::-1], axis=1)
        points1, valid = self._correspond(points0)
        if not valid.any():
            return "they see nothing in common"
        centre = int(np.argmax(valid))
        boxes = (
            box_around(points0[centre], self.views[0], crop_size),
            box_around(points1[centre], self.views[1], crop_size),
        )
        points, valid = self._spread(boxes)
        if valid.sum() < MIN_VALID:
            return f"only {int(valid.sum())} points correspond"
        return Cut(boxes, points, valid)

    def _correspond(self, points0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        depth0, depth1 = self._depths
        return correspondences(depth0, depth1, self.views[0].camera, self.views[1].camera, self._T0to1, points0)

    def _spread(self, boxes: tuple[Box, Box]) -> tuple[np.ndarray, np.ndarray]:
        """Up to POINTS correspondences between two crops, spread over what both see, each at its cell's best corner.

        The pixel of largest Shi-Tomasi response in each small block of crop 0 is a candidate. Of the candidates that
        are seen in crop 1, the best one of each square cell is taken; about POINTS such cells tile what both see.

        Returns:
            points: float32 [2, POINTS, 2], (x, y) in the crops, best first, zero past the last valid one.
            valid: bool [POINTS].
        """
        (left, top, width, height), (left1, top1, width1, height1) = boxes
        block = max(1, int(np.sqrt(width * height / (POINTS * _CANDIDATES))))
        response = corner_response(crop(self.views[0].image, boxes[0]))
        y, x = _best_of_cells(response, block)
        points0 = np.stack([x, y], axis=1)
        points1, valid = self._correspond(points0 + (left, top))
        points1 -= (left1, top1)
        with np.errstate(invalid="ignore"):
            valid &= np.all((points1 >= 0) & (points1 <= (width1 - 1, height1 - 1)), axis=1)
        cell = max(1, int(np.sqrt(valid.sum() * block**2 / POINTS)))
        return strongest(points0[valid], points1[valid], response, cell=cell)


class MegaDepthSource(PairSource):
    """Pairs of raw MegaDepth, described by D2-Net's or LoFTR's scene files.

    ``root`` holds ``scene_info/*.npz``, the undistorted images (``Undistorted_SfM/<scene>/images/``) and the depth maps
    (``phoenix/S6/zl548/MegaDepth_v1/<scene>/dense0/depths/*.h5``, with or without the first folders).

    The pairs (i, j) with ``min_overlap <= overlap <= max_overlap`` are eligible. Intrinsics are used as they are, like
    everybody's, without COLMAP's half pixel.

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
        if not 0 <= min_overlap <= max_overlap <= 1 or max_scale_ratio < 1:
            raise ValueError(
                "0 <= min_overlap <= max_overlap <= 1 and max_scale_ratio >= 1 are needed, got "
                f"{min_overlap}, {max_overlap}, {max_scale_ratio}"
            )
        self.root = UPath(root)
        self._limits = (min_overlap, max_overlap, max_scale_ratio)
        self._scenes: dict[str, SceneInfo] = {}
        eligible: dict[str, np.ndarray] = {}
        for path in scene_files(self.root, scenes):
            info = read_scene_info(path)
            pairs = self._within_limits(info)
            if len(pairs):
                self._scenes[info.name], eligible[info.name] = info, pairs
        if not self._scenes:
            raise ValueError(
                f"no pair of {self.root / 'scene_info'} has an overlap in [{min_overlap}, {max_overlap}] and a scale "
                f"ratio up to {max_scale_ratio}; widen the limits"
            )
        super().__init__(eligible, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)

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

    def _within_limits(self, info: SceneInfo) -> np.ndarray:
        min_overlap, max_overlap, max_scale_ratio = self._limits
        keep = (info.overlap >= min_overlap) & (info.overlap <= max_overlap)
        if np.isfinite(max_scale_ratio):
            if info.scale_ratio is None:
                raise ValueError(f"scene file {info.name} has no scale_ratio_matrix; leave max_scale_ratio infinite")
            keep &= info.scale_ratio <= max_scale_ratio
        return info.pairs[keep]

    def _co_visible(self, scene: str, first: int, second: int) -> CoVisible:
        return DepthPair((self._view(self._scenes[scene], first), self._view(self._scenes[scene], second)))

    def _view(self, info: SceneInfo, index: int) -> View:
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
        return View(Path(image_path).name, image_path, sha256_of(data), image, Pinhole(K), pose, depth)


def smaller(views: tuple[View, View], crop_size: tuple[int, int]) -> bool:
    """Whether one of the images is smaller than a crop."""
    return any(view.image.shape[axis] < crop_size[axis] for view in views for axis in (0, 1))


def box_around(centre: np.ndarray, view: View, crop_size: tuple[int, int]) -> Box:
    """The crop around ``centre``, pushed inside the image."""
    height, width = crop_size
    left = int(np.clip(int(centre[0]) - width // 2, 0, view.image.shape[1] - width))
    top = int(np.clip(int(centre[1]) - height // 2, 0, view.image.shape[0] - height))
    return left, top, width, height


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of ``image`` in ``box``, a copy."""
    left, top, width, height = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def corner_response(image: np.ndarray) -> np.ndarray:
    """Shi-Tomasi's response, float32 [H, W], at least 0, of uint8 [H, W, 3]."""
    return np.maximum(cv2.cornerMinEigenVal(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), blockSize=3), 0)


def strongest(
    points0: np.ndarray, points1: np.ndarray, response: np.ndarray, *, cell: int
) -> tuple[np.ndarray, np.ndarray]:
    """Up to POINTS correspondences between two crops: the one of largest response in each square cell of crop 0.

    Args:
        points0: [n, 2], (x, y) in crop 0.
        points1: [n, 2], (x, y) in crop 1.
        response: [H, W], at least 0, of crop 0.
        cell: side of the cells in pixels.

    Returns:
        points: float32 [2, POINTS, 2], best first, zero past the last valid one.
        valid: bool [POINTS].
    """
    x, y = np.rint(points0).astype(np.intp).T
    seen = np.full(response.shape, -1, np.intp)
    seen[y, x] = np.arange(len(points0))
    y, x = _best_of_cells(np.where(seen >= 0, response, -1.0), cell)
    chosen = seen[y, x][:POINTS]
    points, valid = np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool)
    points[0, : len(chosen)], points[1, : len(chosen)] = points0[chosen], points1[chosen]
    valid[: len(chosen)] = True
    return points, valid


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
