"""Photographs from fixed cameras as a source of pairs: the same view at different times of day and year."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from samfeat.images import list_images, read_image
from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.pairs import CoVisible, Cut, PairSource, Photograph
from samfeat.teacher_cache.sources.protocol import names_sha256, sha256_of


class AlignedSource(PairSource):
    """Pairs of photographs from one fixed camera: each sub-folder is one view, with all photographs below it.

    Any two photographs of a view are eligible. Both crops of a pair are at the same random position, and every pixel
    corresponds to itself: the points are a regular grid, and all of them are valid.

    Args:
        root: the folder of the views.
        crop_size: (height, width) of the crops.
        pairs_per_scene: items per view.
        seed: seed of every draw.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no view, or a view has a single photograph. Bad photographs are found by :meth:`item`.
    """

    def __init__(
        self,
        root: str | Path | UPath,
        *,
        crop_size: tuple[int, int] = (400, 400),
        pairs_per_scene: int = 100,
        seed: int = 0,
    ) -> None:
        self.root = UPath(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{root}: no such folder; give the folder that holds one sub-folder for each camera"
            )
        names, self.left_out, unnamed = list_images(self.root)
        self.left_out += [f"left out {each!r}: its name is not UTF-8, rename it" for each in unnamed]
        if alone := [name for name in names if "/" not in name]:
            self.left_out.append(f"left out {len(alone)} photographs in no sub-folder, such as {alone[0]}")
        views: dict[str, list[str]] = {}
        for view, _, name in (name.partition("/") for name in names if "/" in name):
            views.setdefault(view, []).append(name)
        if lonely := [view for view, some in views.items() if len(some) == 1]:
            raise ValueError(
                f"{self.root / lonely[0]} holds one photograph, a pair needs two: add one, or move it away"
            )
        self._views = {view: views[view] for view in sorted(views)}
        if not self._views:
            raise ValueError(f"no photographs in the sub-folders of {root}: give each fixed camera a sub-folder there")
        eligible = {name: np.array([*combinations(range(len(some)), 2)]) for name, some in self._views.items()}
        super().__init__(eligible, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)

    def file_of(self, name: str) -> UPath:
        """The file of a crop."""
        return self.root / name.rpartition("#")[0]

    @staticmethod
    def recognises(folder: UPath) -> bool:
        """Always False: a folder does not show whether the camera was fixed."""
        return False

    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, number and digest of the drawn pairs."""
        names = [f"{view} {self._views[view][i]} {self._views[view][j]}" for view, i, j in self._items]
        return {
            "kind": "aligned",
            "crop_size": list(self.crop_size),
            "pairs_per_scene": self.pairs_per_scene,
            "seed": self.seed,
            "number": len(self),
            "names_sha256": names_sha256(names),
        }

    def _co_visible(self, scene: str, first: int, second: int) -> CoVisible:
        return _AlignedPair((self._photograph(scene, first), self._photograph(scene, second)))

    def _photograph(self, view: str, index: int) -> Photograph:
        name = self._views[view][index]
        path = self.root / view / name
        data = path.read_bytes()
        return Photograph(name, f"{view}/{name}", sha256_of(data), read_image(data, name=str(path)))


class _AlignedPair:
    """Two photographs of one view, in which every pixel corresponds to itself."""

    def __init__(self, views: tuple[Photograph, Photograph]) -> None:
        self.views = views

    def cut(self, crop_size: tuple[int, int], rng: np.random.Generator) -> Cut | str:
        """Crops in the same place, anywhere in the photographs."""
        (height, width), (rows, columns) = crop_size, self.views[0].image.shape[:2]
        if self.views[1].image.shape != self.views[0].image.shape:
            return "they differ in size"
        if rows < height or columns < width:
            return f"they are smaller than the {width}x{height} crop"
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        box = (int(left), int(top), width, height)
        points = _grid(crop_size)
        return Cut((box, box), np.stack([points, points]), np.ones(POINTS, bool))


def _grid(size: tuple[int, int]) -> np.ndarray:
    """The centres of POINTS equal cells of a crop, row by row: float32 [POINTS, 2], (x, y)."""
    side = round(POINTS**0.5)
    y, x = ((np.arange(side) + 0.5) * length / side - 0.5 for length in size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(POINTS, 2).astype(np.float32)
