"""Cameras with known poses, and the errors of estimated ones.

A pose takes world to camera: ``x_camera = rotation @ x_world + translation``, z forward, x right, y down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CAMERA_FILES = "cameras*.json"


class Pose(NamedTuple):
    """Pose of a camera.

    Attributes:
        rotation: float64 [3, 3], world to camera.
        translation: float64 [3].
    """

    rotation: np.ndarray
    translation: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """float64 [3]: centre of projection in the world."""
        return -self.rotation.T @ self.translation


class PosedCamera(NamedTuple):
    """A pinhole camera without distortion.

    Attributes:
        matrix: float64 [3, 3], calibration in pixels, (0, 0) being the centre of the top-left pixel; no skew.
        size: (height, width).
        pose: its pose.
    """

    matrix: np.ndarray
    size: tuple[int, int]
    pose: Pose


class PoseErrors(NamedTuple):
    """Errors of estimated cameras.

    Attributes:
        centres: float64 [N], distances between true and estimated centres, in the units of the ground truth.
        rotations: float64 [N], angles in degrees.
    """

    centres: np.ndarray
    rotations: np.ndarray


def read_cameras(folder: str | Path) -> dict[str, PosedCamera] | None:
    """Read the ground-truth cameras, by image name, from the ``cameras*.json`` of a folder; None if there is none.

    The file maps each image name to ``K`` [3, 3], ``R_w2c`` [3, 3], ``t_w2c`` [3] and ``size`` [width, height].

    Raises:
        ValueError: several such files, or other content.
    """
    found = sorted(Path(folder).glob(CAMERA_FILES))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: keep one file of cameras")
    try:
        return {name: _camera(values) for name, values in json.loads(found[0].read_text()).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{found[0]} does not hold cameras ({error}): write K, R_w2c, t_w2c and size (width, height) by image name"
        ) from None


def _camera(values: Mapping[str, Any]) -> PosedCamera:
    matrix, rotation = (np.array(values[key], np.float64).reshape(3, 3) for key in ("K", "R_w2c"))
    translation = np.array(values["t_w2c"], np.float64).reshape(3)
    if abs(matrix[0, 1]) > 1e-6 * matrix[0, 0]:
        raise ValueError(f"skew {matrix[0, 1]}, which must be 0")
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise ValueError("R_w2c is no rotation")
    width, height = (int(side) for side in values["size"])
    return PosedCamera(matrix, (height, width), Pose(_nearest_rotation(rotation), translation))


def _nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The nearest rotation matrix: files hold rounded values that are orthonormal to a few digits only."""
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def rotation_angle(first: np.ndarray, second: np.ndarray) -> float:
    """Angle in degrees between two rotations [3, 3]; accurate for small angles too, unlike the arc cosine."""
    chord = float(np.linalg.norm(np.asarray(first) - np.asarray(second))) / np.sqrt(8)
    return float(np.degrees(2 * np.arcsin(min(chord, 1.0))))


def pose_errors(estimated: Sequence[Pose], truth: Sequence[Pose]) -> PoseErrors:
    """Errors of poses in the coordinate frame of the ground truth."""
    pairs = list(zip(estimated, truth, strict=True))
    return PoseErrors(
        np.array([np.linalg.norm(a.centre - b.centre) for a, b in pairs]),
        np.array([rotation_angle(a.rotation, b.rotation) for a, b in pairs]),
    )


def aligned_errors(estimated: Sequence[Pose], truth: Sequence[Pose]) -> PoseErrors | None:
    """Errors of poses in a frame of their own, such as a reconstruction's; None if :func:`align` fails.

    Centres are measured after :func:`align`. Rotations are measured after the rotation between the frames that best
    fits the rotations themselves (chordal mean): the one that fits the centres is poorly determined if the cameras
    stand nearly on a line.
    """
    from scipy.spatial.transform import Rotation

    aligned = align(estimated, truth)
    if aligned is None:
        return None
    turns = Rotation.from_matrix([b.rotation.T @ a.rotation for a, b in zip(estimated, truth, strict=True)])
    turn = turns.mean().as_matrix()
    angles = [rotation_angle(a.rotation, b.rotation @ turn) for a, b in zip(estimated, truth, strict=True)]
    return PoseErrors(pose_errors(aligned, truth).centres, np.array(angles))


def align(estimated: Sequence[Pose], truth: Sequence[Pose]) -> list[Pose] | None:
    """Estimated poses in the frame of the ground truth, by the least-squares similarity between the centres (Umeyama
    1991).

    All cameras weigh the same, so one wrong camera affects the others. None if the centres determine no similarity
    (fewer than three, or collinear).
    """
    import pycolmap

    if len(estimated) < 3:
        return None
    centres = np.array([pose.centre for pose in estimated])
    spread = np.linalg.svd(centres - centres.mean(0), compute_uv=False)
    similarity = pycolmap.estimate_sim3d(centres, np.array([pose.centre for pose in truth]))
    if similarity is None or spread[1] < 1e-6 * spread[0]:
        return None
    turn, scale, shift = similarity.rotation.matrix(), similarity.scale, similarity.translation
    aligned = []
    for pose in estimated:
        rotation = pose.rotation @ turn.T
        aligned.append(Pose(rotation, -rotation @ (scale * turn @ pose.centre + shift)))
    return aligned


def relative_pose_errors(estimated: Mapping[str, Pose], truth: Mapping[str, Pose]) -> np.ndarray:
    """float64 [N (N - 1) / 2]: relative pose error, in degrees, of every pair of ground-truth cameras.

    The larger of the angles between the relative rotations and between the directions of the relative translations;
    infinite if one of the cameras has no estimate. Needs no alignment.
    """
    errors = []
    for first, second in combinations(truth, 2):
        if first in estimated and second in estimated:
            rotation, direction = _relative(estimated[first], estimated[second])
            true_rotation, true_direction = _relative(truth[first], truth[second])
            chord = float(np.linalg.norm(direction - true_direction)) / 2
            turned = np.degrees(2 * np.arcsin(min(chord, 1.0)))
            errors.append(max(rotation_angle(rotation, true_rotation), turned))
        else:
            errors.append(np.inf)
    return np.array(errors)


def _relative(first: Pose, second: Pose) -> tuple[np.ndarray, np.ndarray]:
    rotation = second.rotation @ first.rotation.T
    translation = second.translation - rotation @ first.translation
    return rotation, translation / max(np.linalg.norm(translation), 1e-300)
