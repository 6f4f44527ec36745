"""The students that ship: there, small, offline, documented, and better than chance by far."""

import functools
import http.server
import socket
import threading

import cv2
import numpy as np
import pytest
import torch
from skimage import data

from samfeat.student.export import load_weights
from samfeat.student.extractor import SAMFeat
from samfeat.student.matching import match
from samfeat.student.weights import FOLDER, SHIPPED, find_weights


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a name must not touch the network")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_student_that_ships_loads_offline_and_says_where_it_comes_from(name, no_network):
    path = find_weights(name)
    assert path.stat().st_size < 5_000_000
    student = SAMFeat.from_pretrained(name)
    assert {"config", "step", "stores", "versions"} <= student.provenance.keys()
    assert name in (FOLDER / "MODEL_CARD.md").read_text()


def test_the_default_is_the_student_that_ships(no_network):
    default, named = SAMFeat.from_pretrained(), SAMFeat.from_pretrained("samfeat")
    for ours, theirs in zip(default.parameters(), named.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("degrees", [0, 25])
def test_it_finds_a_photograph_again_through_a_homography(name, degrees):
    image = data.astronaut()
    turn = np.vstack([cv2.getRotationMatrix2D((256, 256), degrees, 0.85), [0, 0, 1]])
    homography = turn @ np.array([[1, 0.05, 4], [0.02, 0.95, 6], [1e-4, 5e-5, 1]])
    warped = cv2.warpPerspective(image, homography, (512, 512), flags=cv2.INTER_AREA)
    student = SAMFeat.from_pretrained(name, max_keypoints=1024)
    one, other = student.extract(image), student.extract(warped)
    pairs = match(one, other)["matches"]
    points = one["keypoints"][pairs[:, 0]].numpy()[None].astype(np.float64)
    expected = cv2.perspectiveTransform(points, homography)[0]
    errors = np.linalg.norm(other["keypoints"][pairs[:, 1]].numpy() - expected, axis=1)
    assert len(errors) > 300
    assert (errors < 3).mean() > 0.7


def test_half_the_bytes_are_the_same_weights_to_three_digits(tmp_path):
    student = SAMFeat.from_pretrained("samfeat")
    student.save(tmp_path / "whole.safetensors")
    student.save(tmp_path / "half.safetensors", dtype=torch.float16)
    whole, half = (load_weights(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * (tmp_path / "whole.safetensors").stat().st_size
    for name, values in whole.state_dict.items():
        torch.testing.assert_close(half.state_dict[name].float(), values, rtol=1e-3, atol=1e-6)


def test_a_name_that_is_neither_says_which_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*the shipped students are: samfeat"):
        find_weights(tmp_path / "superfeat")
    with pytest.raises(ValueError, match="hf://<owner>/<repository>/<file>"):
        find_weights("hf://someone/something")


def test_an_address_is_fetched_once(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    content = find_weights("samfeat").read_bytes()
    (tmp_path / "served" / "mine.safetensors").write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/mine.safetensors"
        first = find_weights(address)
        server.shutdown()
    assert first.read_bytes() == content
    assert find_weights(address) == first  # the server is gone
    with pytest.raises(OSError, match=r"404|refused"):
        find_weights(address.replace("mine", "yours"))
