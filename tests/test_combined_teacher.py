"""Several teachers as one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toys import LABELS, SIZE, ToySource, ToyTeacher

from samfeat.pipelines.build_cache import build_cache
from samfeat.teacher_cache.schema import Provenance
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers import make_teacher, teacher_of, unfetched
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher
from samfeat.teacher_cache.teachers.combined import CombinedTeacher


class Counting(ToyTeacher):
    calls = 0

    def __call__(self, images):
        Counting.calls += 1
        return super().__call__(images)


@pytest.fixture
def images():
    return np.stack([ToySource(2).item(k).images[0] for k in (0, 1)])


def test_each_output_comes_from_its_teacher_and_each_teacher_runs_once(images):
    toy, classical = Counting(), ClassicalTeacher()
    for teacher, groups, edges in (
        (CombinedTeacher.of([toy, classical]), classical, classical),
        (CombinedTeacher.of([toy, classical, toy]), classical, toy),
    ):
        before = Counting.calls
        for mine, image in zip(teacher(images), images):
            np.testing.assert_array_equal(mine.embedding, toy(image[None])[0].embedding)
            np.testing.assert_array_equal(mine.groups, groups(image[None])[0].groups)
            np.testing.assert_array_equal(mine.masks.stack, groups(image[None])[0].masks.stack)
            np.testing.assert_array_equal(mine.edges, edges(image[None])[0].edges)
        assert Counting.calls - before == 1 + 2 + 2 * (edges is toy)  # once for both images, then as the oracle
        assert teacher.embedding_shape(SIZE) == toy.embedding_shape(SIZE)
    assert CombinedTeacher.of([toy, classical, toy]).name == "toy+classical+toy"


def test_a_store_of_two_teachers_says_so(tmp_path):
    build_cache(tmp_path / "a.zarr", ToySource(3), make_teacher("toys:ToyTeacher+classical"), labels=LABELS)
    store = TeacherCache.open(tmp_path / "a.zarr")
    assert store.provenance.teacher["name"] == "toy+classical"
    assert store.provenance.teacher["embedding"] == ToyTeacher().provenance()
    assert ClassicalTeacher.rebuild(store.provenance.teacher["edges"]) == ClassicalTeacher()
    assert teacher_of(store.provenance) is None  # inspect-cache --verify says that nothing was recomputed


def test_a_store_of_known_teachers_is_recomputed(tmp_path):
    parts = CombinedTeacher.of([ClassicalTeacher(seed=1), ClassicalTeacher()])
    build_cache(tmp_path / "a.zarr", ToySource(3), parts, labels=LABELS)
    provenance = TeacherCache.open(tmp_path / "a.zarr").provenance
    again = teacher_of(provenance)
    assert again == parts
    assert again.parts[1] is again.parts[2]
    other = json.loads(json.dumps(provenance.teacher))
    other["groups"]["version"] = 0
    with pytest.raises(ValueError, match=r"groups.version"):
        teacher_of(Provenance(other, {}, {}, 0))


def test_what_cannot_be_combined_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="not 4"):
        make_teacher("classical+classical+classical+classical")
    with pytest.raises(ValueError, match="weights belong to a part"):
        make_teacher("sam_vit_b+classical", checkpoint=tmp_path / "a.pth")
    with pytest.raises(ValueError, match="unknown teacher 'moon'"):
        make_teacher("classical+moon")
    with pytest.raises(FileNotFoundError, match="absent"):
        make_teacher("classical+aliked=absent.pth")


def test_what_a_combination_would_download_is_said_before(tmp_path):
    assert "sam_vit_b_01ec64.pth" in unfetched("classical+sam_vit_b", checkpoint=None, downloads=tmp_path)
    assert unfetched("classical+sam_vit_b=a.pth", checkpoint=None, downloads=tmp_path) == ""
