"""What does folding the network bring? The released extraction, written plainly, against SAMFeat's.

    python tests/benchmarks/bench_inference.py --weights runs/default/weights.safetensors [--images FOLDER] [--compile]
        [--size 480x640] [--threads 2] [--repeats 7] [--max-keypoints 2048] [--out bench/inference.md]

One process, interleaved: medians and minima of the whole extraction and their ratios to the plain one, the memory that
a call adds, and, over all images of the folder (default: one photograph), how many of the plain keypoints are found at
the same pixel, within one pixel, and the least and mean cosine of their descriptors. Subpixel refinement is off.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from figures import record
from reference_network import plain_extract

from samfeat.files import write_bytes
from samfeat.pipelines.extract import list_images
from samfeat.pipelines.speed import measure, parse_size, photograph, precisions, using_threads
from samfeat.student.extractor import SAMFeat


def agreement(plain: list[dict], found: list[dict]) -> tuple[float, float, float, float]:
    """Shares of plain keypoints found at the same pixel and within one pixel; least and mean cosine of the former."""
    same, near, cosines, total = 0, 0, [], 0
    for expected, other in zip(plain, found):
        distance = np.abs(expected["keypoints"][:, None] - other["keypoints"].numpy()[None]).max(axis=2)
        nearest = distance.argmin(axis=1)
        hit = distance.min(axis=1) < 1e-3
        total += len(hit)
        same += int(hit.sum())
        near += int((distance.min(axis=1) < 1.001).sum())
        first, second = expected["descriptors"][hit], other["descriptors"].numpy()[nearest[hit]]
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosines.append((first * second).sum(axis=1) / norms)
    cosine = np.concatenate(cosines)
    return same / total, near / total, float(cosine.min()), float(cosine.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--size", default="480x640")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-keypoints", type=int, default=2048)
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/inference.md"))
    arguments = parser.parse_args()
    size = parse_size(arguments.size)
    images = [photograph(size)]
    if arguments.images:
        paths = list_images(arguments.images).values()
        images = [cv2.resize(cv2.imread(str(p))[..., ::-1], size[::-1], interpolation=cv2.INTER_AREA) for p in paths]

    model = SAMFeat.from_pretrained(arguments.weights, max_keypoints=arguments.max_keypoints, subpixel=False)
    options = dataclasses.asdict(model.extraction)
    if arguments.threshold is not None:
        options["detection_threshold"] = arguments.threshold
    plain_options = dataclasses.replace(model.extraction, **options)
    models: dict[str, SAMFeat] = {}
    for precision in precisions("cpu"):
        for compiled in (False, True)[: 1 + arguments.compile]:
            name = f"SAMFeat {precision}{' compiled' if compiled else ''}"
            models[name] = SAMFeat(network=model.network, **(options | {"precision": precision}))
            if compiled:
                models[name].compile()
    network = model.network
    contenders = {"plain fp32": lambda: plain_extract(network, images[0], plain_options)}
    contenders |= {name: lambda m=m: m.extract(images[0]) for name, m in models.items()}
    with using_threads(arguments.threads):
        timings = measure(contenders, repeats=arguments.repeats)
        plain = [plain_extract(network, image, plain_options) for image in images]
        agreements = {name: agreement(plain, [m.extract(image) for image in images]) for name, m in models.items()}
    first = timings[0]
    lines = [
        f"{size[0]} x {size[1]} pixels, {arguments.threads} threads, torch {torch.__version__}, {arguments.repeats} "
        f"interleaved rounds; agreement over {len(images)} images with "
        f"{statistics.mean(len(p['scores']) for p in plain):.0f} keypoints on average",
        "",
        "| what | median ms | min ms | faster (medians) | (minima) | memory, MiB | same pixel | within 1 px "
        "| least cosine | mean cosine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for timing in timings:
        found = agreements.get(timing.name)
        shares = "| | | | |" if found is None else "| {:.2%} | {:.2%} | {:.5f} | {:.5f} |".format(*found)
        lines.append(
            f"| {timing.name} | {timing.median:.0f} | {timing.minimum:.0f} | {first.median / timing.median:.2f} "
            f"| {first.minimum / timing.minimum:.2f} | {timing.memory:.0f} {shares}"
        )
    write_bytes(arguments.out, ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    faster = {timing.name: first.median / timing.median for timing in timings}
    ours = {precision: f"SAMFeat {precision}" for precision in ("fp32", "bf16")}
    record(
        {f"extraction, {precision}": faster[name] for precision, name in ours.items() if name in faster},
        beside=arguments.out,
    )


if __name__ == "__main__":
    main()
