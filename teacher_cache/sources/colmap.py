"""COLMAP models as a source of pairs, from tracks or, if available, from depth."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from upath import UPath

from samfeat.images import read_image
from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.sources.colmap_model import (
    Model,
    PosedImage,
    Workspace,
    beside_its_images,
    find_workspaces,
    read_depth,
    read_model,
)
from samfeat.teacher_cache.sources.pairs import (
    MIN_VALID,
    CoVisible,
    Cut,
    DepthPair,
    PairSource,
    PosedPhotograph,
    box_around,
    corner_response,
    crop,
    smaller,
    strongest,
)
from samfeat.teacher_cache.sources.protocol import Box, names_sha256, sha256_of

_CENTRES = 8  # shared points that crops are tried around


class ColmapSource(PairSource):
    """Pairs of images of COLMAP's models.

    :func:`~samfeat.teacher_cache.sources.colmap_model.find_workspaces` describes the folder layout.

    A pair (i, j) is eligible where j observes at least ``MIN_VALID`` 3-D points that i observes, and a share of
    ``min_overlap`` to ``max_overlap`` of all that i observes. Where both images have depth, their correspondences come
    from it, with the same checks as MegaDepth's. Otherwise they are the two observations of every shared point; the
    crops are placed around the one of ``_CENTRES`` random shared points with the most others nearby.

    Images are read as COLMAP reads them, without their EXIF orientation, and are never undistorted: points go
    through each camera's own model.

    Args:
        root: the folder.
        crop_size: (height, width) of the crops.
        pairs_per_scene: items per model.
        min_overlap: minimum share of the points of image i that j also observes. Tracks miss much of what two images
            have in common, so it is lower than the 0.5 of D2-Net, whose models have a thousand images each.
        max_overlap: maximum such share.
        seed: seed of every draw.

    Raises:
        ValueError: there is no model, one is damaged, or no pair passes the limits. Bad images are found by
            :meth:`item`.
    """

    def __init__(
        self,
        root: str | Path | UPath,
        *,
        crop_size: tuple[int, int] = (400, 400),
        pairs_per_scene: int = 100,
        min_overlap: float = 0.1,
        max_overlap: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= min_overlap <= max_overlap <= 1:
            raise ValueError(f"0 <= min_overlap <= max_overlap <= 1 is needed, got {min_overlap}, {max_overlap}")
        if UPath(root).protocol not in ("", "file"):
            raise ValueError(f"{root}: COLMAP reads its models from local folders alone; copy it to a disk")
        workspaces = find_workspaces(root)
        if not workspaces:
            raise ValueError(f"{root} holds no COLMAP model; give the folder of sparse/ and images/")
        self._overlap = (min_overlap, max_overlap)
        self._scenes: dict[str, tuple[Workspace, Model]] = {}
        eligible: dict[str, np.ndarray] = {}
        for workspace in workspaces:
            model = read_model(workspace.model.path)
            pairs = pairs_of(model, min_overlap=min_overlap, max_overlap=max_overlap)
            if len(pairs):
                found = beside_its_images(workspace, model)
                self._scenes[workspace.name], eligible[workspace.name] = (found, model), pairs
        if not eligible:
            raise ValueError(
                f"no two images of {root} share {MIN_VALID} points and {min_overlap:g} to {max_overlap:g} of what one "
                "of them observes; take more photographs of the same things"
            )
        super().__init__(eligible, crop_size=crop_size, pairs_per_scene=pairs_per_scene, seed=seed)

    def file_of(self, name: str) -> UPath | None:
        """The file of a crop; None where no model names it."""
        return self._files.get(name.rpartition("#")[0])

    @cached_property
    def _files(self) -> dict[str, UPath]:
        scenes = self._scenes.items()
        return {
            f"{name}/{image.name}": workspace.images / image.name
            for name, (workspace, model) in scenes
            for image in model.images
        }

    @staticmethod
    def recognises(folder: UPath) -> bool:
        """Whether a folder holds COLMAP models."""
        return bool(find_workspaces(folder))

    def provenance(self) -> dict[str, Any]:
        """Kind, parameters, digests of the models, images with depth, number and digest of the drawn pairs."""
        scenes = self._scenes.items()
        names = [
            f"{name} {self._scenes[name][1].images[i].name} {self._scenes[name][1].images[j].name}"
            for name, i, j in self._items
        ]
        return {
            "kind": "colmap",
            "crop_size": list(self.crop_size),
            "pairs_per_scene": self.pairs_per_scene,
            "overlap": list(self._overlap),
            "seed": self.seed,
            "models": {name: model.sha256 for name, (_, model) in scenes},
            "with_depth": {
                name: sum(workspace.depth_file(image.name) is not None for image in model.images)
                for name, (workspace, model) in scenes
            },
            "number": len(self),
            "names_sha256": names_sha256(names),
        }

    def _co_visible(self, scene: str, first: int, second: int) -> CoVisible:
        workspace, model = self._scenes[scene]
        images = model.images[first], model.images[second]
        depths = [workspace.depth_file(image.name) for image in images]
        if depths[0] is None or depths[1] is None:
            return TrackPair((_view(workspace, images[0]), _view(workspace, images[1])), images)
        return DepthPair((_view(workspace, images[0], depths[0]), _view(workspace, images[1], depths[1])))


def pairs_of(model: Model, *, min_overlap: float, max_overlap: float) -> np.ndarray:
    """The ordered pairs (i, j) of images, int64 [n, 2], with enough points in common: see :class:`ColmapSource`."""
    counts = np.array([len(image.ids) for image in model.images], np.int64)
    ids = np.concatenate([np.zeros(0, np.int64), *(image.ids for image in model.images)])
    known, columns = np.unique(ids, return_inverse=True)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    observes = csr_array((np.ones(len(ids), np.int32), columns, bounds), shape=(len(counts), len(known)))
    shared = (observes @ observes.T).tocoo()
    i, j = shared.coords
    overlap = shared.data / counts[i]
    keep = (i != j) & (shared.data >= MIN_VALID) & (overlap >= min_overlap) & (overlap <= max_overlap)
    pairs = np.stack([i[keep], j[keep]], axis=1).astype(np.int64)
    return pairs[np.lexsort(pairs.T[::-1])]


class TrackPair:
    """Two views without depth: correspondences are the observations of shared 3-D points."""

    def __init__(self, views: tuple[PosedPhotograph, PosedPhotograph], images: tuple[PosedImage, PosedImage]) -> None:
        self.views = views
        _, *rows = np.intersect1d(images[0].ids, images[1].ids, assume_unique=True, return_indices=True)
        self._points = [image.points[row] for image, row in zip(images, rows)]

    def cut(self, crop_size: tuple[int, int], rng: np.random.Generator) -> Cut | str:
        """Crops around a shared point that has many others near it in both images."""
        if smaller(self.views, crop_size):
            return f"an image is smaller than the {crop_size[1]}x{crop_size[0]} crop"
        best, boxes, chosen = 0, None, np.zeros(0, bool)
        for k in rng.permutation(len(self._points[0]))[:_CENTRES]:
            first, second = (box_around(points[k], view, crop_size) for points, view in zip(self._points, self.views))
            inside = _inside(self._points[0], first) & _inside(self._points[1], second)
            if inside.sum() > best:
                best, boxes, chosen = int(inside.sum()), (first, second), inside
        if boxes is None:
            return "no two observations of a point have room for crops"
        points0, points1 = (points[chosen] - box[:2] for points, box in zip(self._points, boxes))
        response = corner_response(crop(self.views[0].image, boxes[0]))
        cell = int(np.sqrt(response.size / POINTS)) if best > POINTS else 1
        points, valid = strongest(points0, points1, response, cell=cell)
        if valid.sum() < MIN_VALID:
            return f"only {int(valid.sum())} points of the model lie in both crops"
        return Cut(boxes, points, valid)


def _inside(points: np.ndarray, box: Box) -> np.ndarray:
    left, top, width, height = box
    return np.all((points >= (left, top)) & (points <= (left + width - 1, top + height - 1)), axis=1)


def _view(workspace: Workspace, image: PosedImage, depth: UPath | None = None) -> PosedPhotograph:
    path = workspace.images / image.name
    if not path.is_file():
        raise ValueError(f"{path} is missing; the model names it, so copy it there")
    data = path.read_bytes()
    picture = read_image(data, name=str(path), upright=False)
    if picture.shape[:2] != image.camera.size:
        (height, width), (rows, columns) = image.camera.size, picture.shape[:2]
        raise ValueError(f"{path} is {columns}x{rows} but its camera {width}x{height}; use the images of the model")
    found = None if depth is None else read_depth(depth, image)
    return PosedPhotograph(image.name, image.name, sha256_of(data), picture, image.camera, image.pose, found)
