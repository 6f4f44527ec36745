"""Photographs that are missing, replaced or added between two runs of the same command."""

from __future__ import annotations

import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from toys import LABELS, ToySource, ToyTeacher, tree_bytes

from samfeat import cli
from samfeat.pipelines.build_cache import build_cache, grouped
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.store import TeacherCache, open_stores

CAT = skimage.data.chelsea()


def write_photo(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.roll(CAT, 20 * k, axis=1)[:100, :120])


@pytest.fixture
def photos(tmp_path):
    for k in range(6):
        write_photo(tmp_path / "photos" / f"{k}.png", k)
    return tmp_path / "photos"


@pytest.fixture
def build(tmp_path, caplog):
    """Build a store of a folder; returns the summary and what was logged."""
    caplog.set_level("INFO", "samfeat")

    def call(folder, *, kind="auto", store="a", **options):
        caplog.clear()
        settings = {"labels": LABELS, "shard_images": 2, "workers": Workers(threads=2)} | options
        source = open_source(folder, kind=kind, crop_size=64, pairs_per_scene=4 if kind == "aligned" else None)
        summary = build_cache(tmp_path / f"{store}.zarr", source, ToyTeacher(), **settings)
        return summary, [record.message for record in caplog.records]

    return call


def test_a_plain_rerun_tries_again_what_failed(tmp_path, photos, build):
    good = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(good[:200])
    summary, _ = build(photos)
    assert [name for name, _ in summary.failures] == ["3.png"]
    assert build(photos)[0].written == 0  # still damaged: nothing is made again
    (photos / "3.png").write_bytes(good)
    summary, lines = build(photos)
    assert (summary.written, summary.failures) == (2, [])
    assert lines == ["item 3 can be used now: the 2 images of its shard are made again"]
    build(photos, store="whole")
    assert tree_bytes(tmp_path / "a.zarr") == tree_bytes(tmp_path / "whole.zarr")


def test_another_pair_is_drawn_where_an_image_is_missing(tmp_path, build):
    for k in range(3):
        write_photo(tmp_path / "views" / "square" / f"{k}.png", k)
    (tmp_path / "views" / "square" / "1.png").write_bytes(b"no image")
    summary, _ = build(tmp_path / "views", kind="aligned")
    assert summary.failures == []
    assert len(summary.passed_over) == 1
    assert "1.png is not an image" in summary.passed_over[0]
    names = TeacherCache.open(tmp_path / "a.zarr").names
    assert {name.split("#")[0] for name in names} == {"square/0.png", "square/2.png"}
    with pytest.raises(ValueError, match=r"1\.png is not an image"):
        build(tmp_path / "views", kind="aligned", store="strict", strict=True)


def test_a_replaced_photograph_gets_new_targets_alone(tmp_path, photos, build):
    build(photos)
    before = tree_bytes(tmp_path / "a.zarr")
    write_photo(photos / "4.png", 11)
    summary, lines = build(photos)
    assert summary.written == 2
    assert lines == [f"{photos / '4.png'} has changed: the 2 images of its shard are made again"]
    build(photos, store="whole")
    after = tree_bytes(tmp_path / "a.zarr")
    assert after == tree_bytes(tmp_path / "whole.zarr")
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all("/c/2" in name or name == "done/sha256/2" for name in changed)
    os.utime(photos / "0.png")  # touched, and the same
    assert build(photos) == (build(photos)[0], [])


def test_a_photograph_of_pairs_that_is_replaced_is_noticed(tmp_path, build):
    for k in range(2):
        write_photo(tmp_path / "views" / "square" / f"{k}.png", k)
    build(tmp_path / "views", kind="aligned")
    assert build(tmp_path / "views", kind="aligned")[0].written == 0
    write_photo(tmp_path / "views" / "square" / "0.png", 9)
    assert build(tmp_path / "views", kind="aligned")[0].written == 8


def test_new_photographs_get_a_store_beside_the_first(tmp_path, photos, build):
    build(photos)
    before = tree_bytes(tmp_path / "a.zarr")
    for k in (6, 7, 8):
        write_photo(photos / "sub" / f"{k}.png", k)
    summary, lines = build(photos)
    assert lines == ["new photographs (3): a-2.zarr is made of them, beside a.zarr"]
    assert (summary.images, summary.written, summary.path.name) == (9, 3, "a-2.zarr")
    assert tree_bytes(tmp_path / "a.zarr") == before
    stores = open_stores(tmp_path)
    assert [store.names for store in stores] == [
        ["sub/6.png", "sub/7.png", "sub/8.png"],
        [f"{k}.png" for k in range(6)],
    ]
    summary, lines = build(photos)
    assert (summary.written, lines) == (0, [])
    write_photo(photos / "9.png", 9)
    write_photo(photos / "2.png", 12)
    summary, lines = build(photos)
    assert lines == [
        "new photographs (1): a-3.zarr is made of them, beside a.zarr",
        f"{photos / '2.png'} has changed: the 2 images of its shard are made again",
    ]
    assert (summary.images, summary.written) == (10, 3)


def test_crops_do_not_depend_on_the_store_they_are_in(tmp_path, photos, build):
    shutil.move(photos / "5.png", tmp_path / "5.png")
    build(photos)
    shutil.move(tmp_path / "5.png", photos / "5.png")
    build(photos)
    build(photos, store="whole")
    added, whole = TeacherCache.open(tmp_path / "a-2.zarr"), TeacherCache.open(tmp_path / "whole.zarr")
    np.testing.assert_array_equal(added[0].image, whole[5].image)
    np.testing.assert_array_equal(added[0].groups, whole[5].groups)


def test_photographs_that_have_gone_leave_their_targets(tmp_path, photos, build):
    build(photos)
    before = tree_bytes(tmp_path / "a.zarr")
    (photos / "1.png").unlink()
    summary, lines = build(photos)
    assert lines == ["a.zarr: 1 of its photographs have gone; their targets stay"]
    assert (summary.images, summary.written) == (6, 0)
    assert tree_bytes(tmp_path / "a.zarr") == before


def test_an_unfinished_store_is_finished_before_it_grows(photos, build):
    build(photos, part=(0, 2))
    write_photo(photos / "7.png", 7)
    with pytest.raises(ValueError, match="is unfinished, and its folder holds other photographs now: put back"):
        build(photos)


def test_other_pairs_are_refused_in_a_plain_sentence(tmp_path, build):
    for k in range(3):
        write_photo(tmp_path / "views" / "square" / f"{k}.png", k)
    build(tmp_path / "views", kind="aligned")
    write_photo(tmp_path / "views" / "square" / "3.png", 3)
    with pytest.raises(ValueError, match=r"begun with other images or pairs .* choose another --name") as error:
        build(tmp_path / "views", kind="aligned")
    assert "sha256" not in str(error.value)


def test_reasons_of_one_kind_are_one_line():
    reasons = [f"data/images/{k}.jpg is missing; the model names it, so copy it there" for k in range(200)]
    reasons.insert(5, "data/images/x.jpg is empty (0 bytes); copy the photograph again or remove it")
    assert grouped(reasons) == [(f"{reasons[0]} (the same of 1.jpg, 2.jpg, 3.jpg and 196 more)", 200), (reasons[5], 1)]


def test_the_line_at_the_end_says_what_is_stored(tmp_path, photos, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["samfeat-cli", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().err

    command = ("teacher-cache", "--data", photos, "--cache", tmp_path / "cache", "--crop-size", 64)
    for path in photos.iterdir():
        path.write_bytes(b"")
    code, err = run(*command, "--name", "none")
    assert code == 2
    assert "6 of 6 images could not be used, so there is nothing to train on" in err
    assert err.count("skipped") == 1
    assert "skipped 6 images" in err
    write_photo(photos / "0.png", 0)
    assert "5 of 6 images could not be used, the other 1 are stored" in run(*command, "--name", "none")[1]


def test_toys_without_files_are_built_as_ever(tmp_path):
    build_cache(tmp_path / "a.zarr", ToySource(3), ToyTeacher(), labels=LABELS)
    assert build_cache(tmp_path / "a.zarr", ToySource(3), ToyTeacher(), labels=LABELS).written == 0
