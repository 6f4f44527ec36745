"""A photograph -> boundary strength -> a tree of regions, from the smallest pieces to the whole image.

The recipe of Arbelaez et al. 2011 (contour detection and hierarchical segmentation) without its learned parts:
differences of colour and texture histograms on the two sides of every pixel, a watershed of their strength, and a
greedy merging of the most alike neighbours, whose cost is the height at which a region dissolves into its parent.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

ORIENTATIONS = 8  # of a boundary, over half a turn
TEXTURE_SCALES = (0.8, 1.6)  # pixels at half resolution
TEXTURE_ORIENTATIONS = 4


@dataclass(frozen=True)
class RegionParameters:
    """Parameters of the tree.

    Attributes:
        bins: bins of the histogram of L, a and b each.
        chroma: |a| and |b| from here on fall into the last bin; Lab units.
        flat: gradient, in units of L = 100 a pixel, below which there is no texture.
        radii: distance of the compared sides from the boundary, in pixels: plain colour, then histograms twice.
        smoothing: Gaussian blur of the strength before the watershed, in pixels; decides how small pieces are.
        contrast: weight of the difference of two regions' mean colour and texture next to that of their boundary.
        size_exponent, size_scale: a boundary with a region of A pixels on its smaller side costs
            (A / (A + size_scale x pixels of the image)) ** size_exponent of that, so that specks dissolve early.
    """

    bins: int = 8
    chroma: float = 50.0
    flat: float = 0.02
    radii: tuple[float, float, float] = (2.0, 5.0, 10.0)
    smoothing: float = 1.0
    contrast: float = 0.15
    size_exponent: float = 0.4
    size_scale: float = 0.013


class Cues(NamedTuple):
    """Cues that are compared across a boundary.

    Attributes:
        lab: float32 [3, H, W]; L 0 to 100.
        histogram: float32 [B, H/2, W/2], soft membership of L's, a's and b's bins; each of the three sums to 1.
        texture: float32 [T, H/2, W/2], shares of oriented gradients and of flatness; sums to 1.
    """

    lab: np.ndarray
    histogram: np.ndarray
    texture: np.ndarray


class RegionTree(NamedTuple):
    """Regions of an image; region i is ``labels == i`` for i < leaves, else the union of its two children.

    Attributes:
        labels: int32 [H, W], the leaf of each pixel.
        parent: int64 [N]; children come before parents; the last region is the image, its own parent.
        height: float64 [N], merging cost: 0 for leaves, never above the parent's.
        area: int64 [N], pixels.
        features: float64 [N, F], means over the region.
        leaves: number of leaves; N = 2 leaves - 1.
    """

    labels: np.ndarray
    parent: np.ndarray
    height: np.ndarray
    area: np.ndarray
    features: np.ndarray
    leaves: int


def measure(image: np.ndarray, parameters: RegionParameters) -> Cues:
    """Colour and texture cues of an RGB image, uint8 [H, W, 3]."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    half = cv2.resize(lab, _half(image.shape), interpolation=cv2.INTER_AREA)
    count, chroma = parameters.bins, parameters.chroma
    light, green_red, blue_yellow = np.moveaxis(half, -1, 0)
    histogram = [
        *_soft_bins(light, 0, 100, count),
        *_soft_bins(green_red, -chroma, chroma, count),
        *_soft_bins(blue_yellow, -chroma, chroma, count),
    ]
    texture = _texture(light / 100, parameters.flat)
    return Cues(np.ascontiguousarray(np.moveaxis(lab, -1, 0)), np.stack(histogram), texture)


def boundary_strength(cues: Cues, parameters: RegionParameters) -> np.ndarray:
    """Difference between the two sides of each pixel, in the direction of the largest difference.

    Mean of three scales: clipped Lab distance near by, total variation distance of histograms farther off.

    Returns:
        float32 [H, W], 0 to about 1.
    """
    height, width = cues.lab.shape[1:]
    near, middle, far = parameters.radii
    strength = np.minimum(_across(cues.lab / 25, near), 1)
    channels = np.concatenate([cues.histogram, cues.texture])
    for radius in (middle, far):
        for plane, value in zip(strength, _across(channels, radius / 2)):
            plane += cv2.resize(value, (width, height), interpolation=cv2.INTER_LINEAR)
    return strength.max(axis=0) / 5


def region_tree(
    strength: np.ndarray, features: np.ndarray, weights: np.ndarray, parameters: RegionParameters
) -> RegionTree:
    """Watershed pieces of ``strength``, merged pairwise until one is left.

    Args:
        strength: float32 [H, W].
        features: float32 [F, H, W], averaged over every region.
        weights: float [F]; the weighted L1 distance between the features of two regions adds to the cost of a merge.
        parameters: how.
    """
    from skimage.segmentation import watershed

    smooth = cv2.GaussianBlur(strength, (0, 0), parameters.smoothing)
    basins = watershed(np.rint(smooth * 1e4).astype(np.int32), connectivity=2)  # ignore differences due to rounding
    labels = np.maximum(basins - 1, 0).astype(np.int32)  # a flat image has no basin: one piece
    flat = labels.ravel()
    area = np.bincount(flat)
    means = np.stack([np.bincount(flat, plane.ravel()) / area for plane in features], axis=1)
    scale = parameters.size_scale * labels.size
    weights = parameters.contrast * weights
    pairs, total, length = _neighbours(labels, strength)

    leaves = len(area)
    count = 2 * leaves - 1
    area = np.concatenate([area, np.zeros(leaves - 1, np.int64)])
    means = np.concatenate([means, np.zeros((leaves - 1, means.shape[1]))])
    height, parent = np.zeros(count), np.full(count, count - 1)
    border: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]

    def cost(a: int, b: int) -> float:
        strength_sum, pixels = border[a][b]
        size = min(area[a], area[b])
        difference = strength_sum / pixels + weights @ np.abs(means[a] - means[b])
        return difference * (size / (size + scale)) ** parameters.size_exponent

    for (a, b), weight in zip(pairs.tolist(), zip(total.tolist(), length.tolist())):
        border[a][b] = border[b][a] = weight
    queue = [(cost(a, b), a, b) for a, b in pairs.tolist()]
    heapq.heapify(queue)
    for new in range(leaves, count):
        value, a, b = heapq.heappop(queue)
        while not (border[a] and border[b]):  # one of the two has already been merged
            value, a, b = heapq.heappop(queue)
        height[new] = max(value, height[a], height[b])
        parent[a] = parent[b] = new
        area[new] = area[a] + area[b]
        means[new] = (area[a] * means[a] + area[b] * means[b]) / area[new]
        _join(border, a, b, new)
        for k in border[new]:
            heapq.heappush(queue, (cost(k, new), k, new))
    return RegionTree(labels, parent, height, area, means, leaves)


def _join(border: list[dict[int, tuple[float, float]]], a: int, b: int, new: int) -> None:
    """Transfer the borders of ``a`` and ``b`` to ``new``."""
    del border[a][b], border[b][a]
    for old in (a, b):
        for k, (total, length) in border[old].items():
            del border[k][old]
            total_before, length_before = border[new].get(k, (0.0, 0.0))
            border[new][k] = border[k][new] = (total_before + total, length_before + length)
        border[old] = {}


def _neighbours(labels: np.ndarray, strength: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of touching labels (a < b), int64 [E, 2], the strength summed along their border, and its length."""
    keys, values = [], []
    count = int(labels.max()) + 1
    for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differs = labels[here] != labels[there]
        first, second = labels[here][differs].astype(np.int64), labels[there][differs].astype(np.int64)
        keys.append(np.minimum(first, second) * count + np.maximum(first, second))
        values.append((strength[here][differs] + strength[there][differs]) / 2)
    unique, index = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(index, np.concatenate(values), minlength=len(unique))
    return np.stack([unique // count, unique % count], axis=1), total, np.bincount(index, minlength=len(unique))


def _across(channels: np.ndarray, radius: float) -> np.ndarray:
    """Half the L1 distance of blurred channels on both sides: float32 [C, H, W] -> [ORIENTATIONS, H, W]."""
    height, width = channels.shape[1:]
    pad = int(np.ceil(radius))
    blurred = np.stack([
        cv2.copyMakeBorder(cv2.GaussianBlur(plane, (0, 0), 0.6 * radius), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        for plane in channels
    ])  # fmt: skip
    found = []
    for angle in np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS:
        dx, dy = round(radius * np.cos(angle)), round(radius * np.sin(angle))
        one = blurred[:, pad + dy : pad + dy + height, pad + dx : pad + dx + width]
        other = blurred[:, pad - dy : pad - dy + height, pad - dx : pad - dx + width]
        found.append(np.abs(one - other).sum(axis=0) / 2)
    return np.stack(found)


def _texture(light: np.ndarray, flat: float) -> np.ndarray:
    """Shares of the absolute oriented derivatives at each scale, and of ``flat``, in their sum."""
    shares = [np.full_like(light, flat)]
    for sigma in TEXTURE_SCALES:
        blurred = cv2.GaussianBlur(light, (0, 0), sigma)
        along_x = cv2.Sobel(blurred, cv2.CV_32F, 1, 0, scale=sigma / 8)
        along_y = cv2.Sobel(blurred, cv2.CV_32F, 0, 1, scale=sigma / 8)
        for angle in np.arange(TEXTURE_ORIENTATIONS) * np.pi / TEXTURE_ORIENTATIONS:
            shares.append(np.abs(np.float32(np.cos(angle)) * along_x + np.float32(np.sin(angle)) * along_y))
    return np.stack(shares) / np.sum(shares, axis=0)


def _soft_bins(values: np.ndarray, low: float, high: float, count: int) -> list[np.ndarray]:
    """Linear membership of ``count`` bins from ``low`` to ``high``; values outside belong to the nearest."""
    place = np.clip((values - low) / (high - low), 0, 1) * (count - 1)
    return [np.maximum(0, 1 - np.abs(place - np.float32(k))) for k in range(count)]


def _half(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of half the resolution of an image of ``shape``."""
    return (shape[1] + 1) // 2, (shape[0] + 1) // 2
