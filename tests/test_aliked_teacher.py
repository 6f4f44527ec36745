"""ALIKED as a teacher, against kornia's own pass from an image to descriptors."""

from __future__ import annotations

import hashlib
import json
import pickle

import kornia
import numpy as np
import pytest
import torch

from samfeat.teacher_cache.teachers import make_teacher
from samfeat.teacher_cache.teachers.aliked import AlikedTeacher
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, laid out as the authors' file."""
    torch.manual_seed(0)
    tensors = kornia.feature.ALIKED("aliked-t16").state_dict()
    del tensors["dkd.hw_grid"]
    path = tmp_path_factory.mktemp("weights") / "aliked-t16.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(1)
    return np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # [48, 72, 3]


def test_the_embedding_is_what_kornia_finds_at_the_centres_of_the_cells(weights, image):
    teacher = make_teacher("aliked", checkpoint=weights, device="cpu")
    output = teacher(image[None])[0]
    channels, rows, columns = teacher.embedding_shape((48, 72))
    assert (channels, rows, columns) == (64, 43, 64) == output.embedding.shape

    network = kornia.feature.ALIKED("aliked-t16")
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    y, x = np.meshgrid((np.arange(rows) + 0.5) * 48 / rows - 0.5, (np.arange(columns) + 0.5) * 72 / columns - 0.5)
    places = torch.tensor(np.stack([x.T.ravel() / 71 * 2 - 1, y.T.ravel() / 47 * 2 - 1], axis=1)).float()
    network.dkd.forward = lambda scores, image_size=None: ([places], [torch.ones(len(places))], None)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0]
    np.testing.assert_allclose(output.embedding.reshape(64, -1).T, found.descriptors.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(output.embedding, axis=0), 1, atol=1e-5)


def test_masks_groups_and_edges_are_the_classical_teachers(weights, image):
    mine, other = (teacher(image[None])[0] for teacher in (AlikedTeacher.build(checkpoint=weights), ClassicalTeacher()))
    np.testing.assert_array_equal(mine.groups, other.groups)
    np.testing.assert_array_equal(mine.edges, other.edges)
    np.testing.assert_array_equal(mine.masks.stack, other.masks.stack)


def test_it_is_made_again_from_its_provenance_and_travels_to_other_processes(weights, image):
    teacher = AlikedTeacher.build(checkpoint=weights, device="cpu")
    described = json.loads(json.dumps(teacher.provenance()))
    assert described["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert described["model"] == "aliked-t16"
    assert AlikedTeacher.rebuild(described) is None
    again = AlikedTeacher.rebuild(described, checkpoint=weights)
    assert json.loads(json.dumps(again.provenance())) == described
    for other in (again, pickle.loads(pickle.dumps(teacher))):
        np.testing.assert_array_equal(other(image[None])[0].embedding, teacher(image[None])[0].embedding)


def test_other_weights_are_refused_in_one_line(weights, tmp_path):
    with pytest.raises(ValueError, match=r"give --checkpoint aliked-n16rot.pth"):
        make_teacher("aliked")
    torch.save(kornia.feature.DISK().state_dict(), tmp_path / "disk.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:999])
    for name, message in (("disk.pth", "does not hold weights of ALIKED"), ("cut.pth", "damaged")):
        with pytest.raises(ValueError, match=message) as caught:
            make_teacher("aliked", checkpoint=tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="channels"):
        make_teacher("aliked", checkpoint=weights, options={"channels": 3})
