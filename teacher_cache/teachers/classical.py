"""A teacher without learned weights: masks, groups, edges and an embedding from colour, texture and position alone.

It replaces SAM when no checkpoint is available (the embedded sample, the tests, a first look) and gives the same
targets in the same shapes, in a fraction of a second for a 400 x 400 image on one CPU core. All of them come from one
tree of regions (``regions.py``): its regions are the masks, its merging costs the edges, and the path from a piece to
the whole image gives the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from scipy.sparse import csr_array

from samfeat.teacher_cache.schema import Masks, TeacherOutput
from samfeat.teacher_cache.teachers.masks import describe, paint, sort_masks
from samfeat.teacher_cache.teachers.regions import (
    Cues,
    RegionParameters,
    RegionTree,
    boundary_strength,
    measure,
    region_tree,
)

VERSION = 1  # raised whenever equal parameters give other targets
CHANNELS = 256  # of the embedding, as SAM's
CENTRING = 0.99  # share of the mean over cells that is taken off the embedding
LONG_SIDE = 64  # cells of the embedding along the longer side of the image, as SAM's
CELL = 16  # pixels of a cell in SAM's scaled image


@dataclass(frozen=True)
class ClassicalTeacher:
    """Region merging in place of SAM; see :class:`samfeat.teacher_cache.teachers.protocol.Teacher`.

    On the 25 of 50 BSDS500 photographs that took no part in choosing the numbers below, the cosine of two cells of one
    human segment is on average 0.80 higher than that of two cells of different ones, and ranks them with an area under
    the ROC curve of 0.84.

    Attributes:
        regions: how the tree of regions is built.
        min_area, max_area: minimum and maximum area of a mask, as a share of the image.
        even_cost: merging cost at which a region is as likely an object as not.
        min_quality: minimum predicted_iou of a mask.
        max_iou: of two masks that overlap more than this, the one with the higher predicted_iou is kept.
        level_step: stability_score compares a mask at levels this far above and below its own, in merging cost.
        most_regions: the embedding tells regions apart from the level of this many upwards.
        piece_weight: weight of the smallest pieces in the embedding, next to 1 for all levels above together.
        scales: (colour, texture, position) frequencies of the embedding's random Fourier features.
        seed: seed of the embedding's random projection, the same for all images.
    """

    name: ClassVar[str] = "classical"

    regions: RegionParameters = field(default_factory=RegionParameters)
    min_area: float = 5e-4
    max_area: float = 0.95
    even_cost: float = 0.6
    min_quality: float = 0.3
    max_iou: float = 0.7
    level_step: float = 0.05
    most_regions: float = 24.0
    piece_weight: float = 0.05
    scales: tuple[float, float, float] = (1.0, 1.0, 2.0)
    seed: int = 0

    def provenance(self) -> dict[str, Any]:
        """JSON values: what this teacher is, its version and every parameter."""
        return {
            "name": self.name,
            "kind": "classical: no learned weights; colour and texture boundaries, watershed, greedy region merging",
            "version": VERSION,
            "parameters": asdict(self),
        }

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], *, checkpoint: Path | None = None) -> ClassicalTeacher:
        """The teacher whose :meth:`provenance` was ``described``; it has no checkpoint."""
        parameters = {key: _tuples(value) for key, value in described["parameters"].items()}
        regions = {key: _tuples(value) for key, value in parameters.pop("regions").items()}
        return cls(**parameters, regions=RegionParameters(**regions))

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(256, h, w), as SAM gives for an image of ``image_size`` = (height, width) once its padding is cropped.

        The longer side is scaled to 1024 pixels, a cell is 16 of them, and both sides are rounded half up; at least 1.

        Raises:
            ValueError: a side is not positive.
        """
        if min(image_size) < 1:
            raise ValueError(f"an image has a positive height and width, got {image_size}")
        scaled = (int(CELL * LONG_SIDE * side / max(image_size) + 0.5) for side in image_size)
        rows, columns = (max(1, int(pixels / CELL + 0.5)) for pixels in scaled)
        return CHANNELS, rows, columns

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        """The targets of ``images``, uint8 [B, H, W, 3] in RGB.

        Raises:
            ValueError: ``images`` is anything else.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise ValueError(f"images are uint8 [B, H, W, 3] in RGB, got {images.dtype} {images.shape}")
        return [self._output(image) for image in images]

    def _output(self, image: np.ndarray) -> TeacherOutput:
        strength, tree = self.grow(image)
        masks = self.masks(tree)
        return TeacherOutput(self._embedding(tree), masks, paint(masks.stack), self._edges(tree, strength))

    def grow(self, image: np.ndarray, strength: np.ndarray | None = None) -> tuple[np.ndarray, RegionTree]:
        """Boundary strength, float32 [H, W], and the tree of regions of an image, uint8 [H, W, 3] in RGB.

        Args:
            image: whose colour and texture describe the regions.
            strength: of its boundaries, 0 to about 1, from another detector; measured where None.
        """
        cues = measure(image, self.regions)
        if strength is None:
            strength = boundary_strength(cues, self.regions)
        return strength, region_tree(strength, *_region_features(cues), self.regions)

    def masks(self, tree: RegionTree) -> Masks:
        """Regions that stand out, without near duplicates.

        predicted_iou follows from the cost at which a region dissolves, see :meth:`_object_likeness`.
        stability_score is SAM's idea on the tree: the IoU of the regions that stand in the mask's place a little below
        and a little above the middle of its life.
        """
        dissolve = tree.height[tree.parent]
        quality = self._object_likeness(dissolve)
        share = tree.area / tree.labels.size
        fit = (share >= self.min_area) & (share <= self.max_area) & (quality >= self.min_quality)
        fit[-1] = False
        start, place = _intervals(tree)
        end = start + _leaf_counts(tree)
        kept: list[int] = []
        for i in np.flatnonzero(fit)[np.argsort(-quality[fit], kind="stable")]:
            others = np.array(kept, int)
            nested = (start[others] <= start[i]) & (end[i] <= end[others])
            nested |= (start[i] <= start[others]) & (end[others] <= end[i])
            smaller, larger = np.minimum(tree.area[others], tree.area[i]), np.maximum(tree.area[others], tree.area[i])
            if not np.any(nested & (smaller > self.max_iou * larger)):
                kept.append(int(i))
        position = place[tree.labels]
        stack = np.array([(position >= start[i]) & (position < end[i]) for i in kept], bool)
        stack = stack.reshape(-1, *tree.labels.shape)
        table = describe(
            stack, predicted_iou=quality[kept], stability_score=np.array([self._stability(tree, i) for i in kept])
        )
        return sort_masks(stack, table)

    def _object_likeness(self, cost: np.ndarray) -> np.ndarray:
        """c^2 / (c^2 + even_cost^2) of merging costs c: 0 to 1.

        On photographs with human segmentations it follows the IoU of a region that dissolves at cost c with the best of
        the human segments: masks have 0.43 and 0.34 on average, with a correlation of 0.4.
        """
        return cost**2 / (cost**2 + self.even_cost**2)

    def _stability(self, tree: RegionTree, region: int) -> float:
        """IoU of the regions around ``region`` at levels ``level_step`` below and above the middle of its life."""
        middle = (tree.height[region] + tree.height[tree.parent[region]]) / 2
        below = above = region
        while tree.height[below] > middle - self.level_step and below >= tree.leaves:
            children = np.flatnonzero(tree.parent[:below] == below)
            below = children[np.argmax(tree.area[children])]
        while tree.height[tree.parent[above]] <= middle + self.level_step and tree.parent[above] != above:
            above = tree.parent[above]
        return float(tree.area[below] / tree.area[above])

    def _edges(self, tree: RegionTree, strength: np.ndarray) -> np.ndarray:
        """Twice the boundary strength on the lines between regions, which are two pixels wide and softened.

        A line counts as much as the predicted_iou of the regions on its two sides, taken where they become one.
        """
        cost = np.zeros(tree.labels.shape, np.float32)
        for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
            value = _meeting_height(tree, tree.labels[here], tree.labels[there])
            np.maximum(cost[here], value, out=cost[here])
            np.maximum(cost[there], value, out=cost[there])
        lines = cv2.GaussianBlur(self._object_likeness(cost), (5, 5), 0)
        return np.rint(np.minimum(2 * lines * strength, 1) * 255).astype(np.uint8)

    def _embedding(self, tree: RegionTree) -> np.ndarray:
        """Sum, over all regions that a piece belongs to, of a code of the region weighted by how long it lasts.

        Two cells share the codes of every region that holds both, so their cosine grows with how early the merging
        joins them. A code is a random Fourier feature (Rahimi & Recht 2007) of the region's mean colour, texture and
        position, so alike regions have alike codes. Nearly all of the image's mean is taken off, which spreads the
        cosines; what is left keeps a flat image's defined. Every cell has a root mean square of 1.
        """
        _, rows, columns = self.embedding_shape(tree.labels.shape)
        spread = np.repeat(self.scales, [3, tree.features.shape[1] - 5, 2])
        rng = np.random.default_rng(self.seed)
        phase = tree.features @ (spread[:, None] * rng.standard_normal((len(spread), CHANNELS // 2)))
        codes = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
        walk = np.sqrt(self._life(tree))[:, None] * codes
        for region in range(len(walk) - 2, -1, -1):
            walk[region] += walk[tree.parent[region]]
        cells = _cell_shares(tree.labels, tree.leaves, (rows, columns)) @ walk[: tree.leaves]
        cells -= CENTRING * cells.mean(axis=0)
        cells /= np.sqrt(np.mean(cells**2, axis=1, keepdims=True))
        return np.ascontiguousarray(cells.T.reshape(CHANNELS, rows, columns), np.float32)

    def _life(self, tree: RegionTree) -> np.ndarray:
        """How long each region lasts, all merges together taking 1; and the weight of a piece on top.

        A merge takes the time by which it lowers the logarithm of the number of regions, from ``most_regions`` to 1,
        times its cost: merges inside one object are quick, the last ones between objects slow.
        """
        numbers = np.log(np.minimum(np.arange(tree.leaves, 0, -1), self.most_regions))  # at first, after each merge
        clock = np.concatenate([[0.0], np.cumsum(tree.height[tree.leaves :] * -np.diff(numbers))])
        clock /= max(clock[-1], 1e-9)
        born = np.concatenate([np.zeros(tree.leaves, int), np.arange(1, tree.leaves)])
        life = clock[born[tree.parent]] - clock[born]
        life[: tree.leaves] += self.piece_weight
        return life


def _region_features(cues: Cues) -> tuple[np.ndarray, np.ndarray]:
    """What describes a region: Lab (3), texture shares, position in long sides (2), and what each counts in a merge."""
    _, height, width = cues.lab.shape
    colour = cues.lab * np.array([0.01, 0.02, 0.02], np.float32)[:, None, None]
    texture = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in cues.texture]
    position = np.indices((height, width), np.float32) / max(height, width)
    features = np.concatenate([colour, np.stack(texture), position])
    return features, np.repeat([1.0, 0.0], [len(features) - 2, 2])


def _leaf_counts(tree: RegionTree) -> np.ndarray:
    counts = (np.arange(len(tree.parent)) < tree.leaves).astype(int)
    for region in range(len(counts) - 1):
        counts[tree.parent[region]] += counts[region]
    return counts


def _intervals(tree: RegionTree) -> tuple[np.ndarray, np.ndarray]:
    """Leaves in an order that makes every region an interval: first position of each region, and of each leaf."""
    counts = _leaf_counts(tree)
    start = np.zeros(len(counts), int)
    used = np.zeros(len(counts), int)
    for region in range(len(counts) - 2, -1, -1):
        parent = tree.parent[region]
        start[region] = start[parent] + used[parent]
        used[parent] += counts[region]
    return start, start[: tree.leaves]


def _meeting_height(tree: RegionTree, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Height of the smallest region that holds both leaves, elementwise."""
    low, high = np.minimum(first, second).ravel().astype(np.int64), np.maximum(first, second).ravel()
    pairs, index = np.unique(low * tree.leaves + high, return_inverse=True)
    a, b = pairs // tree.leaves, pairs % tree.leaves
    while (apart := a != b).any():  # children come before parents: the lower index steps up
        a, b = np.where(apart & (a < b), tree.parent[a], a), np.where(apart & (b < a), tree.parent[b], b)
    return tree.height[a][index].reshape(first.shape).astype(np.float32)


def _cell_shares(labels: np.ndarray, leaves: int, cells: tuple[int, int]) -> csr_array:
    """Share of each leaf in each cell of a grid over the image, from 4 x 4 samples a cell: float64 [h w, leaves]."""
    (height, width), (rows, columns), samples = labels.shape, cells, 4
    y = ((np.arange(rows * samples) + 0.5) * height / (rows * samples)).astype(int)
    x = ((np.arange(columns * samples) + 0.5) * width / (columns * samples)).astype(int)
    cell = np.arange(rows * columns).reshape(cells).repeat(samples, axis=0).repeat(samples, axis=1)
    place = (cell.ravel(), labels[y[:, None], x].ravel())
    return csr_array((np.full(cell.size, 1 / samples**2), place), shape=(rows * columns, leaves))


def _tuples(value: Any) -> Any:
    """A JSON value as a parameter."""
    return tuple(value) if isinstance(value, list) else value
