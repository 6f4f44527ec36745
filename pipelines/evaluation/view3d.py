"""Views of a reconstruction's points and cameras: an interactive page and a picture.

The page is self-contained; plotly.js makes up most of its 5 to 7 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from samfeat.files import write_bytes
from samfeat.pipelines.evaluation.camera_poses import PosedCamera
from samfeat.pipelines.pictures.charts import png
from samfeat.pipelines.pictures.pages import render

if TYPE_CHECKING:
    from plotly.graph_objects import Scatter3d

MOST_POINTS = 200_000  # 7 bytes each, 10 in base64
REACH = 6.0  # points farther from the centre than this many radii are dropped
FRUSTUM = 0.12  # depth of a drawn camera in radii
DARK, LIGHT = "#15181c", "#e8eaed"
LINE_WIDTHS = (2.4, 1.2, 0.6)  # groups that agree are seen one inside the other
GROUP_COLORS = ("#ff9f40", "#58d68d", "#5dade2")
OUTLINE = [0, 1, 2, 0, 3, 4, 0, 1, 4, 3, 2]  # of a camera, through its centre and the corners of its image
STEPS = 32_767 / REACH  # coordinates are stored as whole numbers of these per radius


class SceneView(NamedTuple):
    """What is shown.

    Attributes:
        title: one line.
        points: float [N, 3] in the world.
        colors: uint8 [N, 3], RGB.
        cameras: cameras by image name, for each labelled group (at most three, such as ``estimated``).
    """

    title: str
    points: np.ndarray
    colors: np.ndarray
    cameras: Mapping[str, Mapping[str, PosedCamera]]


class _Stage(NamedTuple):
    """A view moved to the origin, upright and scaled to a radius of about 1; x right, y up, z towards the viewer."""

    points: np.ndarray
    colors: np.ndarray
    frusta: dict[str, dict[str, np.ndarray]]  # float [5, 3]: centre and the corners of the image
    eye: np.ndarray  # mean direction of the cameras from the origin


def write_view(path: str | Path, view: SceneView) -> Path:
    """Write the page; more than ``MOST_POINTS`` points are subsampled at random.

    Raises:
        ValueError: more than three groups of cameras, or neither a point nor a camera.
    """
    from plotly.graph_objects import Figure

    stage = _stage(view)
    chosen = np.arange(len(stage.points))
    if len(chosen) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MOST_POINTS, replace=False))
    figure = Figure()
    if len(chosen):
        figure.add_trace(_points(stage.points[chosen], stage.colors[chosen]))
    for (label, cameras), color, width in zip(stage.frusta.items(), GROUP_COLORS, LINE_WIDTHS):
        figure.add_traces(_cameras(label, cameras, color, width))
    reach = max([1.0, *(float(np.abs(part).max()) for part in (stage.points, *_corners(stage)) if part.size)])
    axis = {"visible": False, "range": [-reach * STEPS, reach * STEPS]}
    figure.update_layout(
        paper_bgcolor=DARK,
        font={"color": LIGHT, "size": 13},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        legend={"x": 0, "y": 1, "bgcolor": "rgba(0,0,0,0)", "itemsizing": "constant"},
        scene={
            "xaxis": axis,
            "yaxis": axis,
            "zaxis": axis,
            "aspectmode": "cube",
            "dragmode": "turntable",
            "camera": {"eye": _eye(stage, reach)},
        },
    )
    plot = figure.to_html(
        full_html=False, include_plotlyjs=True, default_height="100%", config={"displaylogo": False, "scrollZoom": True}
    )
    return write_bytes(path, render("model", title=view.title, plot=Markup(plot)))


def _points(points: np.ndarray, colors: np.ndarray) -> Scatter3d:
    """A point cloud with a palette of 256 colours, much smaller and faster to draw than one colour per point."""
    from plotly.graph_objects import Scatter3d

    reduced = Image.fromarray(colors[None]).quantize(256)
    palette = np.zeros((256, 3), int)
    used = np.array(reduced.getpalette()).reshape(-1, 3)
    palette[: len(used)] = used
    marker: dict[str, Any] = {
        "size": 3 if len(points) < 20_000 else 1.5,
        "color": np.asarray(reduced)[0],
        "cmin": 0,
        "cmax": 255,
        "colorscale": [[number / 255, f"rgb({r},{g},{b})"] for number, (r, g, b) in enumerate(palette.tolist())],
    }
    return Scatter3d(
        **_coordinates(points), mode="markers", marker=marker, hoverinfo="skip", name=f"points ({len(points)})"
    )


def _cameras(label: str, cameras: Mapping[str, np.ndarray], color: str, width: float) -> list[Scatter3d]:
    """Outlines of cameras, and their centres, which show their names on hover."""
    from plotly.graph_objects import Scatter3d

    gap = np.full((1, 3), np.nan)
    outline = np.concatenate([part for frustum in cameras.values() for part in (frustum[OUTLINE], gap)])
    centres = np.array([frustum[0] for frustum in cameras.values()])
    shared: dict[str, Any] = {"name": f"{label} cameras ({len(cameras)})", "legendgroup": label}
    return [
        Scatter3d(
            **_coordinates(outline), mode="lines", line={"color": color, "width": 2 * width}, hoverinfo="skip", **shared
        ),
        Scatter3d(
            **_coordinates(centres),
            mode="markers",
            marker={"color": color, "size": 2 * width + 1},
            customdata=[f"{name} ({label})".replace("<", "&lt;") for name in cameras],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
            **shared,
        ),
    ]


def _coordinates(points: np.ndarray) -> dict[str, np.ndarray]:
    """As plotly has them, z up: whole numbers, which take half the room, unless some are missing."""
    x, y, z = (np.round(points * STEPS)).T
    kind = np.float32 if np.isnan(points).any() else np.int16
    return {"x": x.astype(kind), "y": (-z).astype(kind), "z": y.astype(kind)}


def _corners(stage: _Stage) -> list[np.ndarray]:
    return [frustum for group in stage.frusta.values() for frustum in group.values()]


def _eye(stage: _Stage, reach: float) -> dict[str, float]:
    """Behind the cameras and a little above them, in edges of the cube that is shown."""
    far = [float(np.linalg.norm(frustum[0])) for frustum in _corners(stage)]
    distance = float(np.clip(2.2 * np.quantile(far, 0.9) if far else 0.0, 3.5, 16.0)) / (2 * reach)
    yaw = np.arctan2(stage.eye[0], stage.eye[2])
    pitch = np.clip(np.arctan2(stage.eye[1], np.hypot(stage.eye[0], stage.eye[2])) + 0.25, -1.2, 1.2)
    return {
        "x": float(distance * np.sin(yaw) * np.cos(pitch)),
        "y": float(-distance * np.cos(yaw) * np.cos(pitch)),
        "z": float(distance * np.sin(pitch)),
    }


def write_preview(path: str | Path, view: SceneView) -> Path:
    """Write a PNG of points and cameras, seen from the cameras and from above.

    Raises:
        ValueError: as :func:`write_view`.
    """
    from matplotlib.figure import Figure

    stage = _stage(view)
    turn = np.arctan2(stage.eye[0], stage.eye[2])
    right, towards = np.array([np.cos(turn), 0, -np.sin(turn)]), np.array([np.sin(turn), 0, np.cos(turn)])
    top = np.array([0.0, 1, 0])
    corners = np.concatenate([np.zeros((0, 3)), *_corners(stage)])
    figure = Figure(figsize=(13, 6), layout="constrained", facecolor=DARK)
    figure.suptitle(view.title, color=LIGHT)
    sheets = {"from the cameras": (right, top, towards), "from above": (right, -towards, top)}
    for axes, (title, (across, up, depth)) in zip(figure.subplots(1, 2), sheets.items()):
        order = np.argsort(stage.points @ depth)  # nearest points are drawn last
        x, y = stage.points[order] @ across, stage.points[order] @ up
        axes.scatter(x, y, c=stage.colors[order] / 255, s=4 if len(x) < 20_000 else 1, linewidths=0)
        for (label, cameras), color, width in zip(stage.frusta.items(), GROUP_COLORS, LINE_WIDTHS):
            for number, frustum in enumerate(cameras.values()):
                line = frustum[OUTLINE]
                axes.plot(line @ across, line @ up, color=color, linewidth=width, label=label if number == 0 else None)
        axes.set(aspect="equal", xlim=_span(x, corners @ across), ylim=_span(y, corners @ up))
        axes.set_title(title, color=LIGHT)
        axes.set_axis_off()
    if stage.frusta:
        figure.axes[1].legend(loc="upper right", facecolor=DARK, labelcolor=LIGHT)
    return write_bytes(path, png(figure))


def _span(points: np.ndarray, corners: np.ndarray) -> tuple[float, float]:
    """From the first to the last, without the outermost points, with a margin."""
    ends = np.concatenate([np.quantile(points, (0.05, 0.95)) if len(points) else [], corners])
    margin = 0.08 * max(np.ptp(ends), 1e-9)
    return float(ends.min() - margin), float(ends.max() + margin)


def _stage(view: SceneView) -> _Stage:
    cameras = [camera for group in view.cameras.values() for camera in group.values()]
    if len(view.cameras) > len(GROUP_COLORS):
        raise ValueError(f"a view shows at most {len(GROUP_COLORS)} groups of cameras, got {len(view.cameras)}")
    points = np.asarray(view.points, np.float64).reshape(-1, 3)
    centres = np.array([camera.pose.centre for camera in cameras]).reshape(-1, 3)
    if not len(points) and not len(centres):
        raise ValueError("there is neither a point nor a camera to show")
    body = points if len(points) else centres
    middle = np.median(body, 0)
    radius = max(float(np.quantile(np.linalg.norm(body - middle, axis=1), 0.8)), 1e-12)
    axes = _upright(cameras)
    moved, eyes = ((values - middle) @ axes.T / radius for values in (points, centres))
    near = (np.abs(moved) <= REACH).all(1)
    frusta = {
        label: {name: (_frustum(c, FRUSTUM * radius) - middle) @ axes.T / radius for name, c in group.items()}
        for label, group in view.cameras.items()
        if group
    }
    eye = eyes.mean(0) if len(eyes) else np.array([0.0, 0, 1])
    return _Stage(moved[near], np.asarray(view.colors, np.uint8).reshape(-1, 3)[near], frusta, eye)


def _upright(cameras: list[PosedCamera]) -> np.ndarray:
    """float64 [3, 3], a rotation whose second row is up: opposite to the mean down direction of the cameras."""
    down = np.sum([camera.pose.rotation[1] for camera in cameras], axis=0) if cameras else np.array([0.0, 1, 0])
    up = -down / max(np.linalg.norm(down), 1e-12)
    side = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    side /= max(np.linalg.norm(side), 1e-12)
    return np.array([side, up, np.cross(side, up)])


def _frustum(camera: PosedCamera, depth: float) -> np.ndarray:
    """float64 [5, 3]: centre of projection and the corners of the image at a depth, around the image."""
    height, width = camera.size
    pixels = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5
    rays = np.column_stack([pixels, np.ones(4)]) @ np.linalg.inv(camera.matrix).T * depth
    rotation, translation = camera.pose
    return (np.vstack([np.zeros(3), rays]) - translation) @ rotation
