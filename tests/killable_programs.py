"""What tests run in processes that they kill. Each program calls ``send`` with the messages its test waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import TABLES, config, run_study
from toys import LABELS, ToySource, ToyTeacher
from upath import UPath

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.train import train
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.store.lock import lock_store

Send = Callable[[Any], None]


class SlowTeacher(ToyTeacher):
    """Gives the toy teacher's output, after a while."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        time.sleep(self.pause * len(images))
        return super().__call__(images)


def build_store(
    send: Send,
    path: str | Path,
    items: int = 20,
    pause: float = 0.0,
    part: int = 0,
    parts: int = 1,
    workers: int = 0,
    shard_images: int = 4,
) -> None:
    """Write a store of toy crops; sends "started" after the first shard and "finished" at the end.

    Args:
        send: takes these messages and those that a user would see.
        path: of the store.
        items: pairs of crops.
        pause: seconds that the teacher takes for an image.
        part: which part of the shards, from 0.
        parts: how many parts there are.
        workers: processes; 0 for two threads.
        shard_images: images a shard.
    """
    started = []

    def progress(done: int, total: int) -> None:
        if not started and (done or not workers):  # workers are there once they have made something
            send("started")
            started.append(done)

    build_cache(
        path,
        ToySource(items),
        SlowTeacher(pause),
        labels=LABELS,
        shard_images=shard_images,
        workers=Workers(processes=workers) if workers else Workers(threads=2),
        part=(part, parts),
        progress=progress,
    )
    send("finished")


def hold_store(send: Send, store: UPath) -> None:
    """Lock a store for a minute; sends "held"."""
    with lock_store(store):
        send("held")
        time.sleep(60)


def train_on(send: Send, cache: Path, folder: Path, overrides: list[str]) -> None:
    """Train, or resume the training, in ``folder``; sends the number of every step."""
    train(cache, folder, config(*overrides), resume=True, progress=lambda state: send(state.step))


def study_on(send: Send, cache: Path, folder: Path) -> None:
    """Run the first table of the toy study; sends (done, total)."""
    run_study(cache, folder, tables={"A": TABLES["A"]}, progress=lambda *done: send(done))
