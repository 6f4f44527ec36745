"""The README's picture, from what `make demo` left behind.

python tests/benchmarks/draw_demo.py [--demo demo] [--out docs/demo.jpg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from samfeat.images import read_image
from samfeat.pipelines.inspect_cache import tiles
from samfeat.pipelines.pictures.draw import panel
from samfeat.teacher_cache.store import open_stores

IMAGE, WIDTH = 10, 1400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/demo.jpg"))
    arguments = parser.parse_args()
    (store,) = open_stores(arguments.demo / "cache")
    rows = [
        tiles(store.record(IMAGE)),
        [
            (
                "matches on a real pair: green agree with one fundamental matrix",
                read_image(arguments.demo / "matches.png"),
            )
        ],
        [("learning", read_image(arguments.demo / "run" / "curves.png"))],
        [("accuracy on held-out sequences", read_image(arguments.demo / "evaluation" / "mma.png"))],
    ]
    arguments.out.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate([fitted(row) for row in rows])).save(arguments.out, quality=88)
    print(arguments.out)


def fitted(row: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """One row of pictures, as wide as all others."""
    across = sum(image.shape[1] / image.shape[0] for _, image in row)
    strip = panel([row], height=round((WIDTH - 12 * len(row)) / across))
    return np.pad(strip, ((0, 0), (0, max(0, WIDTH - strip.shape[1])), (0, 0)), constant_values=255)[:, :WIDTH]


if __name__ == "__main__":
    main()
