"""What does relation distillation cost? The one-pass loss against eq. 7-8 with whole matrices and autograd.

    python tests/benchmarks/bench_relation.py [--device cpu|cuda] [--pairs 2] [--repeats 9] [--out bench/relation.md]

One process, interleaved: medians and minima of forward and backward, the memory that each adds (resident and sampled on
the CPU, allocated on CUDA), and the gradients' difference from the whole matrices in float64. 50 x 50 positions, 256
channels; a teacher as stored has 64 x 64 positions, and is compared with one that is dequantised before the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import psutil
import torch
import torch.nn.functional as F
from figures import record
from torch import Tensor

from samfeat.student import relation
from samfeat.student.relation import relation_loss
from samfeat.teacher_cache.store.rows import quantize

SIDE, STORED_SIDE, CHANNELS = 50, 64, 256
Loss = Callable[[Tensor], Tensor]  # of the student


class Maps(NamedTuple):
    """Student and attention on the student's grid; the teacher on it, and as a store holds it, on a finer one."""

    student: Tensor
    attention: Tensor
    teacher: Tensor
    stored: Tensor
    scale: Tensor

    def whole(self) -> Tensor:
        """The stored teacher, dequantised."""
        return self.stored * self.scale[:, None]


def naive(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Equations 7 and 8 as they are printed, for autograd."""
    own, other = (F.normalize(maps.flatten(2), dim=1) for maps in (student, teacher))
    gap = (own.mT @ own - other.mT @ other).abs()
    scores = attention.flatten(2).mT @ attention.flatten(2)
    weights = scores.flatten(1).softmax(1)
    return (weights * gap.flatten(1)).sum(1).mean()


def contenders(maps: Maps, device: str) -> dict[str, tuple[Loss, str]]:
    """Name -> the loss and which teacher it sees."""

    def ours(student: Tensor) -> Tensor:
        return relation_loss(student, maps.teacher, attention=maps.attention)

    def dequantised(student: Tensor) -> Tensor:
        return relation_loss(student, maps.whole(), attention=maps.attention)

    def stored(student: Tensor) -> Tensor:
        return relation_loss(student, maps.stored, scale=maps.scale, attention=maps.attention)

    def whole(student: Tensor) -> Tensor:
        return naive(student, maps.teacher, maps.attention)

    def narrow(loss: Loss) -> Loss:
        def run(student: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return loss(student)

        return run

    def tiled(loss: Loss) -> Loss:
        def run(student: Tensor) -> Tensor:
            with patch.object(relation, "_fused_gap", lambda *_: None):
                return loss(student)

        return run

    found = {"whole matrices, float32": (whole, "teacher")}
    if device == "cuda":
        found["whole matrices, float32, compiled"] = (torch.compile(whole), "teacher")
        found["whole matrices, bfloat16, compiled"] = (torch.compile(narrow(whole)), "teacher")
        found["tiles of PyTorch, float32"] = (tiled(ours), "teacher")
        found["tiles of PyTorch, bfloat16"] = (tiled(narrow(ours)), "teacher")
    found["one pass, float32"] = (ours, "teacher")
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found["one pass, bfloat16"] = (narrow(ours), "teacher")
        found["one pass, bfloat16, teacher dequantised before"] = (narrow(dequantised), "stored")
        found["one pass, bfloat16, teacher as stored"] = (narrow(stored), "stored")
    return found


def gradient(loss: Loss, student: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    loss(student).backward()
    assert student.grad is not None
    return student.grad


def exact_gradients(maps: Maps) -> dict[str, Tensor]:
    """Of the whole matrices in float64, image by image."""
    resized = F.interpolate(maps.whole().double(), (SIDE, SIDE), mode="bilinear")
    found = {}
    for name, teacher in (("teacher", maps.teacher.double()), ("stored", resized)):
        images = zip(*(values.double()[:, None] for values in (maps.student, teacher, maps.attention)))
        found[name] = torch.cat([gradient(lambda s, t=t, a=a: naive(s, t, a), s) for s, t, a in images])
        found[name] /= len(teacher)
    return found


def added_memory(run: Callable[[], object], device: str) -> float:
    """Peak of resident memory above that before, or of allocated memory on CUDA, MiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    stop.set()
    watcher.join()
    return (peak[0] - before) / 2**20


def make_maps(images: int, device: str) -> Maps:
    """Smooth fields with noise, the student near its teacher."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(images, CHANNELS, 7, 7, generator=generator)
    teacher, finer = (F.interpolate(coarse, (side, side), mode="bicubic") for side in (SIDE, STORED_SIDE))
    teacher, finer = (maps + 0.2 * torch.randn(maps.shape, generator=generator) for maps in (teacher, finer))
    student = teacher + 0.5 * torch.randn(teacher.shape, generator=generator)
    attention = F.softplus(torch.randn(images, 1, SIDE, SIDE, generator=generator))
    stored = [quantize(embedding) for embedding in finer.numpy()]
    values, scale = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*stored))
    return Maps(*(maps.to(device) for maps in (student, attention, teacher, values, scale)))


def milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, help="2 on the CPU, 14 on CUDA")
    parser.add_argument("--repeats", type=int, help="9 on the CPU, 50 on CUDA")
    parser.add_argument("--out", type=Path, help="bench/relation.md, on CUDA bench/relation_cuda.md")
    arguments = parser.parse_args()
    device, cuda = arguments.device, arguments.device == "cuda"
    maps = make_maps(2 * (arguments.pairs or (14 if cuda else 2)), device)
    losses, exact = contenders(maps, device), exact_gradients(maps)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range((arguments.repeats or (50 if cuda else 9)) + 1):
        for name, (loss, _) in losses.items():
            took = milliseconds(lambda loss=loss: gradient(loss, maps.student), device)
            if repeat:
                times[name].append(took)
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    lines = [
        f"{len(maps.student)} images, {SIDE} x {SIDE} positions, {where}",
        "",
        "| loss | median ms | min ms | faster (medians) | (minima) | memory, MiB | gradient off by | its cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(times.values()))
    figures = {
        f"relation loss, {short}": statistics.median(first) / statistics.median(times[name])
        for short, name in (("fp32", "one pass, float32"), ("bf16", "one pass, bfloat16"))
    }
    differences: dict[str, float] = {}
    for name, (loss, teacher) in losses.items():
        found = gradient(loss, maps.student).double()
        off = float((found - exact[teacher]).norm() / exact[teacher].norm())
        differences[name] = off
        cosine = float(F.cosine_similarity(found.flatten(), exact[teacher].flatten(), dim=0))
        del found
        memory = statistics.median(
            added_memory(lambda loss=loss: gradient(loss, maps.student), device) for _ in range(5)
        )
        median, least = statistics.median(times[name]), min(times[name])
        lines.append(
            f"| {name} | {median:.1f} | {least:.1f} | {statistics.median(first) / median:.2f} "
            f"| {min(first) / least:.2f} | {memory:.0f} | {off:.1e} | {cosine:.5f} |"
        )
    out = arguments.out or Path("bench/relation_cuda.md" if cuda else "bench/relation.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figures["relation gradient, fp32"] = differences["one pass, float32"] / differences["whole matrices, float32"]
    record(figures, beside=out, device=device)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
