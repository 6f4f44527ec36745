"""How fast are the ONNX model and the matcher beside their counterparts? Writes bench/onnx.md.

    python tests/benchmarks/bench_onnx.py [--size 480x640] [--features 10000] [--repeats 3]

Variants take turns in one process and on one thread; figures are seconds, and ratios of the medians and of the minima.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import kornia
import numpy as np
import onnxruntime
import torch

from samfeat.student.extractor import SAMFeat
from samfeat.student.matching import match
from samfeat.student.onnx import export_onnx


def turns(variants: dict[str, Callable[[], object]], repeats: int) -> list[str]:
    """A table of the variants; ratios are to the first one."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    return [
        f"| {name} | {np.median(values):.3f} | {min(values):.3f} | {np.median(values) / np.median(base):.2f} "
        f"| {min(values) / min(base):.2f} |"
        for name, values in times.items()
    ]


def extractors(size: tuple[int, int], folder: Path) -> dict[str, Callable[[], object]]:
    """torch and onnxruntime on one image of noise, some thousand keypoints."""
    extractor = SAMFeat("default", detection_threshold=0.2, max_keypoints=2048)
    export_onnx(folder / "model.onnx", extractor)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    image = torch.rand((3, *size), generator=torch.Generator().manual_seed(0))
    return {
        "torch, SAMFeat.extract": lambda: extractor.extract(image),
        "onnxruntime": lambda: session.run(None, {"image": image[None].numpy()}),
    }


def matchers(count: int) -> dict[str, Callable[[], object]]:
    """Mutual nearest neighbours of unit descriptors of 128 numbers."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.nn.functional.normalize(torch.randn(count, 128, generator=generator), dim=1) for _ in range(2)
    )
    features = {"descriptors": first}, {"descriptors": second}

    def whole_matrix() -> object:
        similarity = first @ second.T
        return similarity.max(1), similarity.max(0)

    return {
        "match": lambda: match(*features),
        "match, ratio": lambda: match(*features, ratio=0.8),
        "whole matrix": whole_matrix,
        "kornia match_mnn": lambda: kornia.feature.match_mnn(first, second),
        "OpenCV crossCheck": lambda: cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(first.numpy(), second.numpy()),
    }


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="480x640", help="height x width")
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/onnx.md"))
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    header = "|  | median s | minimum s | ratio of medians | ratio of minima |\n|---|--:|--:|--:|--:|"
    with tempfile.TemporaryDirectory() as folder:
        rows = turns(extractors((height, width), Path(folder)), arguments.repeats)
    lines = [f"Extraction, {arguments.size}, CPU, one thread", "", header, *rows, ""]
    print(*lines, sep="\n", flush=True)
    rows = turns(matchers(arguments.features), arguments.repeats)
    more = [f"Matching, {arguments.features} x {arguments.features} x 128", "", header, *rows]
    print(*more, sep="\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines + more) + "\n")


if __name__ == "__main__":
    main()
