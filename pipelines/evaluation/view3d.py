"""Points and cameras of a reconstruction to look at: a page that turns them in a browser, and a picture.

The page is one file that asks nobody for anything: data, styles and a renderer of 100 lines, which draws on a plain 2-D
canvas with a depth buffer and so needs no graphics card.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samfeat.pipelines.evaluation.camera_poses import PosedCamera
from samfeat.pipelines.files import write_bytes

MOST_POINTS = 200_000  # 9 bytes each, 12 in base64: the page stays below 3 MB
REACH = 6.0  # points further from the middle than this many radii are left out
FRUSTUM = 0.12  # depth of a drawn camera in radii
DARK, LIGHT = "#15181c", "#e8eaed"
LINE_WIDTHS = (2.4, 1.2, 0.6)  # groups that agree are seen one inside the other
GROUP_COLORS = ("#ff9f40", "#58d68d", "#5dade2")


class View(NamedTuple):
    """What is shown.

    Attributes:
        title: one line.
        points: float [N, 3] in the world.
        colors: uint8 [N, 3], RGB.
        cameras: by label of a group (such as ``estimated``, at most three groups), cameras by image name.
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


def write_view(path: str | Path, view: View) -> Path:
    """Writes the page, below 3 MB: more than ``MOST_POINTS`` points are thinned at random.

    Raises:
        ValueError: more than three groups of cameras, or neither a point nor a camera.
    """
    stage = _stage(view)
    chosen = np.arange(len(stage.points))
    if len(chosen) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MOST_POINTS, replace=False))
    quantised = np.round(stage.points[chosen] / REACH * 32767).astype("<i2")
    groups = [
        {
            "label": label,
            "color": color,
            "width": width,
            "names": list(cameras),
            "lines": _base64(np.array([*cameras.values()], "<f4")),
        }
        for (label, cameras), color, width in zip(stage.frusta.items(), GROUP_COLORS, LINE_WIDTHS)
    ]
    data = {
        "reach": REACH,
        "points": _base64(quantised),
        "colors": _base64(stage.colors[chosen]),
        "groups": groups,
        **_first_look(stage),
    }
    text = json.dumps(data).replace("<", "\\u003c")
    page = _PAGE.replace("@TITLE@", html.escape(view.title)).replace("@DATA@", text)
    return write_bytes(path, page.encode())


def write_preview(path: str | Path, view: View) -> Path:
    """Writes a PNG: the points from where the cameras are, and from above, with the cameras.

    Raises:
        ValueError: as :func:`write_view`.
    """
    from matplotlib.figure import Figure

    stage = _stage(view)
    turn = np.arctan2(stage.eye[0], stage.eye[2])
    right, towards = np.array([np.cos(turn), 0, -np.sin(turn)]), np.array([np.sin(turn), 0, np.cos(turn)])
    top = np.array([0.0, 1, 0])
    corners = np.concatenate([np.zeros((0, 3)), *(c for group in stage.frusta.values() for c in group.values())])
    figure = Figure(figsize=(13, 6), layout="constrained", facecolor=DARK)
    figure.suptitle(view.title, color=LIGHT)
    sheets = {"from the cameras": (right, top, towards), "from above": (right, -towards, top)}
    for axes, (title, (across, up, depth)) in zip(figure.subplots(1, 2), sheets.items()):
        order = np.argsort(stage.points @ depth)  # the nearest are drawn last
        x, y = stage.points[order] @ across, stage.points[order] @ up
        axes.scatter(x, y, c=stage.colors[order] / 255, s=4 if len(x) < 20_000 else 1, linewidths=0)
        for (label, cameras), color, width in zip(stage.frusta.items(), GROUP_COLORS, LINE_WIDTHS):
            for number, frustum in enumerate(cameras.values()):
                line = frustum[[0, 1, 2, 0, 3, 4, 0, 1, 4, 3, 2]]
                axes.plot(line @ across, line @ up, color=color, linewidth=width, label=label if number == 0 else None)
        axes.set(aspect="equal", xlim=_span(x, corners @ across), ylim=_span(y, corners @ up))
        axes.set_title(title, color=LIGHT)
        axes.set_axis_off()
    if stage.frusta:
        figure.axes[1].legend(loc="upper right", facecolor=DARK, labelcolor=LIGHT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write_bytes(path, buffer.getvalue())


def _first_look(stage: _Stage) -> dict[str, float]:
    """Behind the cameras and a little above them; angles in radians."""
    far = [float(np.linalg.norm(corners[0])) for group in stage.frusta.values() for corners in group.values()]
    pitch = np.arctan2(stage.eye[1], np.hypot(stage.eye[0], stage.eye[2])) + 0.25
    return {
        "yaw": float(np.arctan2(stage.eye[0], stage.eye[2])),
        "pitch": float(np.clip(pitch, -1.2, 1.2)),
        "distance": float(np.clip(1.4 * np.quantile(far, 0.9) if far else 0.0, 2.8, 12.0)),
    }


def _span(points: np.ndarray, corners: np.ndarray) -> tuple[float, float]:
    """From the first to the last, without the outermost points, with a margin."""
    ends = np.concatenate([np.quantile(points, (0.05, 0.95)) if len(points) else [], corners])
    margin = 0.08 * max(np.ptp(ends), 1e-9)
    return float(ends.min() - margin), float(ends.max() + margin)


def _stage(view: View) -> _Stage:
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
    """float64 [3, 3], a rotation whose second row is up: against the mean of what the cameras hold for down."""
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


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
html, body { margin: 0; height: 100%; overflow: hidden; background: #15181c; color: #e8eaed }
body { font: 15px/1.4 system-ui, sans-serif }
canvas { position: fixed; inset: 0; width: 100%; height: 100%; touch-action: none; cursor: grab; outline: none }
canvas:active { cursor: grabbing }
header, footer { position: fixed; left: 0; padding: 12px 16px; pointer-events: none; text-shadow: 0 1px 3px #000 }
header { top: 0 } footer { bottom: 0; color: #9aa0a6; font-size: 13px }
h1 { margin: 0 0 4px; font-size: 16px; font-weight: 600 }
label { pointer-events: auto; margin-right: 14px; cursor: pointer; white-space: nowrap }
</style>
<canvas id="canvas" tabindex="0" aria-label="Points and cameras; drag to turn"></canvas>
<header><h1>@TITLE@</h1><div id="groups"></div></header>
<footer>drag or arrow keys: turn &middot; shift-drag or two fingers: move &middot; wheel, pinch, + and -: zoom
&middot; double click: back to the start</footer>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const quantised = new Int16Array(bytes(data.points)), colors = new Uint8Array(bytes(data.colors));
const count = quantised.length / 3, points = Float32Array.from(quantised, v => v / 32767 * data.reach);
const groups = data.groups.map(g => ({ ...g, lines: new Float32Array(bytes(g.lines)), on: true }));
const canvas = document.getElementById("canvas"), context = canvas.getContext("2d");
const EDGES = [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]];
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const start = () => ({ yaw: data.yaw, pitch: data.pitch, distance: data.distance, target: [0, 0, 0] });
let view = start(), image, pixels, depths, waiting = false, touched = false, hovered = null;

function axes() {  // right, up and backward of the viewer, in the world
  const cy = Math.cos(view.yaw), sy = Math.sin(view.yaw), cp = Math.cos(view.pitch), sp = Math.sin(view.pitch);
  return [[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]];
}

function resize() {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  image = context.createImageData(canvas.width, canvas.height);
  pixels = new Uint32Array(image.data.buffer);
  depths = new Float32Array(pixels.length);
  redraw();
}

function projector() {  // world to [column, row, distance along the line of sight]
  const [r, u, b] = axes(), [tx, ty, tz] = view.target;
  const focal = 1.1 * Math.min(canvas.width, canvas.height), cx = canvas.width / 2, cy = canvas.height / 2;
  return (x, y, z, out) => {
    x -= tx; y -= ty; z -= tz;
    const depth = view.distance - (b[0] * x + b[1] * y + b[2] * z);
    out[2] = depth;
    out[0] = cx + focal * (r[0] * x + r[1] * y + r[2] * z) / depth;
    out[1] = cy - focal * (u[0] * x + u[1] * y + u[2] * z) / depth;
  };
}

function draw() {
  waiting = false;
  const width = canvas.width, height = canvas.height, project = projector(), out = [0, 0, 0];
  pixels.fill(0xff1c1815);  // ABGR
  depths.fill(Infinity);
  const grain = Math.min(width, height) / 420 * Math.sqrt(clamp(30000 / (count + 1), 0.5, 4));
  for (let i = 0, j = 0; i < count; i++, j += 3) {
    project(points[j], points[j + 1], points[j + 2], out);
    const depth = out[2];
    if (!(depth > 0.02)) continue;
    const size = clamp(Math.round(grain * 5 / depth), 1, 9);
    const left = Math.round(out[0] - size / 2), top = Math.round(out[1] - size / 2);
    if (left + size <= 0 || top + size <= 0 || left >= width || top >= height) continue;
    const color = 0xff000000 | colors[j + 2] << 16 | colors[j + 1] << 8 | colors[j];
    for (let y = Math.max(0, top); y < Math.min(height, top + size); y++)
      for (let x = Math.max(0, left); x < Math.min(width, left + size); x++) {
        const k = y * width + x;
        if (depth < depths[k]) { depths[k] = depth; pixels[k] = color; }
      }
  }
  context.putImageData(image, 0, 0);
  for (const group of groups) if (group.on) drawCameras(group, project);
  if (hovered) {
    context.font = Math.round(height / 60 + 8) + "px system-ui, sans-serif";
    context.fillStyle = "#fff";
    context.fillText(hovered.name, hovered.x + 10, hovered.y - 8);
  }
}

function drawCameras(group, project) {
  context.strokeStyle = group.color;
  context.lineWidth = Math.max(1, canvas.height / 600) * group.width;
  context.beginPath();
  for (let c = 0; c < group.names.length; c++) {
    const corners = [];
    for (let k = 0; k < 5; k++) {
      const at = (c * 5 + k) * 3, out = [0, 0, 0];
      project(group.lines[at], group.lines[at + 1], group.lines[at + 2], out);
      corners.push(out);
    }
    if (corners.some(p => !(p[2] > 0.02))) continue;
    for (const [a, b] of EDGES) {
      context.moveTo(corners[a][0], corners[a][1]);
      context.lineTo(corners[b][0], corners[b][1]);
    }
  }
  context.stroke();
}

function redraw() { if (!waiting) { waiting = true; requestAnimationFrame(draw); } }
function zoom(factor) { view.distance = clamp(view.distance * factor, 0.05, 40); redraw(); }
function turn(dx, dy) { view.yaw -= dx; view.pitch = clamp(view.pitch + dy, -1.55, 1.55); redraw(); }
function move(dx, dy) {
  const [r, u] = axes(), scale = view.distance / (1.1 * Math.min(canvas.clientWidth, canvas.clientHeight));
  for (let k = 0; k < 3; k++) view.target[k] += scale * (dy * u[k] - dx * r[k]);
  redraw();
}

const fingers = new Map();
canvas.addEventListener("pointerdown", e => {
  touched = true;
  canvas.setPointerCapture(e.pointerId);
  fingers.set(e.pointerId, [e.clientX, e.clientY]);
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, e => fingers.delete(e.pointerId));
canvas.addEventListener("pointermove", e => {
  const before = fingers.get(e.pointerId);
  if (!before) return hover(e);
  const dx = e.clientX - before[0], dy = e.clientY - before[1];
  if (fingers.size === 2) {
    const other = [...fingers].find(([id]) => id !== e.pointerId)[1];
    const gap = p => Math.hypot(p[0] - other[0], p[1] - other[1]) + 1;
    zoom(gap(before) / gap([e.clientX, e.clientY]));
    move(dx / 2, dy / 2);
  } else if (e.shiftKey || e.buttons & 6) move(dx, dy);
  else turn(dx * 0.006, dy * 0.006);
  fingers.set(e.pointerId, [e.clientX, e.clientY]);
});
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  touched = true;
  zoom(Math.exp(e.deltaY * 0.001));
}, { passive: false });
canvas.addEventListener("dblclick", () => { view = start(); redraw(); });
canvas.addEventListener("contextmenu", e => e.preventDefault());
canvas.addEventListener("keydown", e => {
  const key = { ArrowLeft: () => turn(0.1, 0), ArrowRight: () => turn(-0.1, 0), ArrowUp: () => turn(0, 0.1),
    ArrowDown: () => turn(0, -0.1), "+": () => zoom(0.9), "-": () => zoom(1.1) }[e.key];
  if (key) { touched = true; e.preventDefault(); key(); }
});

function hover(e) {  // the name of the camera below the pointer
  const project = projector(), ratio = canvas.width / canvas.clientWidth, out = [0, 0, 0];
  let best = 14 * ratio, found = null;
  for (const group of groups) if (group.on) group.names.forEach((name, c) => {
    project(group.lines[c * 15], group.lines[c * 15 + 1], group.lines[c * 15 + 2], out);
    const away = Math.hypot(out[0] - e.clientX * ratio, out[1] - e.clientY * ratio);
    if (!(out[2] > 0.02 && away < best)) return;
    best = away;
    found = { name: name + " (" + group.label + ")", x: out[0], y: out[1] };
  });
  if (found || hovered) { hovered = found; redraw(); }
}

for (const group of groups) {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.checked = true; box.onchange = () => { group.on = box.checked; redraw(); };
  label.style.color = group.color;
  label.append(box, " " + group.label + " cameras (" + group.names.length + ")");
  document.getElementById("groups").append(label);
}
new ResizeObserver(resize).observe(canvas);
resize();
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) (function spin() {
  if (touched) return;
  view.yaw += 0.0025; redraw();
  requestAnimationFrame(spin);
})();
</script>
</html>
"""
