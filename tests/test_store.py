"""The store against plain zarr, hashlib and numpy, following teacher_cache/README.md and not our reader."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os

import numpy as np
import pytest
import zarr
from hand_written_stores import SPEC, filled, pair, problems
from toys import PROVENANCE, SIZE, toy_record, toy_store

from samfeat.teacher_cache.schema import MAX_MASKS, POINTS, Failure, Provenance
from samfeat.teacher_cache.store import TeacherCache, open_stores


def test_what_is_written_is_read_back(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    assert len(cache) == 6
    assert cache.missing() == []
    for image in range(6):
        given, got = toy_record(image), cache.record(image)
        assert (got.name, got.source_sha256, got.box) == (given.name, given.source_sha256, given.box)
        np.testing.assert_array_equal(got.image, given.image)
        half_step = np.abs(given.output.embedding).max(axis=0) / 253.9
        assert (np.abs(got.output.embedding - given.output.embedding) <= half_step).all()
        np.testing.assert_array_equal(got.output.embedding, cache[image].embedding * cache[image].embedding_scale)
        np.testing.assert_array_equal(got.output.groups, given.output.groups)
        np.testing.assert_array_equal(got.output.edges, given.output.edges)
        np.testing.assert_array_equal(got.output.masks.stack, given.output.masks.stack)
        np.testing.assert_array_equal(got.output.masks.table, given.output.masks.table)
        np.testing.assert_array_equal(got.keypoints, given.keypoints)
        np.testing.assert_array_equal(cache[image].keypoints, given.keypoints)
    points, valid = pair(2)
    assert cache.pair(2).images == (4, 5)
    np.testing.assert_array_equal(cache.pair(2).points, points)
    np.testing.assert_array_equal(cache.pair(2).valid, valid)


def test_plain_zarr_reads_a_store_by_the_readme_alone(tmp_path):
    filled(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert (group.attrs["format"], group.attrs["version"]) == ("samfeat-teacher-cache", 2)
    given = toy_record(3)
    count = int(group["mask_count"][3])
    masks = np.unpackbits(group["masks"][3, :count], axis=-1)[..., : SIZE[1]].astype(bool)
    np.testing.assert_array_equal(masks, given.output.masks.stack)
    assert group["embedding"].metadata.dimension_names == ("image", "channel", "row", "column")
    assert group["edges"].attrs["unit"] == "1/255"
    assert not group["masks"][3, count:].any()


def test_digest_is_the_one_of_the_readme(tmp_path):
    filled(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    given, i = toy_record(1), 1
    count, labels = int(group["mask_count"][i]), int(group["keypoint_count"][i])
    digest = hashlib.sha256(f"{given.name}\n{given.source_sha256}\n{given.box}".encode())
    rows = {"keypoints": labels, "masks": count, "mask_table": count}
    for name in ("image", "embedding", "embedding_scale", "groups", "edges", "keypoints", "masks", "mask_table"):
        values = group[name][i][: rows.get(name)]
        digest.update(str(values.shape).encode() + values.astype(values.dtype.newbyteorder("<")).tobytes())
    assert group["sha256"][i].tobytes() == digest.digest()


def test_unused_mask_slots_take_no_space(tmp_path):
    filled(tmp_path / "a.zarr")
    stored = TeacherCache.open(tmp_path / "a.zarr").stored_bytes()["masks"]
    assert stored < 6 * MAX_MASKS * SIZE[0] * SIZE[1] // 8 / 50


def test_an_unfinished_shard_is_missing_and_a_restart_writes_the_same_bytes(tmp_path):
    whole, cut = filled(tmp_path / "whole.zarr"), TeacherCache.create(tmp_path / "cut.zarr", SPEC, PROVENANCE)
    cut.write_shard(1, [toy_record(4), toy_record(5)], [pair(2)])
    for name in ("image", "masks", "groups"):  # what a killed run leaves of shard 0: some arrays, with other content
        source = filled(tmp_path / f"other-{name}.zarr", SPEC)
        file = f"{name}/c/" + "/".join("0" * len(source._arrays[name].shape))
        target = tmp_path / "cut.zarr" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / f"other-{name}.zarr" / file).read_bytes())
    cut = TeacherCache.open(tmp_path / "cut.zarr", writable=True)
    assert cut.missing() == [0]
    with pytest.raises(ValueError, match="unfinished: 1 of 2 shards"):
        cut.require_complete()
    assert [p.text for p in problems(cut)] == ["1 of 2 shards are missing: [0]"]
    cut.write_shard(0, [toy_record(i) for i in range(4)], [pair(0), pair(1)])
    for array in SPEC.arrays():
        for path in sorted((tmp_path / "whole.zarr" / array.name).rglob("*")):
            if path.is_file():
                twin = tmp_path / "cut.zarr" / path.relative_to(whole.path)
                assert twin.read_bytes() == path.read_bytes(), path


def test_stale_masks_of_an_interrupted_run_do_not_survive(tmp_path):
    spec = dataclasses.replace(SPEC, images=2, shard_images=2)
    cache = TeacherCache.create(tmp_path / "a.zarr", spec, PROVENANCE)
    cache.write_shard(0, [toy_record(i, masks=40) for i in range(2)], [pair(0)])
    cache.write_shard(0, [toy_record(i, masks=3) for i in range(2)], [pair(0)])
    assert not zarr.open_group(tmp_path / "a.zarr", mode="r")["masks"][:, 3:].any()


def test_full_disk_leaves_the_shard_missing(tmp_path, monkeypatch):
    cache = TeacherCache.create(tmp_path / "a.zarr", SPEC, PROVENANCE)
    written, replace = [], os.replace

    def full(self, target):
        written.append(target)
        if "edges" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write_shard(0, [toy_record(i) for i in range(4)], [pair(0), pair(1)])
    monkeypatch.undo()
    assert written
    assert cache.missing() == [0, 1]
    cache.write_shard(0, [toy_record(i) for i in range(4)], [pair(0), pair(1)])
    assert TeacherCache.open(tmp_path / "a.zarr").missing() == [1]


@pytest.mark.parametrize(
    "name",
    ["image", "embedding", "embedding_scale", "groups", "edges", "keypoints", "masks", "mask_table", "pair_points"],
)
def test_verify_finds_a_flipped_bit_in_any_array(tmp_path, name):
    cache = filled(tmp_path / "a.zarr")
    assert problems(cache) == []
    file = next(path for path in (tmp_path / "a.zarr" / name / "c" / "0").rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(bytes(data))
    found = problems(TeacherCache.open(tmp_path / "a.zarr"))
    assert {problem.image for problem in found} <= {-1, *range(4)}
    assert found


def test_verify_finds_values_that_contradict_each_other(tmp_path):
    filled(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    groups = group["groups"][0]
    groups[0, 0] = 99
    group["groups"][0] = groups
    group["name"][1] = "scene/000.png"
    group["pair_points"][2] = np.full((2, POINTS, 2), 640, np.float32)
    texts = " / ".join(problem.text for problem in problems(TeacherCache.open(tmp_path / "a.zarr")))
    for expected in ("digest differs", "groups name mask 99", "not unique", "correspondence lies outside"):
        assert expected in texts


def test_a_failed_image_keeps_its_place(tmp_path):
    cache = TeacherCache.create(tmp_path / "a.zarr", SPEC, PROVENANCE)
    blank = (np.zeros((2, POINTS, 2), np.float32), np.zeros(POINTS, bool))
    cache.write_shard(0, [toy_record(0), toy_record(1), Failure("x", "truncated"), Failure("y", "")], [pair(0), blank])
    cache.write_shard(1, [toy_record(4), toy_record(5)], [pair(2)])
    cache = TeacherCache.open(tmp_path / "a.zarr")
    assert cache.failures == {2: "truncated", 3: "unknown"}
    assert cache.names[2] == "x"
    assert problems(cache) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((64, 63, 3), np.uint8)}, "image has shape"),
        ({"keypoints": np.zeros((3, 2), np.float32)}, "keypoints has shape"),
        ({"keypoints": np.zeros((2049, 3), np.float32)}, "more than 1024 masks or 2048 keypoints"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, change, message):
    cache = TeacherCache.create(tmp_path / "a.zarr", dataclasses.replace(SPEC, images=4), PROVENANCE)
    records = [toy_record(i) for i in range(3)] + [dataclasses.replace(toy_record(3), **change)]
    with pytest.raises(ValueError, match=message):
        cache.write_shard(0, records, [pair(0), pair(1)])
    assert cache.missing() == [0]


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    cache = TeacherCache.create(tmp_path / "a.zarr", dataclasses.replace(SPEC, images=2, shard_images=2), PROVENANCE)
    bad = toy_record(1)
    bad.output.embedding[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN, infinity"):
        cache.write_shard(0, [toy_record(0), bad], [pair(0)])


def test_open_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such store"):
        TeacherCache.open(tmp_path / "absent.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="not a teacher cache"):
        TeacherCache.open(tmp_path / "empty.zarr")
    zarr.create_group(tmp_path / "foreign.zarr", zarr_format=3)
    with pytest.raises(ValueError, match="its format is not"):
        TeacherCache.open(tmp_path / "foreign.zarr")
    filled(tmp_path / "new.zarr")
    zarr.open_group(tmp_path / "new.zarr", mode="r+").attrs["version"] = 1
    with pytest.raises(ValueError, match="format version 1, this program reads version 2"):
        TeacherCache.open(tmp_path / "new.zarr")
    (tmp_path / "new.zarr" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="not a teacher cache"):
        TeacherCache.open(tmp_path / "new.zarr")


def test_create_refuses_what_is_there_and_leaves_nothing_half_made(tmp_path):
    filled(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="exists already"):
        TeacherCache.create(tmp_path / "a.zarr", SPEC, PROVENANCE)
    with pytest.raises(ValueError, match=r"must end in \.zarr"):
        TeacherCache.create(tmp_path / "a", SPEC, PROVENANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_cache_is_any_folder_with_stores_in_it(tmp_path):
    filled(tmp_path / "b.zarr")
    filled(tmp_path / "a.zarr", dataclasses.replace(SPEC, paired=False))
    (tmp_path / "notes.txt").write_text("ignored")
    (tmp_path / "checkpoints").mkdir()
    assert [store.path.name for store in open_stores(tmp_path)] == ["a.zarr", "b.zarr"]
    assert [store.path.name for store in open_stores(tmp_path / "b.zarr")] == ["b.zarr"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no store"):
        open_stores(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_stores(tmp_path / "nowhere")


def test_index_finds_a_name_or_a_part_of_it(tmp_path):
    cache = filled(tmp_path / "a.zarr")
    assert cache.index("scene/004.png") == 4
    assert cache.index("005") == 5
    with pytest.raises(ValueError, match="6 images"):
        cache.index("scene")
    with pytest.raises(ValueError, match="no image"):
        cache.index("elsewhere")


def test_a_moved_store_is_the_same_store(tmp_path):
    cache = toy_store(tmp_path / "a.zarr")
    (tmp_path / "elsewhere").mkdir()
    cache.path.rename(tmp_path / "elsewhere" / "b.zarr")
    assert problems(TeacherCache.open(tmp_path / "elsewhere" / "b.zarr")) == []


def test_provenance_differences_name_the_keys():
    other = Provenance({"name": "sam", "model": "vit_h"}, PROVENANCE.source, PROVENANCE.labels, 0)
    assert PROVENANCE.differences(PROVENANCE) == []
    assert PROVENANCE.differences(other) == [
        "teacher.model: 'absent' there, 'vit_h' asked for",
        "teacher.name: 'toy' there, 'sam' asked for",
    ]


@pytest.mark.parametrize("spec", [{"images": 0}, {"images": 5}, {"shard_images": 3}, {"shard_images": 0}])
def test_impossible_stores_are_refused(spec):
    with pytest.raises(ValueError, match="image"):
        dataclasses.replace(SPEC, **spec)
