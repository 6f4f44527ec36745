"""Validation while training: matching accuracy on homographies of images, held out of training where possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samfeat.pipelines.config import Config, DataConfig, RunConfig
from samfeat.pipelines.homography import (
    STILL,
    ViewConfig,
    photometric,
    relight,
    sample_homographies,
    sample_views,
    warp,
    warp_smoothly,
)
from samfeat.pipelines.metrics import match_errors, mma, mutual_matches
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.store import TeacherCache

THRESHOLDS = (1, 3, 5)  # pixels
VIEWED = 3  # pairs that pictures are made of


class PairView(NamedTuple):
    """What the student finds in one validation pair.

    Attributes:
        name: of the image.
        left: uint8 [H, W, 3], the image itself.
        right: uint8 [H, W, 3], through a homography and with light and noise changes.
        points: float32 [2, M, 2], (x, y) of the mutual matches in the left and in the right view.
        errors: float64 [M], pixels between where a match is and where the homography has it.
        heatmap: float32 [H, W], probability of a keypoint in the left view.
        attention: float32 [h, w], positive.
        edges: float32 [h, w], probability of an edge in the left view.
        teacher: name of the teacher of the image.
        cached_edges: uint8 [H, W], the teacher's, 0 to 255.
    """

    name: str
    left: np.ndarray
    right: np.ndarray
    points: np.ndarray
    errors: np.ndarray
    heatmap: np.ndarray
    attention: np.ndarray
    edges: np.ndarray
    teacher: str
    cached_edges: np.ndarray


class Outcome(NamedTuple):
    """What a validation found.

    Attributes:
        figures: ``mma@1``, ``mma@3``, ``mma@5``: mean share of mutual matches within 1, 3, 5 pixels; ``matches``:
            mutual matches per pair; ``keypoints``: keypoints per image; ``held_out``: 1 if this run never trains on
            the images, 0 if it does; ``initialised``: 1 if it started from a student that may have seen them.
        views: some of the pairs, the same ones every time.
    """

    figures: dict[str, float]
    views: list[PairView]


def hold_out(stores: Sequence[TeacherCache], config: RunConfig) -> set[tuple[int, int]]:
    """Images that training never sees: whole scenes, or photographs of a scene where no whole scene can be spared.

    A scene is all that stands before a name's first ``/`` in a store of pairs, and one photograph in other stores. A
    photograph is held out with every crop of it. At most a quarter of all images is lost to training, the partners of
    held-out images included. The seed draws the order.

    Returns:
        (store, image), without images that failed in stage one; empty where nothing can be spared.
    """
    for scene_of in (_scene, _photograph):
        groups: dict[str, set[tuple[int, int]]] = {}
        for number, store in enumerate(stores):
            for image, name in enumerate(store.names):
                if image not in store.failures:
                    groups.setdefault(f"{number}/{scene_of(store, name)}", set()).add((number, image))
        usable = {image for group in groups.values() for image in group}
        limit = len(usable) // 4
        chosen: set[tuple[int, int]] = set()
        lost: set[tuple[int, int]] = set()
        for key in np.random.default_rng([config.seed, 2]).permutation(sorted(groups)):
            if len(chosen) >= config.validation_images:
                break
            partners = {(number, image ^ 1) for number, image in groups[key] if stores[number].spec.paired}
            together = lost | groups[key] | (partners & usable)
            if len(together) <= limit:
                chosen, lost = chosen | groups[key], together
        if chosen:
            return chosen
    return set()


def _scene(store: TeacherCache, name: str) -> str:
    return name.split("/")[0] if store.spec.paired else name


def _photograph(store: TeacherCache, name: str) -> str:
    return name.rpartition("#")[0] or name


class Validation:
    """A fixed set of homography pairs, with light and noise changes, and the student's matching accuracy on them.

    Args:
        stores: the stores.
        images: (store, image) to take the pairs from, evenly.
        config: how many images and pairs, how many keypoints, the seed.
        data: the distribution that training draws from as well: whole crops and their homographies, or windows onto
            them, every second pair with a quarter of the strength and the others with all of it.
        held_out: whether the images are held out of this run.
    """

    def __init__(
        self,
        stores: Sequence[TeacherCache],
        images: Sequence[tuple[int, int]],
        config: RunConfig,
        data: DataConfig,
        *,
        held_out: bool = True,
    ) -> None:
        self._origin = {"held_out": float(held_out), "initialised": float(bool(config.init))}
        picked = [images[i] for i in np.linspace(0, len(images) - 1, config.validation_pairs).round().astype(int)]
        generator = torch.Generator().manual_seed(config.seed + 1)
        clean = torch.from_numpy(np.stack([stores[store][image].image for store, image in picked]))
        clean = clean.permute(0, 3, 1, 2).float()
        size = (clean.shape[-2], clean.shape[-1])
        if data.views.size:
            views, self.homographies = _windows(clean, data.views, generator)
        else:
            self.homographies = sample_homographies(len(clean), size, generator=generator, config=data.homography)
            views = clean, photometric(warp(clean, self.homographies), generator=generator, probability=1.0)
        self.left, self.right = (view.round().to(torch.uint8) for view in views)
        viewed = np.linspace(0, len(picked) - 1, min(VIEWED, len(picked))).round().astype(int).tolist()
        self.viewed = {pair: _StoredImage.of(stores[picked[pair][0]], picked[pair][1]) for pair in viewed}

    def run(self, network: SAMFeatNetwork, config: Config, **options: Any) -> Outcome:
        """Judge a student by its ``max_keypoints`` best keypoints, however unsure of them it still is.

        Args:
            network: the student.
            config: of its run.
            **options: other extraction options that differ from the preset's.
        """
        chosen = {"max_keypoints": config.run.max_keypoints, "detection_threshold": 0.0} | options
        student = SAMFeat(config.network_preset, network=network, **chosen)
        errors, keypoints, views = [], [], []
        for pair, (left, right, homography) in enumerate(zip(self.left, self.right, self.homographies.numpy())):
            features = student.extract(left), student.extract(right)
            errors.append(match_errors(*features, homography))
            keypoints += [len(f["keypoints"]) for f in features]
            if pair in self.viewed:
                views.append(self._view(pair, network, features, errors[-1]))
        figures = {f"mma@{t}": float(value) for t, value in zip(THRESHOLDS, mma(errors, THRESHOLDS))}
        figures |= {"matches": float(np.mean([len(e) for e in errors])), "keypoints": float(np.mean(keypoints))}
        return Outcome(figures | self._origin, views)

    @torch.no_grad()
    def _view(
        self,
        pair: int,
        network: SAMFeatNetwork,
        features: tuple[dict[str, Tensor], dict[str, Tensor]],
        errors: np.ndarray,
    ) -> PairView:
        left, right, source = self.left[pair], self.right[pair], self.viewed[pair]
        keypoints = (f["keypoints"].cpu().numpy() for f in features)
        dense = network(left[None].to(next(network.parameters()).device) / 127.5 - 1)
        heatmap, attention, edges = (
            maps[0, 0].float().cpu().numpy() for maps in (dense.heatmap.sigmoid(), dense.attention, dense.edges)
        )
        return PairView(
            name=source.name,
            left=left.permute(1, 2, 0).numpy(),
            right=right.permute(1, 2, 0).numpy(),
            points=np.stack([k[rows] for k, rows in zip(keypoints, mutual_matches(*features).T)]),
            errors=errors,
            heatmap=heatmap,
            attention=attention,
            edges=edges,
            teacher=source.teacher,
            cached_edges=source.edges,
        )


def _windows(images: Tensor, config: ViewConfig, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two windows onto each image, as large as the image, and the homographies between them."""
    size = (images.shape[-2], images.shape[-1])
    whole = replace(config, size=min(size) // 8 * 8, mild=0.0)
    centres = images.new_tensor(((size[1] - 1) / 2, (size[0] - 1) / 2)).expand(2, len(images), 2)
    weak, strong = (
        sample_views(centres, size, generator=generator, config=whole, strength=strength) for strength in (STILL, 1.0)
    )
    chosen = torch.where((torch.arange(len(images)) % 2 == 0)[None, :, None, None], weak, strong)
    left, right = (warp_smoothly(images, homographies, (whole.size, whole.size)) for homographies in chosen)
    between = (chosen[1].double() @ torch.linalg.inv(chosen[0].double())).float()
    return (relight(left, generator=generator), relight(right, generator=generator)), between


class _StoredImage(NamedTuple):
    """What the store says of an image that views are made of."""

    name: str
    teacher: str
    edges: np.ndarray

    @classmethod
    def of(cls, store: TeacherCache, image: int) -> _StoredImage:
        return cls(store.names[image], store.provenance.teacher["name"], store[image].edges)
