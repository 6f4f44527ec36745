import json

import numpy as np
import pycolmap
import pytest
from scipy.spatial.transform import Rotation
from synthetic_scenes import camera_around, cameras, write_cameras

from samfeat.pipelines.evaluation.camera_poses import (
    Pose,
    align,
    aligned_errors,
    pose_errors,
    read_cameras,
    relative_pose_errors,
    rotation_angle,
)


def moved(pose: Pose, turn: np.ndarray, scale: float, shift: np.ndarray) -> Pose:
    """The pose in a world whose points are ``scale * turn @ x + shift``."""
    rotation = pose.rotation @ turn.T
    return Pose(rotation, scale * pose.translation - rotation @ shift)


@pytest.mark.parametrize("degrees", [0, 1e-7, 0.01, 1, 90, 179.9, 180])
def test_the_angle_is_that_of_the_rotation_vector(degrees):
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array([0.6, 0, -0.8]))
    base = Rotation.from_euler("xyz", [20, -70, 10], degrees=True)
    angle = rotation_angle((turn * base).as_matrix(), base.as_matrix())
    assert angle == pytest.approx(degrees, rel=1e-6, abs=1e-12)


def test_centres_and_translations_belong_together():
    pose = camera_around(30, 2).pose
    rigid = pycolmap.Rigid3d(pycolmap.Rotation3d(pose.rotation), pose.translation)
    assert pose.centre == pytest.approx(rigid.tgt_origin_in_src())


def test_alignment_undoes_any_similarity():
    truth = [camera.pose for camera in cameras(6).values()]
    turn = Rotation.from_euler("xyz", [50, 20, -130], degrees=True).as_matrix()
    estimated = [moved(pose, turn, 0.37, np.array([4.0, -2, 9])) for pose in truth]
    errors = pose_errors(align(estimated, truth), truth)
    assert errors.centres.max() < 1e-12
    assert errors.rotations.max() < 1e-6
    both = aligned_errors(estimated, truth)
    assert both.centres.max() < 1e-12
    assert both.rotations.max() < 1e-6


def test_alignment_is_the_least_squares_one():
    rng = np.random.default_rng(0)
    truth = [camera.pose for camera in cameras(7).values()]
    estimated = [Pose(pose.rotation, pose.translation + rng.normal(0, 0.3, 3)) for pose in truth]
    best = (pose_errors(align(estimated, truth), truth).centres ** 2).sum()
    for _ in range(200):  # no similarity close by is better
        turn = Rotation.from_rotvec(rng.normal(0, 0.01, 3)).as_matrix()
        scale, shift = 1 + rng.normal(0, 0.01), rng.normal(0, 0.02, 3)
        other = [moved(pose, turn, scale, shift) for pose in align(estimated, truth)]
        assert (pose_errors(other, truth).centres ** 2).sum() >= best


def test_rotations_are_measured_about_their_own_mean():
    truth = [camera.pose for camera in cameras(6).values()]
    turns = Rotation.from_rotvec(np.radians([[1, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 0], [0, 0, 0]]))
    turn = Rotation.from_euler("y", 40, degrees=True).as_matrix()
    estimated = [Pose(p.rotation @ t.as_matrix() @ turn, p.translation) for p, t in zip(truth, turns, strict=True)]
    assert aligned_errors(estimated, truth).rotations == pytest.approx([1, 1, 2, 2, 0, 0], abs=1e-3)


def test_too_few_or_collinear_centres_fix_nothing():
    poses = [camera.pose for camera in cameras(5).values()]
    assert align(poses[:2], poses[:2]) is None
    line = [Pose(np.eye(3), np.array([k, 2.0 * k, 0])) for k in range(4)]
    assert align(line, line) is None
    assert aligned_errors(line, line) is None


def test_relative_errors_need_no_alignment_and_miss_no_camera():
    truth = {name: camera.pose for name, camera in cameras(4).items()}
    turn = Rotation.from_euler("xyz", [5, 6, 7], degrees=True).as_matrix()
    estimated = {name: moved(pose, turn, 3.0, np.array([1.0, 2, 3])) for name, pose in truth.items()}
    assert relative_pose_errors(estimated, truth) == pytest.approx(np.zeros(6), abs=1e-5)
    lost = estimated.pop("0003.png")
    assert np.isinf(relative_pose_errors(estimated, truth)).sum() == 3
    wrong = Rotation.from_rotvec([0, 0, np.radians(4)]).as_matrix()
    estimated["0003.png"] = Pose(wrong @ lost.rotation, wrong @ lost.translation)  # turned about its own centre
    assert relative_pose_errors(estimated, truth)[[2, 4, 5]] == pytest.approx([4, 4, 4], rel=1e-6)


def test_cameras_survive_their_file(tmp_path):
    posed = cameras(3)
    write_cameras(tmp_path, posed)
    for name, camera in read_cameras(tmp_path).items():
        assert camera.size == posed[name].size
        assert np.allclose(camera.matrix, posed[name].matrix)
        assert np.allclose(camera.pose.rotation, posed[name].pose.rotation, atol=1e-12)
        assert np.allclose(camera.pose.translation, posed[name].pose.translation)
    assert read_cameras(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": [[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]}, "skew"),
        ({"R_w2c": [[1, 0, 0], [0, 1, 0], [0, 0, -1]]}, "no rotation"),
        ({"t_w2c": [1, 2]}, "t_w2c"),
        ({"size": None}, "size"),
    ],
)
def test_bad_cameras_are_refused_in_one_line(tmp_path, change, message):
    write_cameras(tmp_path, cameras(1))
    path = tmp_path / "cameras.json"
    values = json.loads(path.read_text())
    values["0000.png"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        read_cameras(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "cameras_2.json").write_text("{}")
    with pytest.raises(ValueError, match="keep one"):
        read_cameras(tmp_path)
