"""Which detector should be adapted? Repeatability of OpenCV's detectors, plain and after homographic adaptation.

    SAMFEAT_DATA=... python tests/benchmarks/bench_detectors.py [--photos 10] [--points 300] [--out bench/detectors.md]

Two sets, the same number of points a detector: photographs under known random homographies with photometric noise, and
the real pairs of the Oxford sequences. Takes a few minutes on one core; writes a markdown table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from samfeat.pipelines.metrics import repeatability
from samfeat.teacher_cache.keypoints import LabelConfig, adapt, opencv_detector, random_homography

SIDE = 400  # longer side of every image, the size of a training crop
RADII = (1, 3)  # pixels
QUICK = ("gftt", "harris", "fast", "orb", "sift", "akaze")  # kaze and brisk take ten times as long


class Views(NamedTuple):
    """Two images of one plane and the homography between them."""

    images: tuple[np.ndarray, np.ndarray]
    homography: np.ndarray


def photo_pairs(folder: Path, count: int, seed: int) -> Iterator[Views]:
    """Photographs and their warped, darkened or brightened, noisy copies."""
    files = sorted(folder.glob("*"))
    rng = np.random.default_rng(seed)
    for index in rng.choice(len(files), count, replace=False):
        image = resize(read(files[index]))[0]
        height, width = image.shape[:2]
        homography = random_homography((height, width), rng)
        warped = cv2.warpPerspective(image, homography, (width, height), borderMode=cv2.BORDER_REFLECT)
        changed = warped * rng.uniform(0.6, 1.4) + rng.uniform(-30, 30) + rng.normal(0, 6, warped.shape)
        yield Views((image, np.clip(changed, 0, 255).astype(np.uint8)), homography)


def oxford_pairs(folder: Path) -> Iterator[Views]:
    """Image 1 and each of images 2, 3 and 4 of every sequence."""
    for sequence in sorted(path for path in folder.iterdir() if path.is_dir()):
        first, scale0 = resize(read(sequence / "1.png"))
        for k in (2, 3, 4):
            other, scale1 = resize(read(sequence / f"{k}.png"))
            yield Views((first, other), scale1 @ np.loadtxt(sequence / f"H_1_{k}") @ np.linalg.inv(scale0))


def read(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3]."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def resize(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image with a longer side of ``SIDE``, and the homography of its pixels."""
    factor = SIDE / max(image.shape[:2])
    small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    y, x = np.divide(small.shape[:2], image.shape[:2])
    return small, np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])


def suppressed(points: np.ndarray, radius: int, count: int) -> np.ndarray:
    """The best ``count`` points of which no two are within ``radius`` in x and y, as the labels are."""
    kept: list[np.ndarray] = []
    for point in points[np.argsort(-points[:, 2], kind="stable")]:
        if len(kept) == count:
            break
        if not kept or np.abs(np.array(kept)[:, :2] - point[:2]).max(axis=1).min() > radius:
            kept.append(point)
    return np.array(kept, np.float32).reshape(-1, 3)


def row(name: str, config: LabelConfig, sets: dict[str, list[Views]], adapted: bool) -> str:
    """One line of the table: repeatability in both sets, points found, time an image."""
    detector = opencv_detector(name)
    cells, counts, start, images = [], [], time.process_time(), 0
    for pairs in sets.values():
        scores = []
        for pair in pairs:
            found = [
                adapt(image, detector, config, seed=k)
                if adapted
                else suppressed(detector(image), config.nms_radius, config.max_keypoints)
                for k, image in enumerate(pair.images)
            ]
            counts += [len(points) for points in found]
            images += 2
            size = pair.images[1].shape[:2]
            scores.append([repeatability(*found, pair.homography, size, radius=radius) for radius in RADII])
        cells += [f"{value:.3f}" for value in np.nanmean(scores, axis=0)]
    milliseconds = 1000 * (time.process_time() - start) / images
    kind = "adapted" if adapted else "plain"
    return f"| {name} | {kind} | {' | '.join(cells)} | {np.mean(counts):.0f} | {milliseconds:.0f} |"


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=10)
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--detectors", nargs="+", default=QUICK)
    parser.add_argument("--out", type=Path, default=Path("bench/detectors.md"))
    arguments = parser.parse_args()
    data = Path(os.environ.get("SAMFEAT_DATA", "../shared/data"))
    sets = {
        "photos": list(photo_pairs(data / "photos/images", arguments.photos, seed=0)),
        "oxford": list(oxford_pairs(data / "homography/oxford")),
    }
    cv2.setNumThreads(1)
    header = [f"{name} @{radius}px" for name in sets for radius in RADII]
    columns = ["detector", "", *header, "points", "ms / image"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print(*lines, sep="\n", flush=True)
    for name in arguments.detectors:
        for adapted in (False, True):
            config = LabelConfig(detector=name, max_keypoints=arguments.points, threshold=0)
            lines.append(row(name, config, sets, adapted))
            print(lines[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
