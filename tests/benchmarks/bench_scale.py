"""Does stage one scale? A Dask cluster of many workers over many toy images, with a teacher that only takes its time.

    python tests/benchmarks/bench_scale.py [--images 100000] [--workers 8] [--latency 0.025] [--out bench/scale]

Scheduler, workers and client are processes of their own, as on a real cluster, and write one real store of small
crops (a store of full size would fill the disk, and a real teacher needs a GPU for each worker). Writes a figure and a
table: throughput against the ideal of workers / latency, what a task costs beside its work, memory of scheduler,
client and workers over time. By default it is over in a minute; the full size takes as long as the images do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from figures import record

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.schema import Masks, TeacherOutput
from samfeat.teacher_cache.sources.protocol import SourceItem
from samfeat.teacher_cache.store import TeacherCache

SIDE, CELLS, CHANNELS = 32, 4, 16


class TimedTeacher:
    """Gives empty targets after a while, as a GPU would."""

    name = "timed"

    def __init__(self, latency: float) -> None:
        self.latency = latency

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "latency": self.latency}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        return CHANNELS, CELLS, CELLS

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        time.sleep(self.latency * len(images))
        masks = Masks(np.zeros((0, SIDE, SIDE), bool), np.zeros((0, 7), np.float32))
        plane = np.zeros((SIDE, SIDE))
        embedding = np.zeros((CHANNELS, CELLS, CELLS), np.float32)
        return [TeacherOutput(embedding, masks, plane.astype(np.uint16), plane.astype(np.uint8)) for _ in images]


class NumberedSource:
    """Crops that show nothing but their number, with labels."""

    paired = False
    crop_size = (SIDE, SIDE)

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def provenance(self) -> dict[str, Any]:
        return {"kind": "numbered", "number": self.images}

    def item(self, k: int) -> SourceItem:
        image = np.full((SIDE, SIDE, 3), k % 251, np.uint8)
        keypoints = (np.array([[1.0, 2.0, 1.0]], np.float32),)
        return SourceItem((image,), (f"{k:08}",), ((0, 0, SIDE, SIDE),), (f"{k:064x}",), keypoints=keypoints)


class Memory(threading.Thread):
    """Resident memory of some processes and the number of images done, once a second."""

    def __init__(self, processes: dict[str, list[int]]) -> None:
        super().__init__(daemon=True)
        self.processes = {name: [psutil.Process(pid) for pid in pids] for name, pids in processes.items()}
        self.rows: list[dict[str, float]] = []
        self.done, self.begun, self.over = 0, time.perf_counter(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(1):
            sizes = {
                name: float(np.mean([process.memory_info().rss / 1e6 for process in some]))
                for name, some in self.processes.items()
            }
            self.rows.append({"seconds": time.perf_counter() - self.begun, "images": self.done, **sizes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.025, help="seconds for an image (0.025: 40 images/s)")
    parser.add_argument("--shard-images", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("bench/scale"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, summary = simulate(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, summary, arguments.out.with_suffix(".png"))
    lines = ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in summary.items())]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    record(
        {"cluster": float(summary["share of the ideal, from the first images on"].removesuffix("%"))},
        beside=arguments.out,
    )


def simulate(arguments: argparse.Namespace, folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    address = folder / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    dask = str(Path(sys.executable).parent / "dask")

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([dask, *command], env=environment, stderr=subprocess.DEVNULL)

    scheduler = start("scheduler", "--scheduler-file", str(address), "--port", "0", "--no-dashboard")
    workers = [
        start("worker", "--scheduler-file", str(address), "--nthreads", "1", "--no-dashboard", "--no-nanny")
        for _ in range(arguments.workers)
    ]
    try:
        while not address.exists():
            time.sleep(0.1)
        url = json.loads(address.read_text())["address"]
        wait_for_workers(url, arguments.workers)
        memory = Memory(
            {"scheduler": [scheduler.pid], "client": [os.getpid()], "worker": [worker.pid for worker in workers]}
        )
        first: list[float] = []

        def progress(done: int, _: int) -> None:
            memory.done = done
            if done and not first:
                first.append(time.perf_counter())

        memory.start()
        begun = time.perf_counter()
        build_cache(
            folder / "a.zarr",
            NumberedSource(arguments.images),
            TimedTeacher(arguments.latency),
            shard_images=arguments.shard_images,
            workers=Workers(scheduler=url),
            progress=progress,
        )
        seconds = time.perf_counter() - begun
        memory.over.set()
        memory.join()
        opened = time.perf_counter()
        cache = TeacherCache.open(folder / "a.zarr")
        assert not cache.missing()
        opened = time.perf_counter() - opened
    finally:
        for process in [*workers, scheduler]:
            process.kill()
            process.wait()
    first = next(row for row in memory.rows if row["images"])  # before, the workers import torch
    steady = (arguments.images - first["images"]) / (seconds - first["seconds"])
    tasks = -(-arguments.images // arguments.shard_images)
    work = arguments.images * arguments.latency
    ideal = arguments.workers / arguments.latency
    last = memory.rows[-1]
    early = memory.rows[min(len(memory.rows) - 1, 5)]
    return memory.rows, {
        "images": arguments.images,
        "workers": arguments.workers,
        "tasks": tasks,
        "seconds": f"{seconds:.1f}",
        "images/s": f"{arguments.images / seconds:.1f}",
        "ideal images/s": f"{ideal:.1f}",
        "share of the ideal": f"{arguments.images / seconds / ideal:.1%}",
        "share of the ideal, from the first images on": f"{steady / ideal:.1%}",
        "worker time beside the teacher, ms a task": f"{(seconds * arguments.workers - work) / tasks * 1e3:.1f}",
        "to open the store and list what is missing, s": f"{opened:.2f}",
        **{
            f"memory of the {name}, MB, after 5 s and at the end": f"{early[name]:.0f}, {last[name]:.0f}"
            for name in ("scheduler", "client", "worker")
        },
    }


def wait_for_workers(url: str, count: int) -> None:
    from distributed import Client

    with Client(url, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=120)


def draw(rows: list[dict[str, float]], summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seconds = [row["seconds"] for row in rows]
    left.plot(seconds, [row["images"] for row in rows], label=f"{summary['workers']} workers")
    ideal = float(summary["ideal images/s"])
    left.plot(seconds, [min(second * ideal, summary["images"]) for second in seconds], "--", label="ideal")
    left.set(xlabel="seconds", ylabel="images done", title="throughput")
    for name in ("scheduler", "client", "worker"):
        right.plot(seconds, [row[name] for row in rows], label=name if name != "worker" else "a worker (mean)")
    right.set(xlabel="seconds", ylabel="resident memory, MB", title="memory", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
