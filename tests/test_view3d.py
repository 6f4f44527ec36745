import base64
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from samfeat.pipelines.evaluation import view3d
from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera
from samfeat.pipelines.evaluation.view3d import MOST_POINTS, View, write_preview, write_view

MATRIX = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])
BROWSER = """
const fs = require("fs"), page = fs.readFileSync(process.argv[1], "utf8"), queue = [], events = {}, lines = [];
const script = page.match(/<script>([^]*?)<\\/script>/)[1];
const text = page.match(/<script id="data"[^>]*>([^]*?)<\\/script>/)[1];
let frame;
const context = { createImageData: (w, h) => ({ data: new Uint8ClampedArray(w * h * 4) }), beginPath() {}, stroke() {},
  putImageData: image => { frame = image; lines.length = 0; }, moveTo(x, y) { lines.push([x, y]); }, lineTo() {} };
const canvas = { clientWidth: 400, clientHeight: 300, getContext: () => context,
  addEventListener(name, f) { events[name] = f; } };
global.document = { createElement: () => ({ style: {}, append() {} }),
  getElementById: id => ({ canvas, data: { textContent: text } })[id] || { append() {} } };
Object.assign(global, { window: {}, matchMedia: () => ({ matches: true }), requestAnimationFrame: f => queue.push(f) });
global.ResizeObserver = class { observe() {} };
new Function(script)();
for (const key of JSON.parse(process.argv[2])) events.keydown({ key, preventDefault() {} });
while (queue.length) queue.shift()();
process.stdout.write(JSON.stringify([Buffer.from(frame.data).toString("base64"), lines]));
"""


def camera_at(centre, rotation=None) -> PosedCamera:
    rotation = np.eye(3) if rotation is None else rotation
    return PosedCamera(MATRIX, (480, 640), Pose(rotation, -rotation @ np.array(centre, float)))


def data_of(path) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)[1])


def stored_points(data: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data["points"]), "<i2").reshape(-1, 3) / 32767 * data["reach"]


def scene(count: int = 200) -> View:
    rng = np.random.default_rng(1)
    points = rng.normal(0, 1, (count, 3)) + (0, 0, 8)
    colors = rng.integers(0, 256, (count, 3), np.uint8)
    cameras = {"estimated": {"a.jpg": camera_at((-1, 0, 0)), "b.jpg": camera_at((1, 0, 0))}}
    return View("A <scene> & its cameras", points, colors, cameras)


def test_the_page_holds_the_points_up_to_a_similarity(tmp_path):
    view = scene()
    path = write_view(tmp_path / "view.html", view)
    shown = stored_points(data_of(path))
    # Procrustes: after the best similarity the points agree to the step of the numbers stored
    a, b = (values - values.mean(0) for values in (view.points, shown))
    left, strengths, right = np.linalg.svd(a.T @ b)
    assert np.linalg.det(left @ right) == pytest.approx(1)  # no mirror image
    scale = strengths.sum() / (a**2).sum()
    assert np.abs(scale * a @ left @ right - b).max() < 2 * view3d.REACH / 32767
    assert np.corrcoef(shown[:, 1], -view.points[:, 1])[0, 1] > 0.999  # the cameras' down is the page's down
    colors = np.frombuffer(base64.b64decode(data_of(path)["colors"]), np.uint8).reshape(-1, 3)
    assert (colors == view.colors).all()


def test_the_page_asks_nobody_and_is_small(tmp_path):
    rng = np.random.default_rng(0)
    count = MOST_POINTS + 5000
    many = scene()._replace(points=rng.normal(0, 1, (count, 3)), colors=rng.integers(0, 256, (count, 3), np.uint8))
    path = write_view(tmp_path / "view.html", many)
    text = path.read_text()
    assert path.stat().st_size < 3_000_000
    assert len(stored_points(data_of(path))) == pytest.approx(MOST_POINTS, rel=0.01)
    assert not re.search(r"https?:|src=|href=|import |fetch\(|url\(", re.sub(r'"(points|colors)": "[^"]*"', "", text))
    assert "A &lt;scene&gt; &amp; its cameras" in text


def test_a_name_cannot_end_the_script(tmp_path):
    view = scene()._replace(cameras={"estimated": {"</script><b>": camera_at((0, 0, 0))}})
    path = write_view(tmp_path / "view.html", view)
    assert data_of(path)["groups"][0]["names"] == ["</script><b>"]


def test_points_far_away_do_not_shrink_the_rest(tmp_path):
    view = scene()
    far = view._replace(points=np.vstack([view.points, [[1e6, 0, 0]]]), colors=np.vstack([view.colors, [[1, 2, 3]]]))
    shown = stored_points(data_of(write_view(tmp_path / "view.html", far)))
    assert len(shown) == len(view.points)
    assert np.quantile(np.linalg.norm(shown, axis=1), 0.8) == pytest.approx(1, abs=0.05)


def test_nothing_or_too_much_to_show_is_refused(tmp_path):
    nothing = View("", np.zeros((0, 3)), np.zeros((0, 3), np.uint8), {"estimated": {}})
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


def look(path, keys=()) -> tuple[np.ndarray, np.ndarray]:
    """The frame that the page draws after some keys, uint8 [300, 400, 3], and the first ends of its lines."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script, is not installed")
    done = subprocess.run([node, "-e", BROWSER, path, json.dumps(keys)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    frame, lines = json.loads(done.stdout)
    return np.frombuffer(base64.b64decode(frame), np.uint8).reshape(300, 400, 4)[..., :3], np.array(lines)


def projected(points: np.ndarray, yaw: float, pitch: float, distance: float) -> np.ndarray:
    """Where OpenCV puts points of the page for a viewer who has turned right by ``yaw`` and up by ``pitch``."""
    around = cv2.Rodrigues(np.array([0.0, -yaw, 0]))[0]
    over = cv2.Rodrigues(np.array([pitch, 0.0, 0]))[0]
    turned = np.diag([1.0, -1, -1]) @ over @ around  # y down and z forward, as OpenCV looks
    lens = np.array([[330.0, 0, 200], [0, 330, 150], [0, 0, 1]])
    return cv2.projectPoints(points, cv2.Rodrigues(turned)[0], np.array([0, 0, distance]), lens, None)[0][:, 0]


@pytest.mark.parametrize(("keys", "yaw", "pitch"), [([], 0, 0), (["ArrowLeft"] * 3 + ["ArrowUp"] * 2, -0.3, 0.2)])
def test_the_page_draws_what_a_pinhole_camera_sees(tmp_path, keys, yaw, pitch):
    view = scene(40)
    path = write_view(tmp_path / "view.html", view)
    data, (frame, lines) = data_of(path), look(path, keys)
    points = stored_points(data)
    yaw, pitch = data["yaw"] + yaw, data["pitch"] + pitch
    places = projected(points, yaw, pitch, data["distance"])
    seen = 0
    for place, color in zip(places, view.colors, strict=True):
        alone = np.sort(np.linalg.norm(places - place, axis=1))[1] > 6
        if alone and (place > 1).all() and (place < (398, 298)).all():
            x, y = place.astype(int)
            assert (frame[y, x] == color).all()
            seen += 1
    assert seen > 15
    corners = np.frombuffer(base64.b64decode(data["groups"][0]["lines"]), "<f4").reshape(-1, 3).astype(float)
    centres = projected(corners, yaw, pitch, data["distance"])[[0, 5]]
    assert all(np.linalg.norm(lines - centre, axis=1).min() < 0.1 for centre in centres)


def test_near_points_hide_far_ones(tmp_path):
    wall = np.array([[x, y, 9.0] for x in np.linspace(-1, 1, 40) for y in np.linspace(-1, 1, 40)])
    hidden, shown = ([[0.01, 0.02, z]] for z in (9.4, 8.6))
    colors = np.full((1602, 3), 128, np.uint8)
    colors[:2] = [[255, 0, 0], [0, 255, 0]]
    view = View("", np.vstack([hidden, shown, wall]), colors, {"estimated": {"a": camera_at((0, 0, 0))}})
    frame, _ = look(write_view(tmp_path / "view.html", view))
    assert (frame == (0, 255, 0)).all(2).any()
    assert not (frame == (255, 0, 0)).all(2).any()
