"""The estimate of a run against the run itself, and against operations counted by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from toys import LABELS, ToySource, ToyTeacher, toy_store, tree_bytes

from samfeat.pipelines.plan_cache import make_plan
from samfeat.teacher_cache.store import TeacherCache


class Multiplying(ToyTeacher):
    """Multiplies two 64 x 64 matrices for every image, and takes a while."""

    def __call__(self, images):
        for _ in images:
            torch.ones(64, 64) @ torch.ones(64, 64)
        time.sleep(0.05 * len(images))
        return super().__call__(images)


@pytest.mark.parametrize("paired", [True, False])
def test_the_estimate_is_that_of_the_run(tmp_path, paired):
    source = ToySource(20, paired=paired)
    plan = make_plan(tmp_path / "a.zarr", source, Multiplying(), labels=LABELS, shard_images=8)
    assert not (tmp_path / "a.zarr").exists()
    images = 40 if paired else 20
    assert (plan.images, plan.shards, plan.missing) == (images, -(-images // 8), -(-images // 8))
    assert plan.image_flops == 2 * 64**3
    assert 0.05 < plan.image_seconds < 1
    assert plan.seconds == pytest.approx(plan.image_seconds * images)
    real = toy_store(tmp_path / "a.zarr", 20, paired=paired, shard_images=8)
    assert plan.image_bytes == pytest.approx(sum(real.stored_bytes().values()) / images, rel=0.3)


def test_a_store_that_is_there_counts_and_stays(tmp_path):
    toy_store(tmp_path / "a.zarr", 20, shard_images=8)
    TeacherCache.open(tmp_path / "a.zarr", writable=True).forget_shard(1)
    before = tree_bytes(tmp_path / "a.zarr")
    plan = make_plan(tmp_path / "a.zarr", ToySource(20), ToyTeacher(), labels=LABELS, shard_images=8)
    assert (plan.missing, plan.image_flops) == (1, 0)
    assert plan.seconds == pytest.approx(plan.image_seconds * 8)
    assert tree_bytes(tmp_path / "a.zarr") == before
    assert "40 images in 5 shards, 1 of them to make" in str(plan)


def test_nothing_usable_is_said(tmp_path):
    with pytest.raises(ValueError, match="none of the first images can be used: photo 0 is truncated"):
        make_plan(tmp_path / "a.zarr", ToySource(3, broken=(0, 1, 2)), ToyTeacher(), labels=LABELS)
    assert np.isfinite(make_plan(tmp_path / "a.zarr", ToySource(1), ToyTeacher(), labels=LABELS).seconds)
