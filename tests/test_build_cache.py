"""Stage one: resume, refusal, failures, sources by layout. Stores are compared byte for byte."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image
from toys import LABELS, SIZE, ToySource, ToyTeacher, toy_store, tree_bytes

from samfeat.pipelines.build_cache import build_cache, label_detector
from samfeat.pipelines.workers import Workers
from samfeat.student.extractor import SAMFeat
from samfeat.teacher_cache.keypoints import LabelConfig
from samfeat.teacher_cache.schema import Provenance
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.verify import Problem, verify
from samfeat.teacher_cache.teachers import make_teacher, teacher_of


class Interrupting(ToyTeacher):
    """A teacher that is interrupted by Ctrl-C at its n-th image."""

    def __init__(self, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.left, self.error, self.lock = after, error, threading.Lock()

    def __call__(self, images):
        with self.lock:
            self.left -= len(images)
            if self.left < 0:
                raise self.error
        return super().__call__(images)


def build(path, source=None, teacher=None, **options):
    settings = {"labels": LABELS, "shard_images": 4, "workers": Workers(threads=2)} | options
    return build_cache(path, source or ToySource(9), teacher or ToyTeacher(), **settings)


def test_every_image_gets_the_teachers_word_and_its_labels(tmp_path):
    summary = build(tmp_path / "a.zarr")
    cache, source = TeacherCache.open(tmp_path / "a.zarr"), ToySource(9)
    assert (summary.images, summary.written, summary.failures) == (18, 18, [])
    for k in (0, 4, 8):
        item = source.item(k)
        for side in (0, 1):
            record = cache.record(2 * k + side)
            output = ToyTeacher()(item.images[side][None])[0]
            assert record.name == item.names[side]
            np.testing.assert_array_equal(record.image, item.images[side])
            np.testing.assert_array_equal(record.output.embedding, output.embedding.astype(np.float16))
            np.testing.assert_array_equal(record.output.groups, output.groups)
            assert 0 < len(record.keypoints) <= LABELS.max_keypoints
            assert (np.diff(record.keypoints[:, 2]) <= 0).all()
        np.testing.assert_array_equal(cache.pair(k).points, item.points)
        np.testing.assert_array_equal(cache.pair(k).valid, item.valid)
    assert not any(isinstance(found, Problem) for found in verify(cache))


@pytest.mark.parametrize("after", [0, 3, 7, 12, 17])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, after):
    build(tmp_path / "whole.zarr")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut.zarr", teacher=Interrupting(after))
    cut = TeacherCache.open(tmp_path / "cut.zarr")
    left = sum(len(cut.spec.shard_range(shard)) for shard in cut.missing())
    assert left > 0
    assert build(tmp_path / "cut.zarr").written == left  # what was missing, nothing else
    assert tree_bytes(tmp_path / "cut.zarr") == tree_bytes(tmp_path / "whole.zarr")


def test_a_finished_store_is_left_alone(tmp_path):
    build(tmp_path / "a.zarr")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a.zarr").rglob("*")}
    assert build(tmp_path / "a.zarr", teacher=Interrupting(0)).written == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a.zarr").rglob("*")} == before


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_does_not_show(tmp_path, workers):
    build(tmp_path / "a.zarr", workers=Workers(threads=2))
    build(tmp_path / "b.zarr", workers=Workers(threads=workers))
    assert tree_bytes(tmp_path / "a.zarr") == tree_bytes(tmp_path / "b.zarr")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": ToyTeacher(strength=0.5)}, "teacher.strength: 1.0 there, 0.5 asked for"),
        ({"source": ToySource(9, seed=1)}, "source.seed: 0 there, 1 asked for"),
        ({"labels": LabelConfig(homographies=3)}, "labels.homographies: 2 there, 3 asked for"),
        ({"seed": 5}, "seed: 0 there, 5 asked for"),
        ({"shard_images": 6}, "shard_images: 4 there, 6 asked for"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, change, named):
    build(tmp_path / "a.zarr")
    before = tree_bytes(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="begun with other settings") as error:
        build(tmp_path / "a.zarr", **change)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert tree_bytes(tmp_path / "a.zarr") == before


def test_a_bad_photo_among_good_ones_is_skipped_and_listed(tmp_path):
    summary = build(tmp_path / "a.zarr", ToySource(5, broken=(1, 4)))
    assert [reason for _, reason in summary.failures] == ["photo 1 is truncated: replace it"] * 2 + [
        "photo 4 is truncated: replace it"
    ] * 2
    cache = TeacherCache.open(tmp_path / "a.zarr")
    cache.require_complete()
    assert sorted(cache.failures) == [2, 3, 8, 9]
    assert not any(isinstance(found, Problem) for found in verify(cache))
    again = build(tmp_path / "a.zarr", ToySource(5, broken=(1, 4)))
    assert (again.written, len(again.failures)) == (0, 4)


def test_an_error_of_the_teacher_is_not_swallowed(tmp_path):
    with pytest.raises(RuntimeError):
        build(tmp_path / "a.zarr", teacher=Interrupting(5, RuntimeError))


def test_progress_reaches_the_total_and_never_falls(tmp_path):
    seen = []
    build(tmp_path / "a.zarr", progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 18)
    assert seen[-1] == (18, 18)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_photographs_make_a_store_without_pairs(tmp_path):
    cache = toy_store(tmp_path / "a.zarr", 5, paired=False, shard_images=2)
    assert (len(cache), cache.spec.pairs, cache.spec.shards) == (5, 0, 3)
    assert cache.names == [f"{k:03}.png" for k in range(5)]
    with pytest.raises(ValueError, match="no pair 0"):
        cache.pair(0)


def test_sources_are_recognised_by_their_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="photos"):
        open_source(tmp_path / "photos")
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    source = open_source(tmp_path / "photos", crop_size=80)
    assert (source.paired, len(source), source.crop_size) == (False, 1, (80, 80))
    with pytest.raises(ValueError, match="is a file"):
        open_source(tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match="read as 'folder', which has no option 'pairs_per_scene'"):
        open_source(tmp_path / "photos", pairs_per_scene=5)
    (tmp_path / "mega" / "scene_info").mkdir(parents=True)
    with pytest.raises((FileNotFoundError, ValueError), match="scene_info"):
        open_source(tmp_path / "mega")


def test_teachers_by_name():
    assert make_teacher("classical").provenance()["name"] == "classical"
    with pytest.raises(ValueError, match="has no option 'checkpoint'"):
        make_teacher("classical", checkpoint="sam.pth")
    with pytest.raises(ValueError, match="choose one of classical, hed, aliked, dinov2, mobile_sam, sam_vit_h"):
        make_teacher("dino")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        make_teacher("sam_vit_b", checkpoint="absent.pth")


def test_the_teacher_of_a_store_comes_back_with_its_parameters():
    given = make_teacher("classical").provenance()
    assert teacher_of(Provenance(given, {}, {}, 0)).provenance() == given
    assert teacher_of(Provenance({"name": "sam", "model": "vit_h"}, {}, {}, 0)) is None
    with pytest.raises(ValueError, match="made by another teacher"):
        teacher_of(Provenance(given | {"version": 0}, {}, {}, 0))


def test_a_trained_student_can_make_the_labels(tmp_path):
    student = SAMFeat("default", detection_threshold=0.0, max_keypoints=30)
    student.save(tmp_path / "student.safetensors")
    image = ToySource(1).item(0).images[0]
    detections = label_detector(LabelConfig(detector=str(tmp_path / "student.safetensors")))(image)
    expected = student.extract(image)
    np.testing.assert_allclose(detections[:, :2], expected["keypoints"])
    np.testing.assert_allclose(detections[:, 2], expected["scores"])
    labels = LabelConfig(detector=str(tmp_path / "student.safetensors"), homographies=1, max_keypoints=20)
    build(tmp_path / "a.zarr", ToySource(2), labels=labels)
    cache = TeacherCache.open(tmp_path / "a.zarr")
    assert cache.provenance.labels["detector"] == "student.safetensors"
    assert len(cache.provenance.labels["detector_sha256"]) == 64
    assert len(cache[0].keypoints) > 0
    assert cache.spec.image_size == SIZE
