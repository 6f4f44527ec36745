"""The page: its functions against other people's, and a real server on a free port."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import psutil
import pytest
import skimage.data
import torch
from PIL import Image

from samfeat import SAMFeat, match
from samfeat.pipelines import app
from samfeat.pipelines.features.methods import load_method
from samfeat.teacher_cache.store import open_stores

COMMAND = [sys.executable, "-c", "from samfeat.cli import main; main()", "app"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A photograph and a homography of it, and that homography, in pixels of files of 600 x 400 and 500 x 480."""
    folder = tmp_path_factory.mktemp("photographs")
    homography = np.array([[0.9, 0.1, 5], [-0.08, 1.0, 40], [1e-5, 2e-5, 1]])
    plane = skimage.data.coffee()
    Image.fromarray(plane).save(folder / "a.png")
    Image.fromarray(cv2.warpPerspective(plane, homography, (500, 480))).save(folder / "b.png")
    return folder / "a.png", folder / "b.png", homography


def test_matches_are_those_of_the_library(photographs):
    images = [np.asarray(Image.open(path)) for path in photographs[:2]]
    method = load_method("samfeat", max_keypoints=300, detection_threshold=0.5, device="cpu")
    (found,) = app.compare(*images, [method], verify="homography")
    student = SAMFeat.from_pretrained(max_keypoints=300, detection_threshold=0.5)
    features = [student.extract(image) for image in images]
    np.testing.assert_array_equal(found.found.matches, match(*features)["matches"].numpy())
    assert found.found.inliers.sum() > 50
    for own, expected in zip(found.features, features):
        np.testing.assert_array_equal(own["keypoints"], expected["keypoints"].numpy())
        assert own["scores"].min() > 0.5


def test_a_homography_of_shrunk_photographs_is_scaled_by_pixel_centres():
    rng = np.random.default_rng(0)
    full = np.array([[0.9, 0.1, 30], [-0.1, 1.1, 12], [1e-4, -5e-5, 1]])
    points0 = rng.uniform(0, 800, (50, 2))
    points1 = cv2.perspectiveTransform(points0[None], full)[0]
    scales = (4.0, 3.9), (1.5, 1.6)
    small, _ = cv2.findHomography((points0 + 0.5) / scales[0] - 0.5, (points1 + 0.5) / scales[1] - 0.5)
    np.testing.assert_allclose(app.full_size_model(small, "homography", scales), full, rtol=1e-5)


def test_a_fundamental_matrix_of_shrunk_photographs_is_scaled_by_pixel_centres():
    rng = np.random.default_rng(1)
    scene = np.c_[rng.uniform(-2, 2, (60, 2)), rng.uniform(4, 8, 60)]
    camera = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    turned = scene @ cv2.Rodrigues(np.array([0.02, -0.15, 0.03]))[0].T + (0.8, 0.1, 0.05)
    points0, points1 = ((p @ camera.T)[:, :2] / p[:, 2:] for p in (scene, turned))
    scales = (4.0, 3.9), (1.5, 1.6)
    small, _ = cv2.findFundamentalMat(
        (points0 + 0.5) / scales[0] - 0.5, (points1 + 0.5) / scales[1] - 0.5, cv2.FM_8POINT
    )
    full = app.full_size_model(small, "fundamental", scales)
    ends0, ends1 = (np.c_[points, np.ones(60)] for points in (points0, points1))
    lines = ends0 @ full.T
    assert np.abs((ends1 * lines).sum(1) / np.linalg.norm(lines[:, :2], axis=1)).max() < 1e-3  # pixels
    assert np.linalg.norm(full) == pytest.approx(1)


def test_similarity_is_the_cosine_of_the_cell_under_the_point(toy_cache):
    (store,) = open_stores(toy_cache)
    records = [store.record(image) for image in (2, 3)]  # 64 x 64 pixels in 8 x 8 cells
    for point, (row, column) in {(0, 0): (0, 0), (7.49, 7.51): (1, 0), (63.4, 20): (2, 7), (64, 70): (7, 7)}.items():
        embeddings = [torch.from_numpy(record.output.embedding) for record in records]
        expected = [
            torch.cosine_similarity(embeddings[0][:, row, column][:, None, None], each, dim=0) for each in embeddings
        ]
        for values, wanted in zip(app.similarity(records, point), expected):
            np.testing.assert_allclose(values, wanted.numpy(), atol=1e-6)


def test_examples_match(tmp_path):
    orb = load_method("orb", max_keypoints=1000)
    for paths, verify in app._examples(tmp_path):
        images = [np.asarray(Image.open(path)) for path in paths]
        (found,) = app.compare(*images, [orb], verify=verify)
        assert found.found.inliers.sum() > 100


# ---------------------------------------------------------------------------------------------------------- the server


def start(*words, cwd):
    """A server on any free port, and its address."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--device", "cpu", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"TMPDIR": str(cwd)},
    )
    line = process.stdout.readline()
    address, _, rest = line.partition(": open it in a browser")
    assert rest, line + process.communicate(timeout=60)[1]
    return process, address


@pytest.fixture(scope="module")
def server(toy_cache, tmp_path_factory):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("server")
    process, address = start("--cache", toy_cache, cwd=folder)
    yield process, address, folder
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server[1], verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def ask(client, *paths, methods=("orb",), verify="homography", keypoints=500, threshold=0, ratio=1, side=1024):
    from gradio_client import handle_file

    uploads = [handle_file(str(path)) for path in paths]
    return client.predict(*uploads, list(methods), verify, keypoints, threshold, ratio, side, api_name="/match")


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.integration
def test_numbers_and_pictures_in_the_page(client, photographs):
    numbers, pictures = ask(client, *photographs[:2], methods=("orb", "sift"))
    images = [np.asarray(Image.open(path)) for path in photographs[:2]]
    expected = app.compare(
        *images, [load_method(name, max_keypoints=500) for name in ("orb", "sift")], verify="homography"
    )
    for each in expected:
        counts = [len(features["keypoints"]) for features in each.features]
        found = len(each.found.matches), each.found.inliers.sum()
        assert f"| {each.method.name} | {counts[0]} and {counts[1]} | {found[0]} | {found[1]} (" in numbers
    for text in re.findall(r"```\n(.*?)\n```", numbers, re.DOTALL):
        np.testing.assert_allclose(np.array(text.split(), float).reshape(3, 3), photographs[2], rtol=0.1, atol=1)
    assert pictures.count("<figure>") == 2 + 2 * 2  # no method of OpenCV has maps
    assert "Photographs of 600 x 400 and 500 x 480 pixels." in numbers


@pytest.mark.integration
def test_sliders_reach_the_method(client, photographs):
    numbers, pictures = ask(client, *photographs[:2], methods=("samfeat",), keypoints=400, threshold=0.5, side=512)
    images = [
        cv2.resize(np.asarray(Image.open(path)), size, interpolation=cv2.INTER_AREA)
        for path, size in zip(photographs[:2], ((512, 341), (500, 480)))
    ]
    student = SAMFeat.from_pretrained(max_keypoints=400, detection_threshold=0.5)
    features = [student.extract(image) for image in images]
    counts = [len(each["keypoints"]) for each in features]
    assert f"| samfeat | {counts[0]} and {counts[1]} | {len(match(*features)['matches'])} |" in numbers
    assert "matched at 512 x 341 and 500 x 480" in numbers
    assert pictures.count("<figure>") == 1 + 2 * 4
    strict, _ = ask(client, *photographs[:2], methods=("samfeat",), keypoints=400, threshold=0.5, side=512, ratio=0.8)
    kept = len(match(*features, ratio=0.8, cosine=True)["matches"])
    assert f"| {kept} |" in strict
    assert kept < len(match(*features)["matches"])


@pytest.mark.integration
def test_what_cannot_be_used_is_said_in_one_line(client, photographs, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(photographs[0].read_bytes()[:2000])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    said = {
        "text.png": "the second photograph is not an image that Pillow reads",
        "half.png": "the second photograph is damaged or truncated",
        "huge.png": "the second photograph is 10000x10000, more than the 80000000 pixels allowed",
    }
    for name, line in said.items():
        with pytest.raises(Exception, match=line) as caught:
            ask(client, photographs[0], tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(Exception, match="choose a method"):
        ask(client, *photographs[:2], methods=())


@pytest.mark.integration
def test_what_lies_outside_a_slider_is_moved_into_it(client, photographs):
    numbers, _ = ask(client, *photographs[:2], keypoints=3, side=1)
    assert re.search(r"\| orb \| \d+ and 64 \|", numbers)
    assert "matched at 256 x 171 and 256 x 246" in numbers


@pytest.mark.integration
def test_the_cache_is_shown(client, toy_cache):
    (store,) = open_stores(toy_cache)
    first, _, targets = client.predict("a.zarr", 4, api_name="/image")
    assert store.names[4] in first["label"]
    with Image.open(first["value"]) as shown:
        assert shown.size == (5 * 64, 5 * 64)
    assert targets.count("<figure>") == 2 * 4 + 1
    for name in (store.names[4], store.names[5]):
        assert targets.count(f"<figcaption>{name}: ") == 4
    assert f"pair 2: {store.pair(2).valid.sum()} correspondences" in targets


@pytest.mark.integration
def test_only_uploads_and_own_files_are_served(server, client, photographs, toy_cache):
    _, address, folder = server
    assert status(f"{address}/gradio_api/file=/etc/passwd") == 403
    (folder / "secret.txt").write_text("secret")  # in the server's working folder
    (folder / "secret.svg").write_text("<svg/>")
    for name in (folder / "secret.txt", "secret.txt", photographs[0], toy_cache / "a.zarr" / "zarr.json"):
        assert status(f"{address}/gradio_api/file={name}") in (403, 404), name
    for path in ("static/../../../../../etc/passwd", "assets/..%2f..%2f..%2f..%2fetc%2fpasswd"):
        assert status(f"{address}/{path}") in (403, 404), path
    for path, reason in {
        "/etc/passwd": "",
        str(photographs[0]): "",
        str(folder / "secret.svg"): "",
        "http://127.0.0.1/a.png": "addresses are not",
    }.items():
        upload = {"path": path, "meta": {"_type": "gradio.FileData"}}  # gradio_client would upload the file
        asked = json.dumps({"data": [upload, upload, ["orb"], "none", 500, 0, 1, 1024]}).encode()
        call = urllib.request.Request(f"{address}/gradio_api/call/match", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=30) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{address}/gradio_api/call/match/{event}", timeout=60) as answer:
            said = answer.read().decode()
        assert said.startswith("event: error"), said
        assert reason in said
    assert status(f"{address}/gradio_api/file={folder / 'secret.svg'}") == 403


@pytest.mark.integration
def test_large_uploads_are_refused(server):
    boundary = "x" * 20
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()
        + bytes(41_000_000)
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        f"{server[1]}/gradio_api/upload",
        body,
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert getattr(caught.value, "code", 413) == 413


@pytest.mark.integration
def test_loopback_alone_and_nothing_from_elsewhere(server):
    process, address, _ = server
    listening = [each.laddr.ip for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
        config = json.load(answer)
    assert config["analytics_enabled"] is False
    assert all(each["url"] is None for each in [config["stylesheets"]] if isinstance(each, dict))
    assert not [sheet for sheet in config["stylesheets"] if str(sheet).startswith("http")]
    with urllib.request.urlopen(address, timeout=30) as answer:
        page = answer.read().decode()
    assert not re.search(r"<(?:script|link)[^>]*(?:src|href)=\"https?://", page)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_and_removes_the_uploads(tmp_path, photographs, number):
    gradio_client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    process, address = start(cwd=tmp_path)
    ask(gradio_client.Client(address, verbose=False), *photographs[:2])
    (folder,) = tmp_path.glob("samfeat-app-*")
    assert list(folder.rglob("a.png"))
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert time.monotonic() - began < 10
    assert not folder.exists()


# ----------------------------------------------------------------------------------------------------- before it serves


def test_a_missing_gradio_is_named():
    program = "import sys; sys.modules['gradio'] = None\nfrom samfeat.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "app"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the package gradio is not installed: pip install 'samfeat[app]'\n"


@pytest.mark.integration
def test_what_is_wrong_is_said_before_the_page_is_served(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        app.serve_page(weights=tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        app.serve_page(peers=tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        app.serve_page(cache=tmp_path / "absent")


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"the page cannot use port {port} of 127\.0\.0\.1 .*: choose another"):
            app._listen("127.0.0.1", port)
    with pytest.raises(OSError, match=r"the page cannot use port 0 of 192\.0\.2\.1"):
        app._listen("192.0.2.1", 0)


def test_ports_in_use_are_passed_over(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(app, "FIRST_PORT", taken.getsockname()[1])
        with app._listen("127.0.0.1", None) as found:
            assert taken.getsockname()[1] < found.getsockname()[1] < taken.getsockname()[1] + app.PORTS
