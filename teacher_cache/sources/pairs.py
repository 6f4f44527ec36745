"""Image pairs with ground-truth correspondences: which pairs, and how they are cut.

A pair is cut as the released training set was: two images of a scene that see the same things, each cropped (never
resized) around one co-visible point, with the positions of up to 400 points of the first crop in the second one.
COLMAP's models as a source of pairs are in ``samfeat.teacher_cache.sources.colmap``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.correspondences import CameraModel, correspondences
from samfeat.teacher_cache.sources.protocol import Box, SourceItem, check_crop_size

MIN_VALID = 32  # minimum correspondences of a pair
TRIES = 20  # draws per item before giving up on a scene
_CANDIDATES = 25  # per point kept
_CENTRES = 2048  # candidate pixels for the centre of the crops


@dataclass(frozen=True)
class Photograph:
    """One image of a scene.

    Attributes:
        name: its name in the store, unique in its scene.
        path: path of its file, relative to the data set's root.
        sha256: hex digest of its file.
        image: uint8 [H, W, 3], RGB.
    """

    name: str
    path: str
    sha256: str
    image: np.ndarray


@dataclass(frozen=True)
class PosedPhotograph(Photograph):
    """An image of a scene with its camera and pose.

    Attributes:
        camera: its intrinsics.
        pose: [4, 4], world to camera.
        depth: [H, W], along the optical axis, 0 where unknown; None without depth.
    """

    camera: CameraModel
    pose: np.ndarray
    depth: np.ndarray | None = None


class Cut(NamedTuple):
    """Two crops and their correspondences: float32 [2, POINTS, 2], (x, y), best first, and bool [POINTS]."""

    boxes: tuple[Box, Box]
    points: np.ndarray
    valid: np.ndarray


class CoVisible(Protocol):
    """The overlap of two views of a scene."""

    @property
    def views(self) -> tuple[Photograph, Photograph]:
        """The two images."""
        ...

    def cut(self, crop_size: tuple[int, int], rng: np.random.Generator) -> Cut | str:
        """Crops around something visible in both views, or a short reason why there are none."""
        ...


class PairSource(ABC):
    """Pairs of images of the same scene, as a source of items.

    From each scene ``pairs_per_scene`` of the eligible pairs are drawn, each once before any is drawn twice. Every item
    then cuts crops around something visible in both images. If a file cannot be used, an image is smaller than the
    crop, or fewer than ``MIN_VALID`` points correspond, another pair of the scene is drawn, at most ``TRIES`` times.
    All draws depend only on ``seed``, the scene's name and the item's number in the scene.
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
        """Two images of a scene; ``ValueError`` or ``OSError`` if their files cannot be used."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, number and digest of the drawn pairs."""

    def item(self, k: int) -> SourceItem:
        """Pair ``k``: scene by scene, in the order of their names."""
        name, first, second = self._items[k]
        eligible, rng = self._eligible[name], self._rng(name, k % self.pairs_per_scene)
        reason, passed_over = "", dict[str, None]()
        for _ in range(TRIES):
            try:
                pair = self._co_visible(name, first, second)
            except (ValueError, OSError) as error:
                reason = str(error)
                passed_over[reason] = None
                first, second = eligible[rng.integers(len(eligible))]
                continue
            found = pair.cut(self.crop_size, rng)
            if not isinstance(found, str):
                return SourceItem(
                    images=tuple(crop(view.image, box) for view, box in zip(pair.views, found.boxes)),
                    names=tuple(f"{name}/{view.name}#{k}" for view in pair.views),
                    boxes=found.boxes,
                    sha256=tuple(view.sha256 for view in pair.views),
                    points=found.points,
                    valid=found.valid,
                    passed_over=tuple(passed_over),
                )
            reason = f"{pair.views[0].path} and {pair.views[1].path}: {found}"
            first, second = eligible[rng.integers(len(eligible))]
        raise ValueError(
            f"scene {name}: {TRIES} pairs in a row were unusable, the last one: {reason}; leave the scene out"
        )

    def _rng(self, scene: str, *numbers: int) -> np.random.Generator:
        digest = hashlib.sha256(scene.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little"), *numbers])

    def _draw_pairs(self, name: str) -> list[tuple[int, int]]:
        eligible, rng = self._eligible[name], self._rng(name)
        rounds = -(-self.pairs_per_scene // len(eligible))
        order = np.concatenate([rng.permutation(len(eligible)) for _ in range(rounds)])[: self.pairs_per_scene]
        return [(int(i), int(j)) for i, j in eligible[order]]


class DepthPair:
    """Two views with depth: correspondences for everything visible in both."""

    def __init__(self, views: tuple[PosedPhotograph, PosedPhotograph]) -> None:
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


def smaller(views: tuple[Photograph, Photograph], crop_size: tuple[int, int]) -> bool:
    """Whether one of the images is smaller than a crop."""
    return any(view.image.shape[axis] < crop_size[axis] for view in views for axis in (0, 1))


def box_around(centre: np.ndarray, view: Photograph, crop_size: tuple[int, int]) -> Box:
    """The crop around ``centre``, shifted to lie inside the image."""
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
