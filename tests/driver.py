"""Stage one over toy crops in a process of its own, for tests that kill it: driver.py STORE [option=value ...]

Options: items, pause (seconds for an image), workers (processes), part (k,n), shard_images.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from toys import LABELS, ToySource, ToyTeacher

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.caching.cluster import Workers
from samfeat.teacher_cache.schema import Gifts


class SlowTeacher(ToyTeacher):
    """Gives the toy teacher's gifts, after a while."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def __call__(self, images: np.ndarray) -> list[Gifts]:
        time.sleep(self.pause * len(images))
        return super().__call__(images)


def main(path: str, *options: str) -> None:
    given = dict(option.split("=") for option in options)
    workers = int(given.get("workers", 0))
    first, count = map(int, given.get("part", "0,1").split(","))
    started = []

    def progress(done: int, total: int) -> None:
        if not started and (done or not workers):  # workers are there once they have made something
            print("started", flush=True)
            started.append(done)

    build_cache(
        path,
        ToySource(int(given.get("items", 20))),
        SlowTeacher(float(given.get("pause", 0))),
        labels=LABELS,
        shard_images=int(given.get("shard_images", 4)),
        workers=Workers(processes=workers) if workers else Workers(threads=2),
        part=(first, count),
        report=lambda text: print(text, flush=True),
        progress=progress,
    )
    print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
