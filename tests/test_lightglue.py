"""LightGlue as a matcher: kornia's network called by hand on the same weights."""

from __future__ import annotations

import h5py
import kornia
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from samfeat import LightGlue, SAMFeat
from samfeat.pipelines.match import match_pairs, verified_matches

SIZES = {"input_dim": 128, "descriptor_dim": 32, "n_layers": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = kornia.feature.LightGlue(features=None, **SIZES).eval()
    for layer in network.log_assignment:  # random weights believe in nothing
        torch.nn.init.constant_(layer.matchability.bias, 5.0)
        torch.nn.init.orthogonal_(layer.final_proj.weight, gain=8.0)
    return network


def features(seed, count, size=(320, 240)):
    rng = np.random.default_rng(seed)
    return {
        "keypoints": (rng.random((count, 2)) * (np.array(size) - 1)).astype(np.float32),
        "descriptors": (3 * np.random.default_rng(7).standard_normal((200, 128))[:count]).astype(np.float32),
        "image_size": np.array(size),
    }


def by_hand(network, *both):
    data = {}
    for name, each in zip(("image0", "image1"), both):
        tensors = {key: torch.as_tensor(value).float()[None] for key, value in each.items()}
        data[name] = tensors | {
            "keypoints": tensors["keypoints"] + 0.5,
            "descriptors": F.normalize(tensors["descriptors"], dim=-1),
        }
    with torch.no_grad():
        found = network(data)
    return found["matches"][0], found["scores"][0]


def saved(network, path, *, form):
    state = dict(network.state_dict())
    if form == "glue-factory":
        tensors = {f"matcher.{name}": value for name, value in state.items()} | {"extractor.weight": torch.zeros(2)}
        torch.save({"model": tensors, "conf": {"model": {"name": "two_view_pipeline"}}, "epoch": 3}, path)
    elif form == "authors":
        del state["confidence_thresholds"]
        torch.save({_old(name): value for name, value in state.items()}, path)
    else:
        save_file(state, path)
    return path


def _old(name):
    parts = name.split(".")
    return ".".join([parts[2], parts[1], *parts[3:]]) if parts[0] == "transformers" else name


@pytest.mark.parametrize("form", ["glue-factory", "authors", "safetensors"])
def test_matches_are_those_of_kornias_network(network, tmp_path, form):
    path = saved(network, tmp_path / ("w.safetensors" if form == "safetensors" else "w.tar"), form=form)
    matcher = LightGlue.from_pretrained(path)
    both = features(1, 90), features(2, 120, (200, 300))
    found = matcher(*both)
    matches, scores = by_hand(network, *both)
    assert len(matches) > 0
    torch.testing.assert_close(found["matches"], matches)
    torch.testing.assert_close(found["scores"], scores)
    assert (found["matches"][:, 0].diff() > 0).all()


def test_keypoints_on_the_frame_and_no_keypoints(network):
    matcher = LightGlue(network)
    corners = features(1, 4) | {
        "keypoints": np.array([[-0.5, -0.5], [319.5, 239.5], [0, 239.5], [319.5, 0]], np.float32)
    }
    matcher(corners, features(2, 50))
    none = {"keypoints": np.zeros((0, 2)), "descriptors": np.zeros((0, 128)), "image_size": np.array([320, 240])}
    assert matcher(none, corners)["matches"].shape == (0, 2)


def test_other_features_and_files_are_refused_in_one_line(network, tmp_path):
    narrow = features(1, 5) | {"descriptors": np.ones((5, 64), np.float32)}
    with pytest.raises(ValueError, match="take descriptors of 128 numbers, the features have 64"):
        LightGlue(network)(narrow, narrow)
    with pytest.raises(FileNotFoundError, match="no such file"):
        LightGlue.from_pretrained(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    partial = dict(network.state_dict())
    del partial["transformers.1.self_attn.Wqkv.weight"]
    torch.save(partial, tmp_path / "partial.pth")
    for name, said in (
        ("text", "no LightGlue"),
        ("other", "no LightGlue"),
        ("partial", "missing tensor transformers.1"),
    ):
        with pytest.raises(ValueError, match=said):
            LightGlue.from_pretrained(tmp_path / f"{name}.pth")


def test_photographs_and_files_of_features_are_matched_with_it(network, tmp_path):
    import skimage.data
    from PIL import Image

    from samfeat.cli import app

    left, right, _ = skimage.data.stereo_motorcycle()
    for name, image in (("a", left), ("b", right)):
        Image.fromarray(image[100:260, 200:440]).save(tmp_path / f"{name}.png")
    weights = saved(network, tmp_path / "w.safetensors", form="safetensors")
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=100)
    both = [student.extract(tmp_path / f"{name}.png") for name in "ab"]
    expected = LightGlue(network)(*both)["matches"].numpy()
    assert len(expected)

    def run(*words):
        app(list(map(str, words)), standalone_mode=False)

    run(
        "match", tmp_path / "a.png", tmp_path / "b.png", "--weights", "samfeat-slim", "--max-keypoints", 100,
        "--verify", "none", "--lightglue", weights, "--out", tmp_path / "m.npz",
    )  # fmt: skip
    points = np.load(tmp_path / "m.npz")
    np.testing.assert_allclose(points["points0"], both[0]["keypoints"].numpy()[expected[:, 0]], atol=1e-3)
    np.testing.assert_allclose(points["points1"], both[1]["keypoints"].numpy()[expected[:, 1]], atol=1e-3)

    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        (tmp_path / f"{name}.png").rename(photos / f"{name}.png")
    run("extract", photos, tmp_path / "f.h5", "--weights", "samfeat-slim", "--max-keypoints", 100)
    run("match-pairs", tmp_path / "f.h5", tmp_path / "m.h5", "--lightglue", weights)
    with h5py.File(tmp_path / "m.h5") as file:
        stored = file["a.png"]["b.png"]["matches0"][()]
    rows = np.flatnonzero(stored >= 0)
    np.testing.assert_array_equal(np.column_stack([rows, stored[rows]]), expected)
    with pytest.raises(ValueError, match="leave them out"):
        match_pairs(tmp_path / "f.h5", tmp_path / "n.h5", lightglue=weights, ratio=0.8)
    with pytest.raises(ValueError, match="leave it out"):
        verified_matches(both[0], both[1], matcher=LightGlue(network), ratio=0.8)
