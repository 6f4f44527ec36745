"""What do teachers know? Their embeddings and groups against human segmentations, and seconds per image.

    SAMFEAT_DATA=... python tests/benchmarks/bench_targets.py classical hed aliked=aliked-n16rot.pth [--images 50]

A teacher is a name, with =FILE where it needs weights. Two cells of an embedding should be alike where a person drew
them into one segment: ``margin`` is the mean cosine within segments minus that across, ``ROC AUC`` how well the cosine
ranks such pairs. ``covering`` is how well the best masks cover the human segments (Arbelaez et al. 2011: IoU weighted
by area). All segmentations of all people count alike. Writes a markdown table.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from sklearn.metrics import roc_auc_score

from samfeat.images import read_image
from samfeat.teacher_cache.schema import Masks
from samfeat.teacher_cache.teachers import make_teacher

PAIRS = 20_000  # of cells, per person and image


def cell_pairs(embedding: np.ndarray, segments: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of random pairs of cells, and whether both cells lie in one segment."""
    _, rows, columns = embedding.shape
    y = ((np.arange(rows) + 0.5) * segments.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * segments.shape[1] / columns).astype(int)
    labels = segments[np.ix_(y, x)].ravel()
    cells = embedding.reshape(len(embedding), -1).T
    cells = cells / np.linalg.norm(cells, axis=1, keepdims=True)
    first, second = rng.integers(0, len(cells), (2, PAIRS))
    return (cells[first] * cells[second]).sum(axis=1), labels[first] == labels[second]


def covering(masks: Masks, segments: np.ndarray) -> float:
    """Area-weighted IoU of every segment with its best mask."""
    flat, total = masks.stack.reshape(len(masks.stack), -1), 0.0
    for label in np.unique(segments):
        segment = (segments == label).ravel()
        both = flat[:, segment].sum(axis=1)
        union = flat.sum(axis=1) + segment.sum() - both
        total += segment.mean() * (both / union).max(initial=0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teachers", nargs="+")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("bench/targets.md"))
    arguments = parser.parse_args()
    data = Path(os.environ.get("SAMFEAT_DATA", "../shared/data")) / "edges" / "bsds500_val50"
    truths = sorted((data / "groundTruth").rglob("*.mat"))[: arguments.images]
    rows = [
        "| teacher | embedding | s/image | margin | ROC AUC | masks | covering |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for given in arguments.teachers:
        name, _, file = given.partition("=")
        teacher = make_teacher(name, checkpoint=Path(file) if file else None, device="cpu")
        rng, margins, ranks, covered, counts, seconds = np.random.default_rng(0), [], [], [], [], []
        for truth in truths:
            image = read_image(next((data / "images").rglob(f"{truth.stem}.*")))
            start = time.perf_counter()
            output = teacher(image[None])[0]
            seconds.append(time.perf_counter() - start)
            counts.append(len(output.masks.stack))
            for person in loadmat(truth)["groundTruth"].ravel():
                segments = person["Segmentation"][0, 0]
                cosines, same = cell_pairs(output.embedding, segments, rng)
                if 0 < same.sum() < len(same):
                    margins.append(cosines[same].mean() - cosines[~same].mean())
                    ranks.append(roc_auc_score(same, cosines))
                covered.append(covering(output.masks, segments))
        shape = " x ".join(map(str, output.embedding.shape))
        rows.append(
            f"| {teacher.name} | {shape} | {np.median(seconds):.2f} | {np.mean(margins):.3f} | {np.mean(ranks):.3f} "
            f"| {np.mean(counts):.0f} | {np.mean(covered):.3f} |"
        )
        print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(rows) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
