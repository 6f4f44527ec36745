"""Evaluations scene by scene: predict all features once, then match and measure each scene with each ratio."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from samfeat.pipelines.evaluation.protocol import Job, predict
from samfeat.pipelines.evaluation.sfm import digest
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method

RATIOS: tuple[float | None, ...] = (None, 0.8)
RATIO_MEANING = (
    "a match is kept if it is nearer than this multiple of the second best (none: every mutual nearest neighbour); 0.8 "
    "suits SIFT, while learned descriptors are published without"
)

F_co = TypeVar("F_co", covariant=True)
F = TypeVar("F")


class RunScene(Protocol[F_co]):
    """Match and measure one scene."""

    def __call__(
        self,
        folder: Path,
        features: Callable[[str], Features],
        *,
        config: Mapping[str, Any],
        progress: Progress | None,
    ) -> F_co:
        """Run the task and return its results.

        Args:
            folder: to write into.
            features: features of an image by its name in the scene.
            config: JSON values that the results depend on, including ``ratio``.
            progress: called with (steps done, 0).
        """


class SceneTask(NamedTuple, Generic[F]):
    """One evaluation on one scene.

    Attributes:
        images: photographs by name in the scene.
        identity: JSON values that identify this scene.
        steps: number of progress steps of ``run``.
        run: the task itself.
    """

    images: Mapping[str, Path]
    identity: Mapping[str, Any]
    steps: int
    run: RunScene[F]


def run_scenes(
    job: Job[Method], tasks: Mapping[str, SceneTask[F]], *, ratios: Sequence[float | None], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, F]]]:
    """Predict the features of all scenes, then run every scene's task with every ratio.

    Args:
        job: the method; a scene's output goes to ``<scene>/ratio-<ratio>`` in its folder. Progress counts extracted
            images and the tasks' steps.
        tasks: by name of the scene.
        ratios: of distances, see :func:`samfeat.student.matching.match`; None for none.
        settings: other JSON values that the results depend on.

    Returns:
        the fields shared by all results, and the tasks' results by scene and :func:`ratio_label`.

    Raises:
        ValueError: see :func:`samfeat.pipelines.evaluation.protocol.predict` and :meth:`Job.start`.
    """
    identities = {scene: dict(task.identity) for scene, task in tasks.items()}
    shared = job.start(identities)
    paths = {f"{scene}/{image}": path for scene, task in tasks.items() for image, path in task.images.items()}
    total = len(paths) + len(ratios) * sum(task.steps for task in tasks.values())

    def step(first: int) -> Progress | None:
        report = job.progress
        return report and (lambda done, _: report(first + done, total))

    features = predict(job, paths, progress=step(0))
    digests = {image: hashlib.sha256(path.read_bytes()).hexdigest() for image, path in paths.items()}
    done = len(paths)
    found: dict[str, dict[str, F]] = {}
    for scene, task in tasks.items():
        images = {image: digests[f"{scene}/{image}"] for image in task.images}
        config = {"method": shared["method"], "images_sha256": digest(images), "scene": identities[scene], **settings}

        def features_of(image: str, scene: str = scene) -> Features:
            return features(f"{scene}/{image}")

        for ratio in ratios:
            folder = job.folder / scene / f"ratio-{ratio_label(ratio)}"
            outcome = task.run(folder, features_of, config={**config, "ratio": ratio}, progress=step(done))
            found.setdefault(scene, {})[ratio_label(ratio)] = outcome
            done += task.steps
            if job.progress:
                job.progress(done, total)
    return shared, found


def check_ratios(ratios: Sequence[float | None]) -> None:
    """Refuse invalid ratios.

    Raises:
        ValueError: no ratio, a repeated one, or one outside (0, 1].
    """
    if not ratios or len(set(ratios)) < len(ratios) or any(r is not None and not 0 < r <= 1 for r in ratios):
        raise ValueError(f"ratios must be different numbers in (0, 1], or none, got {[*map(ratio_label, ratios)]}")


def ratio_label(ratio: float | None) -> str:
    """A ratio as shown in tables and results: ``none`` or a number."""
    return "none" if ratio is None else f"{ratio:g}"
