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


class Camera(NamedTuple):
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


def surface_map(surface: Surface, camera: Camera) -> np.ndarray:
    """M, float64 [3, 3], with M (x, y, 1) = (a, b, 1) / z: pixel to position on the surface and inverse depth.

    A pixel shows corner + a right + b down, at depth z; the parallelogram is 0 <= a, b <= 1. (From
    z K^-1 p = R (corner + a right + b down) + t, which is linear in z^-1 (a, b, 1).)
    """
    rotation, translation = camera.pose[:3, :3], camera.pose[:3, 3]
    columns = [rotation @ surface.right, rotation @ surface.down, rotation @ surface.corner + translation]
    return np.linalg.inv(camera.K @ np.stack(columns, axis=1))


def render_depth(surfaces: list[Surface], camera: Camera) -> np.ndarray:
    """Depth along the optical axis at every pixel's centre, float64 [H, W]; 0 where no surface is hit."""
    height, width = camera.size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    nearest = np.zeros(camera.size)
    for surface in surfaces:
        a, b, inverse = _apply(surface_map(surface, camera), x, y)
        hit = _inside(a, b) & (inverse > nearest) & (inverse < 1 / _NEAR)
        nearest[hit] = inverse[hit]
    return np.divide(1.0, nearest, out=np.zeros_like(nearest), where=nearest > 0)


def render_image(
    surfaces: list[Surface], camera: Camera, *, background: np.ndarray, supersample: int = 2
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
    nearest = np.zeros((height, width), np.float32)
    to_pixel = np.diag([1 / supersample, 1 / supersample, 1.0])
    to_pixel[:2, 2] = (1 / supersample - 1) / 2
    for surface in surfaces:
        rows, columns = _window(surface, camera, supersample)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        M = surface_map(surface, camera) @ to_pixel
        y, x = np.mgrid[rows, columns].astype(np.float32)
        a, b, inverse = _apply(M, x, y)
        hit = _inside(a, b) & (inverse > nearest[rows, columns]) & (inverse < 1 / _NEAR)
        if hit.any():
            np.copyto(nearest[rows, columns], inverse, where=hit)
            colour = _texture_at(surface.mipmap, a, b, _level(M, a, b, inverse, surface.mipmap), hit)
            np.copyto(picture[rows, columns], colour, where=hit[:, :, None])
    return cv2.resize(picture, camera.size[::-1], interpolation=cv2.INTER_AREA)


def _apply(M: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, inverse depth) at pixels; a and b mean nothing where the inverse depth is not positive."""
    u, v, inverse = (
        np.asarray(row, x.dtype)[0] * x + np.asarray(row, x.dtype)[1] * y + x.dtype.type(row[2]) for row in M
    )
    safe = np.where(inverse > 0, inverse, 1)
    return u / safe, v / safe, inverse


def _inside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)


def _window(surface: Surface, camera: Camera, supersample: int) -> tuple[slice, slice]:
    """Rows and columns of the supersampled picture that the surface can reach."""
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


def _texture_at(levels: Mipmap, a: np.ndarray, b: np.ndarray, level: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Colour at (a, b) where ``hit``, blended between the two nearest levels."""
    height, width = levels[0].shape[:2]
    colour = np.zeros((*a.shape, 3), np.float32)
    for k in range(int(level[hit].min()), int(np.ceil(level[hit].max())) + 1):
        rows, columns = levels[k].shape[:2]
        x = (a * (width - 1) + 0.5) * np.float32(columns / width) - 0.5
        y = (b * (height - 1) + 0.5) * np.float32(rows / height) - 0.5
        texels = cv2.remap(levels[k], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        colour += np.maximum(0, 1 - np.abs(level - k))[:, :, None] * texels
    return colour
