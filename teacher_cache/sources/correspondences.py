"""Find the points of one view of a scene in another view, from the depth of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

DEPTH_TOLERANCE = 0.05  # relative, as MegaDepth's scenes have no common scale; multi-view stereo errs by a few percent
PIXEL_TOLERANCE = 1.5  # round trip


class CameraModel(Protocol):
    """The intrinsics of a camera, distortion included; (0, 0) is the centre of the top-left pixel."""

    def rays(self, points: np.ndarray) -> np.ndarray:
        """Directions [n, 3] with z = 1 of the pixels ``points`` [n, 2], (x, y); NaN where there is none."""
        ...

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixels [n, 2], (x, y), that see ``points`` [n, 3] of the camera's frame; NaN for those behind it."""
        ...


@dataclass(frozen=True)
class Pinhole:
    """A camera without distortion: K [3, 3], in pixels."""

    K: np.ndarray

    def rays(self, points: np.ndarray) -> np.ndarray:
        """Directions [n, 3], z = 1, of pixels [n, 2]."""
        return (np.linalg.inv(self.K) @ np.vstack([points.T, np.ones(len(points))])).T

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of points [n, 3]; NaN behind the camera."""
        x, y, w = self.K @ points.T
        w = np.where(w > 0, w, np.nan)
        return np.stack([x / w, y / w], axis=1)


def correspondences(
    depth0: np.ndarray,
    depth1: np.ndarray,
    camera0: np.ndarray | CameraModel,
    camera1: np.ndarray | CameraModel,
    T0to1: np.ndarray,
    points0: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in image 1 of points of image 0, and whether they are visible there.

    p1 = K1 T (z0 K0^-1 p0), with the depth z0 interpolated bilinearly. A correspondence is valid where p0 and p1 have
    depth at their four neighbours, the depth of p1 is within ``DEPTH_TOLERANCE`` of the projected one, and the way
    back through the depth of image 1 ends within ``PIXEL_TOLERANCE`` of p0 and ``DEPTH_TOLERANCE`` of its depth.

    Args:
        depth0: [H0, W0], depth along the optical axis; 0 (or not finite) where unknown.
        depth1: [H1, W1], of image 1, in the same unit.
        camera0: of image 0: K [3, 3] in pixels, with (0, 0) the centre of the top-left pixel; or a camera that may have
            distortion.
        camera1: of image 1.
        T0to1: [4, 4], camera 0 to camera 1.
        points0: [n, 2], (x, y) in image 0.

    Returns:
        points1: float64 [n, 2], (x, y) in image 1; NaN where there is no depth, or where it lies behind the camera.
        valid: bool [n].
    """
    camera0, camera1 = (Pinhole(each) if isinstance(each, np.ndarray) else each for each in (camera0, camera1))
    T0to1 = np.asarray(T0to1, np.float64)
    points0 = np.asarray(points0, np.float64)
    z0 = depth_at(depth0, points0)
    points1, z1_projected = _project(points0, z0, camera0, camera1, T0to1)
    z1 = depth_at(depth1, points1)
    back, z0_back = _project(points1, z1, camera1, camera0, np.linalg.inv(T0to1))
    with np.errstate(invalid="ignore"):
        valid = (
            (np.abs(z1_projected - z1) <= DEPTH_TOLERANCE * z1)
            & (np.abs(z0_back - z0) <= DEPTH_TOLERANCE * z0)
            & (np.linalg.norm(back - points0, axis=1) <= PIXEL_TOLERANCE)
        )
    return points1, valid


def depth_at(depth: np.ndarray, points: np.ndarray) -> np.ndarray:
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
    points: np.ndarray, z: np.ndarray, camera_from: CameraModel, camera_to: CameraModel, T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points at depth ``z`` seen by another camera: (x, y) [n, 2] and depth [n]; NaN behind it."""
    seen = (camera_from.rays(points) * z[:, None]) @ T[:3, :3].T + T[:3, 3]
    return camera_to.pixels(seen), np.where(seen[:, 2] > 0, seen[:, 2], np.nan)
