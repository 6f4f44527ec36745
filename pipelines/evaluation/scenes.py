"""Evaluations scene by scene: predict all features once, then run each scene's own task on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from samfeat.pipelines.evaluate import collect_results, predict, write_results
from samfeat.pipelines.evaluation.sfm import digest
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import Method


class SceneTask(NamedTuple):
    """What an evaluation does with one scene.

    Attributes:
        images: photograph by its name in the scene.
        identity: JSON values that tell this scene from any other.
        steps: what ``run`` counts to.
        run: function of (folder, features, *, config, progress) to JSON values: the folder to write into, a function
            from an image's name to its features, JSON values of all that the outcome depends on, and (done, total).
    """

    images: Mapping[str, Path]
    identity: Mapping[str, Any]
    steps: int
    run: Callable[..., dict[str, Any]]


def evaluate_scenes(
    tasks: Mapping[str, SceneTask],
    output: str | Path,
    *,
    method: Method,
    name: str,
    settings: Mapping[str, Any],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predicts the features of all scenes, then runs every scene's task.

    Args:
        tasks: by name of the scene.
        output: folder of this evaluation; each scene's own is ``<output>/<name>/<scene>``.
        method: what is evaluated.
        name: what the method is called in the output.
        settings: JSON values that the outcome of every scene depends on.
        overwrite: predict anew.
        progress: called with (done, total); images extracted and the tasks' steps count one each.

    Returns:
        what ``results.json`` then holds: ``name``, ``method`` (configuration), ``dataset`` (the identities),
        ``settings``, and in ``scenes`` what every task found.

    Raises:
        ValueError: see :func:`predict` and :func:`collect_results`.
    """
    dataset = {scene: dict(task.identity) for scene, task in tasks.items()}
    collect_results(output, dataset, replacing=name)
    own = Path(output) / name
    paths = {f"{scene}/{image}": path for scene, task in tasks.items() for image, path in task.images.items()}
    total = len(paths) + sum(task.steps for task in tasks.values())

    def step(first: int) -> Progress | None:
        return progress and (lambda done, _: progress(first + done, total))

    features = predict(paths, own / "features.h5", method=method, overwrite=overwrite, progress=step(0))
    digests = {image: hashlib.sha256(path.read_bytes()).hexdigest() for image, path in paths.items()}
    done, found = len(paths), {}
    for scene, task in tasks.items():
        images = {image: digests[f"{scene}/{image}"] for image in task.images}
        config = {"method": dict(method.config), "images_sha256": digest(images), "scene": dataset[scene], **settings}

        def features_of(image: str, scene: str = scene) -> Features:
            return features(f"{scene}/{image}")

        found[scene] = task.run(own / scene, features_of, config=config, progress=step(done))
        done += task.steps
        if progress:
            progress(done, total)
    results = {
        "name": name,
        "method": dict(method.config),
        "dataset": dataset,
        "settings": dict(settings),
        "scenes": found,
    }
    write_results(own, results)
    return results
