"""Small stand-ins that several tests share: a teacher that costs nothing, sources of crops, whole stores."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.keypoints import LabelConfig
from samfeat.teacher_cache.schema import POINTS, Provenance, Record, TeacherOutput
from samfeat.teacher_cache.sources.protocol import SourceItem
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers.masks import paint, sort_masks

SIZE = (64, 64)
LABELS = LabelConfig(homographies=2, max_keypoints=40)


class ToyTeacher:
    """Targets by thresholding the image's grey values: cheap, and a pure function of the image."""

    name = "toy"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "strength": self.strength}

    def embedding_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        return 8, image_size[0] // 8, image_size[1] // 8

    def __call__(self, images: np.ndarray) -> list[TeacherOutput]:
        return [self._output(image) for image in images]

    def _output(self, image: np.ndarray) -> TeacherOutput:
        grey = image.mean(axis=2)
        stack = np.stack([grey > level for level in (60, 110, 160)])
        stack = stack[stack.any(axis=(1, 2))]
        ys, xs = zip(*[(np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))) for m in stack]) if len(stack) else ((), ())
        table = np.array(
            [[m.sum(), 0.9, 0.95, x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1] for m, x, y in zip(stack, xs, ys)],
            np.float32,
        ).reshape(-1, 7)
        masks = sort_masks(stack, table)
        channels, rows, columns = self.embedding_shape(image.shape[:2])
        cells = grey.reshape(rows, 8, columns, 8).mean(axis=(1, 3))
        waves = np.arange(1, channels + 1)[:, None, None]
        embedding = np.round(127 * np.sin(waves * cells / 40)).astype(np.float32)
        embedding[0] = 127  # the largest value everywhere, so that a store gives the embedding back exactly
        embedding *= np.float32(self.strength / 128)
        edges = np.abs(np.gradient(grey)[1]).clip(0, 255).astype(np.uint8)
        return TeacherOutput(embedding, masks, paint(masks.stack), edges)


class ToySource:
    """Crops of random smooth textures; in paired mode the second image is the first one, moved by (2, 1) pixels."""

    def __init__(self, items: int, *, paired: bool = True, seed: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.items, self.paired, self.seed, self.broken = items, paired, seed, broken
        self.crop_size = SIZE

    def __len__(self) -> int:
        return self.items

    def provenance(self) -> dict[str, Any]:
        return {"kind": "toy", "number": self.items, "seed": self.seed}

    def item(self, k: int) -> SourceItem:
        if k in self.broken:
            raise ValueError(f"photo {k} is truncated: replace it")
        rng = np.random.default_rng([self.seed, k])
        large = np.kron(rng.integers(0, 255, (12, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        left = large[4 : 4 + SIZE[0], 4 : 4 + SIZE[1]]
        digest = hashlib.sha256(large.tobytes()).hexdigest()
        if not self.paired:
            return SourceItem((left,), (f"{k:03}.png",), ((4, 4, *SIZE[::-1]),), (digest,), None, None, None)
        right = large[5 : 5 + SIZE[0], 6 : 6 + SIZE[1]]
        points = (rng.random((POINTS, 2)) * (SIZE[0] - 1)).astype(np.float32)
        moved = points - np.float32([2, 1])
        valid = ((moved >= 0) & (moved <= SIZE[0] - 1)).all(axis=1)
        names = (f"scene{k % 3}/{k:03}.png#0", f"scene{k % 3}/{k:03}.png#1")
        boxes = ((4, 4, *SIZE[::-1]), (6, 5, *SIZE[::-1]))
        return SourceItem((left, right), names, boxes, (digest, digest), np.stack([points, moved]), valid, None)


def toy_store(path: Path, items: int = 6, *, paired: bool = True, shard_images: int = 4, **source: Any) -> TeacherCache:
    """A complete store of toy crops."""
    build_cache(
        path,
        ToySource(items, paired=paired, **source),
        ToyTeacher(),
        labels=LABELS,
        shard_images=shard_images,
        workers=Workers(threads=2),
    )
    return TeacherCache.open(path)


def toy_record(seed: int = 0, *, masks: int = 5, keypoints: int = 7) -> Record:
    """A record with random, consistent content, for a store of images of SIZE and embeddings of [8, 8, 8]."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    stack = np.zeros((masks, height, width), bool)
    for k in range(masks):
        top, left = rng.integers(0, 32, 2)
        stack[k, top : top + 30 - 5 * (k % 5), left : left + 25] = True
    table = np.zeros((masks, 7), np.float32)
    table[:, 0] = stack.sum(axis=(1, 2))
    ordered = sort_masks(stack, table)
    points = np.column_stack([rng.random((keypoints, 2)) * 63, np.linspace(1, 0.5, keypoints)]).astype(np.float32)
    output = TeacherOutput(
        rng.standard_normal((8, 8, 8)).astype(np.float32),
        ordered,
        paint(ordered.stack),
        rng.integers(0, 256, SIZE, dtype=np.uint8),
    )
    digest = hashlib.sha256(bytes([seed])).hexdigest()
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Record(f"scene/{seed:03}.png", digest, (seed, 2, 64, 64), image, output, points)


PROVENANCE = Provenance({"name": "toy"}, {"kind": "toy"}, {"detector": "gftt"}, 0, {"python": "3.11"})


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
