"""Validation while training: matching accuracy on homographies of images that training never sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from samfeat.pipelines.config import Config, RunConfig
from samfeat.pipelines.homography import HomographyConfig, photometric, sample_homographies, warp
from samfeat.pipelines.hpatches import match_accuracy
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.store import TeacherCache


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

    def run(self, network: SAMFeatNetwork, config: Config, **options: Any) -> dict[str, float]:
        """Figures of a student, from its ``max_keypoints`` best keypoints, however unsure of them it still is.

        Args:
            network: what to validate.
            config: of its run.
            **options: other extraction options that differ from the preset's.

        Returns:
            ``mma@1``, ``mma@3``, ``mma@5``: mean share of mutual matches within 1, 3, 5 pixels; ``matches``: mutual
            matches a pair; ``keypoints``: keypoints an image.
        """
        chosen = {"max_keypoints": config.run.max_keypoints, "detection_threshold": 0.0} | options
        student = SAMFeat(config.network_preset, network=network, **chosen)
        accuracy, matches, keypoints = [], [], []
        for left, right, homography in zip(self.left, self.right, self.homographies.numpy()):
            features = student.extract(left), student.extract(right)
            result = match_accuracy(features[0], features[1], homography, thresholds=(1, 3, 5))
            accuracy.append(result.accuracy)
            matches.append(result.matches)
            keypoints += [len(f["keypoints"]) for f in features]
        mean = np.mean(accuracy, axis=0)
        return {
            **{f"mma@{t}": float(value) for t, value in zip((1, 3, 5), mean)},
            "matches": float(np.mean(matches)),
            "keypoints": float(np.mean(keypoints)),
        }
