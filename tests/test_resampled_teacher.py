"""A teacher whose embedding is stored on the student's grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.transform import resize
from toys import LABELS, SIZE, ToySource, ToyTeacher

from samfeat.pipelines.build_cache import build_cache
from samfeat.student.relation import relation_loss
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers import make_teacher, teacher_of
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher
from samfeat.teacher_cache.teachers.resampled import ResampledTeacher


@pytest.fixture(scope="module")
def image():
    return ToySource(2).item(0).images[0]


def test_the_embedding_is_that_of_the_teacher_resized_and_nothing_else_changes(image):
    plain, coarse = ClassicalTeacher(), ResampledTeacher(ClassicalTeacher(), 8)
    own, other = plain(image[None])[0], coarse(image[None])[0]
    cells = (SIZE[0] // 8, SIZE[1] // 8)
    assert other.embedding.shape == coarse.embedding_shape(SIZE) == (256, *cells)
    expected = np.stack([resize(m, cells, order=1, mode="edge", anti_aliasing=False) for m in own.embedding])
    np.testing.assert_allclose(other.embedding, expected, atol=1e-5)
    np.testing.assert_array_equal(other.groups, own.groups)
    np.testing.assert_array_equal(other.edges, own.edges)


def test_a_grid_that_is_coarse_already_stays(image):
    toy = ToyTeacher()
    fine = ResampledTeacher(toy, 1)
    assert fine.embedding_shape(SIZE) == toy.embedding_shape(SIZE)
    np.testing.assert_array_equal(fine(image[None])[0].embedding, toy(image[None])[0].embedding)
    with pytest.raises(ValueError, match="at least 1"):
        ResampledTeacher(toy, 0)


def test_a_store_is_made_and_recomputed(tmp_path):
    teacher = make_teacher("classical", embedding_stride=16)
    build_cache(tmp_path / "a.zarr", ToySource(3), teacher, labels=LABELS)
    store = TeacherCache.open(tmp_path / "a.zarr")
    assert store.spec.embedding == (256, SIZE[0] // 16, SIZE[1] // 16)
    assert store.provenance.teacher["embedding_stride"] == 16
    assert teacher_of(store.provenance) == teacher
    assert teacher_of(store.provenance.taught_by({"name": "unknown", "embedding_stride": 8})) is None


def test_the_relation_loss_sees_the_same_teacher(image):
    """The loss resizes a full grid as the store did: equal values and gradients, up to rounding."""
    full = torch.from_numpy(ClassicalTeacher()(image[None])[0].embedding)[None]
    stored = torch.from_numpy(ResampledTeacher(ClassicalTeacher(), 8)(image[None])[0].embedding)[None]
    found = []
    for teacher in (full, stored):
        student = torch.randn(1, 256, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(0))
        student.requires_grad_()
        loss = relation_loss(student, teacher, valid=torch.ones(1, *SIZE, dtype=torch.bool))
        loss.backward()
        found.append((loss.detach(), student.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
