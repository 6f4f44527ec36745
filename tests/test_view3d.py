import base64
import json
import re

import cv2
import numpy as np
import pytest

from samfeat.pipelines.evaluation import view3d
from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera
from samfeat.pipelines.evaluation.view3d import MOST_POINTS, SceneView, write_preview, write_view

MATRIX = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])


def camera_at(centre, rotation=None) -> PosedCamera:
    rotation = np.eye(3) if rotation is None else rotation
    return PosedCamera(MATRIX, (480, 640), Pose(rotation, -rotation @ np.array(centre, float)))


def plotted(path) -> tuple[list[dict], dict]:
    """Traces and layout of the page's call of plotly."""
    text = path.read_text()
    decoder, start = json.JSONDecoder(), re.search(r'Plotly\.newPlot\(\s*"[^"]*",\s*', text).end()
    traces, end = decoder.raw_decode(text, start)
    layout, _ = decoder.raw_decode(text, re.compile(r",\s*").match(text, end).end())
    return traces, layout


def numbers(values) -> np.ndarray:
    """An array as plotly stores it."""
    return np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"])).astype(float)


def places(trace: dict) -> np.ndarray:
    """Coordinates in radii of the scene, z up."""
    return np.stack([numbers(trace[axis]) for axis in "xyz"], axis=1) / 32767 * view3d.REACH


def scene(count: int = 200) -> SceneView:
    rng = np.random.default_rng(1)
    points = rng.normal(0, 1, (count, 3)) + (0, 0, 8)
    colors = rng.integers(0, 256, (count, 3), np.uint8)
    cameras = {"estimated": {"a.jpg": camera_at((-1, 0, 0)), "b.jpg": camera_at((1, 0, 0))}}
    return SceneView("A <scene> & its cameras", points, colors, cameras)


def test_the_page_holds_the_points_up_to_a_similarity(tmp_path):
    view = scene()
    traces, _ = plotted(write_view(tmp_path / "view.html", view))
    shown = places(traces[0])
    # Procrustes: after the best similarity the points agree to the step of the numbers stored
    a, b = (values - values.mean(0) for values in (view.points, shown))
    left, strengths, right = np.linalg.svd(a.T @ b)
    assert np.linalg.det(left @ right) == pytest.approx(1)  # no mirror image
    scale = strengths.sum() / (a**2).sum()
    assert np.abs(scale * a @ left @ right - b).max() < 2 * view3d.REACH / 32767
    assert np.corrcoef(shown[:, 2], -view.points[:, 1])[0, 1] > 0.999  # the cameras' down is the page's down


def test_colours_are_those_of_the_points(tmp_path):
    view = scene()
    few = view._replace(colors=np.random.default_rng(0).integers(0, 256, (20, 3), np.uint8)[np.arange(200) % 20])
    marker = plotted(write_view(tmp_path / "view.html", few))[0][0]["marker"]
    scale = [[int(v) for v in re.findall(r"\d+", color)] for _, color in marker["colorscale"]]
    assert [stop for stop, _ in marker["colorscale"]] == pytest.approx(np.arange(256) / 255)
    assert (marker["cmin"], marker["cmax"]) == (0, 255)
    assert (np.array(scale)[numbers(marker["color"]).astype(int)] == few.colors).all()


def test_cameras_are_drawn_from_their_centres_and_tell_their_names(tmp_path):
    view = scene()
    points, outlines, centres = plotted(write_view(tmp_path / "view.html", view))[0]
    corners = places(outlines)
    assert np.isnan(corners).all(1).nonzero()[0].tolist() == [11, 23]  # a gap after every camera
    assert places(centres) == pytest.approx(corners[[0, 12]])
    assert np.linalg.norm(np.diff(places(centres), axis=0)) == pytest.approx(
        2 * np.linalg.norm(np.ptp(places(points), 0)) / np.linalg.norm(np.ptp(view.points, 0)), rel=0.3
    )
    assert centres["customdata"] == ["a.jpg (estimated)", "b.jpg (estimated)"]
    assert (outlines["name"], outlines["legendgroup"]) == ("estimated cameras (2)", centres["legendgroup"])


def test_the_first_look_is_from_behind_the_cameras_at_all_points(tmp_path):
    traces, layout = plotted(write_view(tmp_path / "view.html", scene()))
    eye = np.array([layout["scene"]["camera"]["eye"][axis] for axis in "xyz"])
    low, high = layout["scene"]["xaxis"]["range"]
    assert (layout["scene"]["yaxis"]["range"], layout["scene"]["zaxis"]["range"]) == ([low, high], [low, high])
    eye = eye * (high - low) / 32767 * view3d.REACH
    centre = places(traces[2]).mean(0)
    assert eye @ centre / np.linalg.norm(eye) / np.linalg.norm(centre) > 0.9
    assert np.linalg.norm(eye) > np.linalg.norm(centre)
    assert np.abs(places(traces[0])).max() <= high / 32767 * view3d.REACH


def test_the_page_has_everything_inside_and_a_bounded_size(tmp_path):
    rng = np.random.default_rng(0)
    count = MOST_POINTS + 5000
    many = scene()._replace(points=rng.normal(0, 1, (count, 3)), colors=rng.integers(0, 256, (count, 3), np.uint8))
    path = write_view(tmp_path / "view.html", many)
    text = path.read_text()
    assert path.stat().st_size < 8_000_000
    assert len(places(plotted(path)[0][0])) == pytest.approx(MOST_POINTS, rel=0.01)
    assert not re.search(r"<(script|link|img|iframe)[^>]* (src|href)=", text)
    assert "A &lt;scene&gt; &amp; its cameras" in text


def test_a_name_cannot_end_the_script(tmp_path):
    name = "</script><b>"
    path = write_view(tmp_path / "view.html", scene()._replace(cameras={name: {name: camera_at((0, 0, 0))}}))
    traces, _ = plotted(path)
    assert traces[2]["customdata"] == ["&lt;/script>&lt;b> (&lt;/script>&lt;b>)"]
    assert name not in path.read_text()


def test_points_far_away_do_not_shrink_the_rest(tmp_path):
    view = scene()
    far = view._replace(points=np.vstack([view.points, [[1e6, 0, 0]]]), colors=np.vstack([view.colors, [[1, 2, 3]]]))
    shown = places(plotted(write_view(tmp_path / "view.html", far))[0][0])
    assert len(shown) == len(view.points)
    assert np.quantile(np.linalg.norm(shown, axis=1), 0.8) == pytest.approx(1, abs=0.05)


def test_nothing_or_too_much_to_show_is_refused(tmp_path):
    nothing = SceneView("", np.zeros((0, 3)), np.zeros((0, 3), np.uint8), {"estimated": {}})
    with pytest.raises(ValueError, match="neither a point nor a camera"):
        write_view(tmp_path / "view.html", nothing)
    group = {"a": camera_at((0, 0, 0))}
    with pytest.raises(ValueError, match="at most 3 groups"):
        write_view(tmp_path / "view.html", nothing._replace(cameras=dict.fromkeys("abcd", group)))


def test_the_preview_shows_the_cameras_colours(tmp_path):
    picture = cv2.imread(str(write_preview(tmp_path / "view.png", scene())))
    orange = np.abs(picture.astype(int) - (0x40, 0x9F, 0xFF)).max(2) < 12
    assert orange.sum() > 100
    only_cameras = scene()._replace(points=np.zeros((0, 3)), colors=np.zeros((0, 3), np.uint8))
    assert write_preview(tmp_path / "cameras.png", only_cameras).stat().st_size > 1000
