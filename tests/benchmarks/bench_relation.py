"""What does relation distillation cost? The one-pass loss against eq. 7-8 with whole matrices and autograd.

    python tests/benchmarks/bench_relation.py [--pairs 2] [--repeats 9] [--out bench/relation.md]

One process, interleaved: medians and minima of forward and backward, the memory that each adds (resident, sampled), and
the gradients' difference from the whole matrices in float64. 50 x 50 positions, 256 channels.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from samfeat.student.relation import relation_loss

SIDE, CHANNELS = 50, 256
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Equations 7 and 8 as they are printed, for autograd."""
    own, other = (F.normalize(maps.flatten(2), dim=1) for maps in (student, teacher))
    gap = (own.mT @ own - other.mT @ other).abs()
    scores = attention.flatten(2).mT @ attention.flatten(2)
    weights = scores.flatten(1).softmax(1)
    return (weights * gap.flatten(1)).sum(1).mean()


def ours(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    return relation_loss(student, teacher, attention=attention)


def ours_bf16(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return relation_loss(student, teacher, attention=attention)


def gradient(loss: Loss, student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    loss(student, teacher, attention).backward()
    assert student.grad is not None
    return student.grad


def added_memory(run: Callable[[], object]) -> float:
    """Peak of resident memory above that before, MiB."""
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


def features(images: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, attention: smooth fields with noise, the student near its teacher."""
    coarse = torch.randn(images, CHANNELS, 7, 7, generator=generator)
    teacher = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    teacher = teacher + 0.2 * torch.randn(teacher.shape, generator=generator)
    student = teacher + 0.5 * torch.randn(teacher.shape, generator=generator)
    return student, teacher, F.softplus(torch.randn(images, 1, SIDE, SIDE, generator=generator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/relation.md"))
    arguments = parser.parse_args()
    maps = features(2 * arguments.pairs, torch.Generator().manual_seed(0))
    contenders: dict[str, Loss] = {"whole matrices, float32": naive, "one pass, float32": ours}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        contenders["one pass, bfloat16"] = ours_bf16
    exact = gradient(naive, *(m.double() for m in maps))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(arguments.repeats + 1):
        for name, loss in contenders.items():
            start = time.perf_counter()
            gradient(loss, *maps)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    lines = [
        f"{2 * arguments.pairs} images, {SIDE} x {SIDE} positions, {torch.get_num_threads()} threads",
        "",
        "| loss | median ms | min ms | faster (medians) | (minima) | memory, MiB | gradient off by | its cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(times.values()))
    for name, loss in contenders.items():
        found = gradient(loss, *maps).double()
        off = float((found - exact).norm() / exact.norm())
        cosine = float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0))
        memory = statistics.median(added_memory(lambda loss=loss: gradient(loss, *maps)) for _ in range(5))
        median, least = statistics.median(times[name]), min(times[name])
        lines.append(
            f"| {name} | {median:.0f} | {least:.0f} | {statistics.median(first) / median:.2f} "
            f"| {min(first) / least:.2f} | {memory:.0f} | {off:.1e} | {cosine:.5f} |"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
