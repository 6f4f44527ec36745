"""Benchmark feature extraction: SAMFeat in every precision next to other methods, in one interleaved run.

Each round runs all contenders one after the other, so that temporary load affects them all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
import torch

from samfeat.files import write_bytes
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.methods import load_method, peer_weights
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.training.processes import has_bf16
from samfeat.student.exported import ExportedNetwork
from samfeat.student.extractor import DTYPES, SAMFeat
from samfeat.student.inference import InferenceNetwork

Contender = Callable[[], object]


class Timing(NamedTuple):
    """Time and memory of one contender.

    Attributes:
        name: the contender.
        median, minimum: milliseconds per image.
        memory: peak that one call adds to the resident memory (CPU) or to the allocated memory (GPU), MiB.
    """

    name: str
    median: float
    minimum: float
    memory: float


def precisions(device: str) -> list[str]:
    """Precisions supported in hardware: ``fp32`` first, then ``bf16`` and ``fp16`` if they are fast."""
    narrow = ["bf16"] if has_bf16(torch.device(device)) else []
    return ["fp32", *narrow, *(["fp16"] if device.startswith("cuda") else [])]


def samfeat_contenders(
    model: SAMFeat, images: Sequence[np.ndarray], *, precision: str, compiled: bool = False, name: str = "SAMFeat"
) -> dict[str, Contender]:
    """The network alone and the whole extraction of ``images``, uint8 [H, W, 3] of one size, in one precision.

    Args:
        model: the extractor; a copy of it with another precision is measured.
        images: one call extracts them all; H and W multiples of 16.
        precision: ``fp32``, ``bf16`` or ``fp16``; an ONNX model has one of its own.
        compiled: whether ``torch.compile`` is used.
        name: prefix of the row names.
    """
    device, exported = model.device, isinstance(model.network, ExportedNetwork)
    network: Any = model.network
    extractor = model
    if not exported:
        options = dataclasses.asdict(model.extraction) | {"precision": precision}
        extractor = SAMFeat(network=model.network, **options)
        network = InferenceNetwork(model.network, dtype=DTYPES[precision], edge_gain=model.extraction.edge_gain)
    if compiled:
        mode: dict[str, Any] = {"mode": "max-autotune"} if device.type == "cuda" else {}
        extractor.compile(**mode)
        network = torch.compile(network, **mode)
    pixels = torch.from_numpy(np.stack(images)).to(device)

    @torch.no_grad()
    def alone() -> None:
        network(pixels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def whole() -> None:
        for features in extractor.extract(list(images)):
            features["descriptors"].cpu()

    label = f"{name} {precision}{', compiled' if compiled else ''}"
    return {f"{label}, network": alone, f"{label}, features": whole}


def other_methods(peers: Path | None, *, max_keypoints: int, device: str) -> list[Method]:
    """SIFT and ORB, and the networks with weights in a folder, in files named xfeat*, aliked* or disk*.

    Raises:
        FileNotFoundError: the folder holds no such file.
    """
    found = [load_method(name, max_keypoints=max_keypoints) for name in ("sift", "orb")]
    if peers is None:
        return found
    return found + [
        load_method(name, weights=path, max_keypoints=max_keypoints, device=device)
        for name, path in peer_weights(peers).items()
    ]


def method_contender(method: Method, images: Sequence[np.ndarray]) -> Contender:
    """Run a method on one image after the other."""

    def run() -> None:
        for image in images:
            method(image)

    return run


def measure(
    contenders: Mapping[str, Contender], *, repeats: int, images: int = 1, progress: Progress | None = None
) -> list[Timing]:
    """Time all contenders in ``repeats`` interleaved rounds, after one that measures memory and is not timed.

    Args:
        contenders: function by name; what it starts must be finished when it returns.
        repeats: rounds.
        images: how many images one call handles; times are given for one.
        progress: called with (done, total) calls.
    """
    total, done = len(contenders) * (repeats + 1), 0
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            if repeat:
                start = time.perf_counter()
                contender()
                times[name].append(1e3 * (time.perf_counter() - start) / images)
            else:
                memory[name] = added_memory(contender)
            done += 1
            if progress:
                progress(done, total)
    return [Timing(name, statistics.median(found), min(found), memory[name]) for name, found in times.items()]


def added_memory(contender: Contender) -> float:
    """Peak memory that a call adds, MiB: allocated on a GPU where torch uses one, else resident (sampled)."""
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender()
        added = torch.cuda.max_memory_allocated() - before
        if added:
            return added / 2**20
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    contender()  # what stays (libraries, weights in another layout) is not counted
    _return_free_memory()
    start = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        contender()
    finally:
        stop.set()
        watcher.join()
    return max(0, peak[0] - start) / 2**20


def _return_free_memory() -> None:
    """Return freed memory to the system: a call that reused it would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Torch and OpenCV compute with ``count`` threads inside the block."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def photograph(size: tuple[int, int]) -> np.ndarray:
    """The benchmark photograph, uint8 [H, W, 3], resized to (height, width)."""
    import skimage.data

    return cv2.resize(skimage.data.stereo_motorcycle()[0], size[::-1], interpolation=cv2.INTER_AREA)


def parse_size(text: str) -> tuple[int, int]:
    """``HEIGHTxWIDTH`` as two numbers.

    Raises:
        ValueError: something else, or not multiples of 16.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size {text!r}: give HEIGHTxWIDTH, such as 480x640")
    size = int(height), int(width)
    if 0 in size or size[0] % 16 or size[1] % 16:
        raise ValueError(f"size {text!r}: height and width must be multiples of 16, such as 480x640")
    return size


def benchmark_speed(
    out: str | Path,
    *,
    models: Mapping[str, SAMFeat],
    methods: Sequence[Method],
    size: tuple[int, int],
    threads: int,
    batch: int = 1,
    compiled: bool = False,
    repeats: int = 7,
    progress: Progress | None = None,
) -> list[Timing]:
    """Measure extractors and methods side by side on one photograph, and write the table.

    Args:
        out: the table, in Markdown.
        models: extractors by name, each measured in every precision its device is fast in.
        methods: other features, end to end.
        size: (height, width) of the photograph, multiples of 16.
        threads: of torch and OpenCV.
        batch: images in one call of SAMFeat (times are for one image); methods take one after the other.
        compiled: measure SAMFeat compiled as well.
        repeats: timed rounds.
        progress: called with (done, total) calls.
    """
    images = [photograph(size)] * batch
    with using_threads(threads):
        contenders: dict[str, Contender] = {}
        for name, model in models.items():
            exported = isinstance(model.network, ExportedNetwork)
            for precision in [model.network.precision] if exported else precisions(str(model.device)):
                for compile_ in (False, True)[: 1 + (compiled and not exported)]:
                    contenders |= samfeat_contenders(model, images, precision=precision, compiled=compile_, name=name)
        contenders |= {f"{method.name}, features": method_contender(method, images) for method in methods}
        found = measure(contenders, repeats=repeats, images=batch, progress=progress)
    devices = {str(model.device) for model in models.values()}
    machine = torch.cuda.get_device_name() if any(d.startswith("cuda") for d in devices) else processor()
    heading = (
        f"{size[0]} x {size[1]} pixels, {batch} image{'s' * (batch > 1)} a call, {threads} threads, {machine}, "
        f"torch {torch.__version__}, {repeats} interleaved rounds; milliseconds an image."
    )
    write_bytes(out, f"{heading}\n\n{table(found)}\n".encode())
    return found


def table(timings: Sequence[Timing]) -> str:
    """Timings as a Markdown table."""
    rows = ["| what | median ms | least ms | images/s | added memory, MiB |", "|---|---|---|---|---|"]
    rows += [
        f"| {t.name} | {t.median:.1f} | {t.minimum:.1f} | {1e3 / t.median:.1f} | {t.memory:.0f} |" for t in timings
    ]
    return "\n".join(rows)


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
