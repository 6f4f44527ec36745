"""The figures that the benchmarks are judged by: their bars, and all measurements in ``bench/figures.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from samfeat.pipelines.speed import processor
from samfeat.teacher_cache.schema import package_versions

VERSIONS = ("samfeat", "torch", "numpy", "opencv-python", "zarr", "onnxruntime")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


class Bar(NamedTuple):
    """What a figure has to reach.

    Attributes:
        value: the bar.
        best: whether higher or lower is better.
        unit: of the figure; ``x`` is a ratio to the named peer in the same run.
        meaning: what is measured.
    """

    value: float
    best: Literal["higher", "lower"]
    unit: str
    meaning: str


BARS = {
    "extraction, fp32": Bar(1.2, "higher", "x", "the plain network's time, to ours"),
    "extraction, bf16": Bar(3.0, "higher", "x", "the plain network's time in fp32, to ours in bf16"),
    "relation loss, fp32": Bar(3.0, "higher", "x", "time with whole matrices and autograd, to that of one pass"),
    "relation loss, bf16": Bar(7.0, "higher", "x", "the same in fp32, to one pass in bf16"),
    "relation gradient, fp32": Bar(1.0, "lower", "x", "its difference from float64, to that of whole matrices in fp32"),
    "training step, bf16": Bar(2.2, "higher", "x", "time of the plain fp32 step, to that in bf16"),
    "guidance, fp32": Bar(8.0, "lower", "%", "time that guidance adds to the step"),
    "guidance, bf16": Bar(12.0, "lower", "%", "time that guidance adds to the step"),
    "store, beside zarr": Bar(10.0, "higher", "x", "single reads per second, to those through zarr"),
    "store, beside pickles": Bar(8.0, "higher", "x", "single reads per second, to those of float32 pickles"),
    "store, beside memmap": Bar(0.85, "higher", "x", "single reads per second, to those of a memmap"),
    "store, size": Bar(0.30, "lower", "x", "bytes without the image, to those of float32 pickles"),
    "store, size on the student's grid": Bar(0.17, "lower", "x", "bytes of the targets, to those of float32 pickles"),
    "loader": Bar(3000.0, "higher", "images/s", "shuffled batches of 28 with images, two threads"),
    "mask decoder": Bar(1.8, "higher", "x", "segment_anything's time for 32 prompts, to ours, all masks"),
    "mask decoder, 40 % pass": Bar(2.5, "higher", "x", "the same, where 40 % of the prompts pass"),
    "masks to boxes": Bar(6.0, "higher", "x", "segment_anything's time, to ours"),
    "ViT-H, 1,024 prompts": Bar(7.3, "lower", "TFLOP", "arithmetic of an image"),
    "cluster": Bar(
        90.0, "higher", "%", "images per second of 8 simulated workers from the first images on, of the ideal"
    ),
}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure was measured on: processor or GPU, its flags, versions."""
    if device != "cpu":
        return {"processor": torch.cuda.get_device_name(device), "flags": [], "versions": package_versions(*VERSIONS)}
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        known = set()
    return {
        "processor": processor(),
        "flags": [flag for flag in FLAGS if flag in known],
        "versions": package_versions(*VERSIONS),
    }


def record(figures: dict[str, float], *, beside: Path, device: str = "cpu") -> None:
    """Append figures, by their name in :data:`BARS`, to ``figures.jsonl`` beside the table of a benchmark."""
    if unknown := set(figures) - set(BARS):
        raise ValueError(f"no bar is called {', '.join(sorted(unknown))}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    line = {"time": time.strftime("%Y-%m-%d %H:%M"), "threads": torch.get_num_threads(), "figures": figures}
    with (beside.parent / "figures.jsonl").open("a") as file:
        file.write(json.dumps(machine(device) | line) + "\n")
