"""A renderer of textured parallelograms with exact geometry: pinhole, no lens, depth by ray-plane intersection.

World and camera axes are x right, y down, z forward. A pixel (x, y) is the ray through its centre, (0, 0) being the
centre of the top-left pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

Mipmap = tuple[np.ndarray, ...]

_NEAR = 0.05  # smallest rendered depth
_ROW = 1024  # look-ups a row


@dataclass(frozen=True)
class Surface:
    """A textured parallelogram in the world.

    Attributes:
        corner: float64 [3], where the centre of the texture's top-left texel lies.
        right: float64 [3], from ``corner`` to the centre of the top-right texel.
        down: float64 [3], from ``corner`` to the centre of the bottom-left texel.
        mipmap: the texture, float32 [h, w, 3] in [0, 1], RGB, and its successive halves.
    """

    corner: np.ndarray
    right: np.ndarray
    down: np.ndarray
    mipmap: Mipmap


class SceneCamera(NamedTuple):
    """A pinhole camera.

    Attributes:
        K: float64 [3, 3], intrinsics in pixels.
        pose: float64 [4, 4], world to camera.
        size: (height, width) of its image.
    """

    K: np.ndarray
    pose: np.ndarray
    size: tuple[int, int]


def mipmap(texture: np.ndarray) -> Mipmap:
    """``texture``, float32 [h, w, 3], followed by its halves down to a few texels."""
    levels = [np.ascontiguousarray(texture, np.float32)]
    while min(levels[-1].shape[:2]) > 8:
        half = cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        levels.append(half.astype(np.float32, copy=False))
    return tuple(levels)


def look_at(eye: np.ndarray, target: np.ndarray, *, roll: float = 0.0) -> np.ndarray:
    """Pose [4, 4] (world to camera) of a camera at ``eye`` that looks at ``target``, rolled by ``roll`` radians."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    side = np.cross([0.0, 1.0, 0.0], forward)
    side /= np.linalg.norm(side)
    level = np.stack([side, np.cross(forward, side), forward])
    turn = np.array([[np.cos(roll), np.sin(roll), 0], [-np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ level
    pose[:3, 3] = -pose[:3, :3] @ eye
    return pose


def surface_map(surface: Surface, camera: SceneCamera) -> np.ndarray:
    """M, float64 [3, 3], with M (x, y, 1) = (a, b, 1) / z: pixel to position on the surface and inverse depth.

    A pixel shows corner + a right + b down, at depth z; the parallelogram is 0 <= a, b <= 1. (From
    z K^-1 p = R (corner + a right + b down) + t, which is linear in z^-1 (a, b, 1).)
    """
    rotation, translation = camera.pose[:3, :3], camera.pose[:3, 3]
    columns = [rotation @ surface.right, rotation @ surface.down, rotation @ surface.corner + translation]
    return np.linalg.inv(camera.K @ np.stack(columns, axis=1))


def render_depth(surfaces: list[Surface], camera: SceneCamera) -> np.ndarray:
    """Depth along the optical axis at every pixel's centre, float64 [H, W]; 0 where no surface is hit."""
    nearest = np.zeros(camera.size)
    for surface in surfaces:
        window = _window(surface, camera, 1)
        y, x = (axis.astype(np.float64) for axis in np.ogrid[window])
        a, b, inverse = _apply(surface_map(surface, camera), x, y)
        hit = _inside(a, b) & (inverse > nearest[window]) & (inverse < 1 / _NEAR)
        np.copyto(nearest[window], inverse, where=hit)
    return np.divide(1.0, nearest, out=np.zeros_like(nearest), where=nearest > 0)


def render_image(
    surfaces: list[Surface], camera: SceneCamera, *, background: np.ndarray, supersample: int = 2
) -> np.ndarray:
    """The picture, float32 [H, W, 3] in [0, 1]: trilinear texture look-up at ``supersample``^2 samples a pixel.

    Args:
        surfaces: what there is to see.
        camera: where from.
        background: float32 [H, W, 3], seen where there is no surface.
        supersample: samples a pixel along each axis.
    """
    height, width = (side * supersample for side in camera.size)
    picture = np.repeat(np.repeat(background, supersample, axis=0), supersample, axis=1).astype(np.float32)
    nearest, a_seen, b_seen = np.zeros((3, height, width), np.float32)  # of the nearest surface so far
    seen = np.full((height, width), -1)  # and its number
    to_pixel = np.diag([1 / supersample, 1 / supersample, 1.0])
    to_pixel[:2, 2] = (1 / supersample - 1) / 2
    for number, surface in enumerate(surfaces):
        window = _window(surface, camera, supersample)
        y, x = (axis.astype(np.float32) for axis in np.ogrid[window])
        a, b, inverse = _apply(surface_map(surface, camera) @ to_pixel, x, y)
        hit = _inside(a, b) & (inverse > nearest[window]) & (inverse < 1 / _NEAR)
        for buffer, values in ((nearest, inverse), (a_seen, a), (b_seen, b), (seen, number)):
            np.copyto(buffer[window], values, where=hit)
    for number, surface in enumerate(surfaces):
        window = _window(surface, camera, supersample)
        mine = seen[window] == number
        if mine.any():
            M = surface_map(surface, camera) @ to_pixel
            a, b, inverse = (buffer[window][mine] for buffer in (a_seen, b_seen, nearest))
            picture[window][mine] = _texture_at(surface.mipmap, a, b, _level(M, a, b, inverse, surface.mipmap))
    return cv2.resize(picture, camera.size[::-1], interpolation=cv2.INTER_AREA)


def _apply(M: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, inverse depth) at pixels x [1, w], y [h, 1]; a and b mean nothing where the inverse is not positive."""
    u, v, inverse = (
        np.asarray(row, x.dtype)[0] * x + np.asarray(row, x.dtype)[1] * y + x.dtype.type(row[2]) for row in M
    )
    safe = np.where(inverse > 0, inverse, 1)
    return u / safe, v / safe, inverse


def _inside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)


def _window(surface: Surface, camera: SceneCamera, supersample: int) -> tuple[slice, slice]:
    """Rows and columns of the supersampled picture that the surface can reach; may be empty."""
    height, width = (side * supersample for side in camera.size)
    corners = surface.corner + np.outer([0, 0, 1, 1], surface.right) + np.outer([0, 1, 0, 1], surface.down)
    seen = corners @ camera.pose[:3, :3].T + camera.pose[:3, 3]
    if (seen[:, 2] <= _NEAR).all():
        return slice(0, 0), slice(0, 0)
    if (seen[:, 2] <= _NEAR).any():
        return slice(0, height), slice(0, width)
    projected = seen @ camera.K.T
    x, y = supersample * (projected[:, :2] / projected[:, 2:]).T
    left, right = np.clip([x.min() - supersample, x.max() + 2 * supersample], 0, width).astype(int)
    top, bottom = np.clip([y.min() - supersample, y.max() + 2 * supersample], 0, height).astype(int)
    return slice(top, bottom), slice(left, right)


def _level(M: np.ndarray, a: np.ndarray, b: np.ndarray, inverse: np.ndarray, levels: Mipmap) -> np.ndarray:
    """Level of the mipmap whose texels are as far apart as neighbouring samples, along the longer way."""
    height, width = levels[0].shape[:2]
    M = M.astype(np.float32)
    along_x, along_y = (
        np.hypot((M[0, k] - a * M[2, k]) * (width - 1), (M[1, k] - b * M[2, k]) * (height - 1)) for k in (0, 1)
    )
    texels = np.maximum(along_x, along_y) / np.where(inverse > 0, inverse, 1)
    return np.log2(np.clip(texels, 1, 2 ** (len(levels) - 1)))


def _texture_at(levels: Mipmap, a: np.ndarray, b: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Colours [n, 3] at positions a, b [n], blended between the two levels nearest to ``level`` [n]."""
    height, width = levels[0].shape[:2]
    colour = np.zeros((*a.shape, 3), np.float32)
    for k in range(int(level.min()), int(np.ceil(level.max())) + 1):
        rows, columns = levels[k].shape[:2]
        share = 1 - np.abs(level - k)
        near = share > 0
        x = (a[near] * (width - 1) + 0.5) * np.float32(columns / width) - 0.5
        y = (b[near] * (height - 1) + 0.5) * np.float32(rows / height) - 0.5
        colour[near] += share[near, None] * _texels(levels[k], x, y)
    return colour


def _texels(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values [n, 3] of ``texture`` at pixels x, y [n], looked up in rows: no side of OpenCV's may be 2^15."""
    maps = np.zeros((2, -(-len(x) // _ROW), _ROW), np.float32)
    for grid, values in zip(maps, (x, y), strict=True):
        grid.reshape(-1)[: len(values)] = values
    found = cv2.remap(texture, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return found.reshape(-1, 3)[: len(x)]
