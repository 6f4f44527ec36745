"""Validation while training: matching accuracy on homographies of images that training never sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samfeat.pipelines.config import Config, RunConfig
from samfeat.pipelines.evaluation.hpatches import match_errors, mma
from samfeat.pipelines.homography import HomographyConfig, photometric, sample_homographies, warp
from samfeat.pipelines.match import mutual_matches
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.store import TeacherCache

THRESHOLDS = (1, 3, 5)  # pixels
VIEWED = 3  # pairs that pictures are made of


class View(NamedTuple):
    """What the student makes of one validation pair.

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
            mutual matches a pair; ``keypoints``: keypoints an image.
        views: some of the pairs, the same ones every time.
    """

    figures: dict[str, float]
    views: list[View]


def hold_out(stores: Sequence[TeacherCache], config: RunConfig) -> set[tuple[int, int]]:
    """Images kept out of training: whole scenes (all that stands before the name's first ``/``) until there are enough.

    At most a quarter of all images; the scenes are drawn by the seed.

    Returns:
        (store, image) indices, failed images excluded.
    """
    scenes: dict[str, list[tuple[int, int]]] = {}
    for number, store in enumerate(stores):
        for image, name in enumerate(store.names):
            if image not in store.failures:
                scene = name.split("/")[0] if store.spec.paired else name
                scenes.setdefault(f"{number}/{scene}", []).append((number, image))
    limit = sum(map(len, scenes.values())) // 4
    order = np.random.default_rng([config.seed, 2]).permutation(sorted(scenes))
    chosen: set[tuple[int, int]] = set()
    for scene in order:
        if len(chosen) >= config.validation_images:
            break
        if len(chosen) + len(scenes[scene]) <= limit:
            chosen.update(scenes[scene])
    return chosen


class Validation:
    """A fixed set of homography pairs, with light and noise changes, and the student's matching accuracy on them.

    Args:
        stores: the stores.
        images: (store, image) to take the pairs from, evenly.
        config: how many images and pairs, how many keypoints, the seed.
        homography: the distribution that training draws from as well.
    """

    def __init__(
        self,
        stores: Sequence[TeacherCache],
        images: Sequence[tuple[int, int]],
        config: RunConfig,
        homography: HomographyConfig,
    ) -> None:
        picked = [images[i] for i in np.linspace(0, len(images) - 1, config.validation_pairs).round().astype(int)]
        generator = torch.Generator().manual_seed(config.seed + 1)
        clean = torch.from_numpy(np.stack([stores[store][image].image for store, image in picked]))
        clean = clean.permute(0, 3, 1, 2).float()
        size = (clean.shape[-2], clean.shape[-1])
        self.homographies = sample_homographies(len(clean), size, generator=generator, config=homography)
        noisy = photometric(warp(clean, self.homographies), generator=generator, probability=1.0)
        self.left, self.right = (views.round().to(torch.uint8) for views in (clean, noisy))
        viewed = np.linspace(0, len(picked) - 1, min(VIEWED, len(picked))).round().astype(int).tolist()
        self.viewed = {pair: _Source.of(stores[picked[pair][0]], picked[pair][1]) for pair in viewed}

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
        return Outcome(figures, views)

    @torch.no_grad()
    def _view(
        self,
        pair: int,
        network: SAMFeatNetwork,
        features: tuple[dict[str, Tensor], dict[str, Tensor]],
        errors: np.ndarray,
    ) -> View:
        left, right, source = self.left[pair], self.right[pair], self.viewed[pair]
        keypoints = (f["keypoints"].cpu().numpy() for f in features)
        dense = network(left[None].to(next(network.parameters()).device) / 127.5 - 1)
        heatmap, attention, edges = (
            maps[0, 0].float().cpu().numpy() for maps in (dense.heatmap.sigmoid(), dense.attention, dense.edges)
        )
        return View(
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


class _Source(NamedTuple):
    """What the store says of an image that views are made of."""

    name: str
    teacher: str
    edges: np.ndarray

    @classmethod
    def of(cls, store: TeacherCache, image: int) -> _Source:
        return cls(store.names[image], store.provenance.teacher["name"], store[image].edges)
