"""Evaluation in two steps: predict once into a file of features, then evaluate what is stored.

An evaluation has a folder; every method has a folder in it, with ``features.h5`` and ``results.json``. Beside them
stand ``table.md`` and figures of all methods that were evaluated on the same data.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from samfeat.pipelines.extract import Progress, extract_images
from samfeat.pipelines.features.formats import Features, read_features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.features.peers import StoredFeatures
from samfeat.pipelines.files import write_bytes, write_json

EVALUATIONS = {
    "hpatches": "samfeat.pipelines.evaluation.hpatches:evaluate_hpatches",
    "reconstruct": "samfeat.pipelines.evaluation.reconstruction:evaluate_reconstruct",
    "localize": "samfeat.pipelines.evaluation.localization:evaluate_localize",
    "pose": "samfeat.pipelines.evaluation.pose:evaluate_pose",
    "edges": "samfeat.pipelines.evaluation.boundaries:evaluate_edges",
}
"""Where each evaluation is: a function of (data, output, *, method, name, overwrite, progress) that writes table.md."""

PICTURES = 4  # pairs in a picture of matches
Pair = TypeVar("Pair")


def find_evaluation(name: str) -> Callable[..., dict[str, Any]]:
    """The function of an evaluation, see ``EVALUATIONS``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in EVALUATIONS:
        raise ValueError(f"unknown evaluation {name!r}: choose one of {', '.join(EVALUATIONS)}")
    module, function = EVALUATIONS[name].split(":")
    return getattr(importlib.import_module(module), function)


def predict(
    paths: Mapping[str, Path],
    output: str | Path,
    *,
    method: Method,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Callable[[str], Features]:
    """Features of images, computed where they are not stored yet.

    Args:
        paths: image by name.
        output: HDF5 file that keeps the features; not written where the method reads a file of its own.
        method: what computes them.
        overwrite: compute them anew.
        progress: called with (done, total) after every image that had to be computed.

    Returns:
        a function from a name to its features, read from the file.

    Raises:
        ValueError: an image cannot be read, or the method's file has no features of it; or the stored features come
            from another configuration or other images.
    """
    if isinstance(method, StoredFeatures):
        missing = method.missing(paths)
        if missing:
            raise ValueError(
                f"{method.path} has no features of {len(missing)} of {len(paths)} images, the first is {missing[0]!r}: "
                "extract them too, and name them so"
            )
        return method.read
    extraction = extract_images(paths, output, method=method, overwrite=overwrite, verify=True, progress=progress)
    if extraction.failed:
        raise ValueError(f"{len(extraction.failed)} image(s) cannot be read: {next(iter(extraction.failed.values()))}")

    def features(name: str) -> Features:
        with h5py.File(output, "r") as file:
            return read_features(file, name)

    return features


def write_results(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Writes ``results.json`` of one method; ``results`` must tell the ``name`` of the method and the ``dataset``."""
    return write_json(Path(folder) / "results.json", dict(results))


def collect_results(
    folder: str | Path, dataset: Mapping[str, Any], *, replacing: str | None = None
) -> list[dict[str, Any]]:
    """Every method's results below an evaluation folder, in alphabetical order.

    Args:
        folder: the folder of the evaluation.
        dataset: what all results must have been measured on, so that one table may hold them.
        replacing: name of a method whose results are left out, because they are about to be replaced.

    Raises:
        ValueError: some results were measured on another ``dataset``.
    """
    paths = [path for path in sorted(Path(folder).glob("*/results.json")) if path.parent.name != replacing]
    found = [json.loads(path.read_text()) for path in paths]
    others = [results["name"] for results in found if results["dataset"] != dataset]
    if others:
        raise ValueError(
            f"{folder} holds results on other data ({', '.join(others)}): choose another output folder, or remove them"
        )
    return found


def write_table(path: str | Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Writes a :func:`markdown_table`."""
    return write_bytes(path, markdown_table(header, rows).encode())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """``PICTURES`` pairs to draw, spread evenly: the same ones for every method."""
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(PICTURES, len(pairs))).round().astype(int)]


def error_auc(errors: Sequence[float] | np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Area under the recall curve of errors up to each threshold, divided by it: in [0, 1], as SuperGlue computes it.

    Recall rises linearly from one sorted error to the next (Sarlin et al., CVPR 2020).

    Args:
        errors: one a pair, not negative; infinity for a failure.
        thresholds: positive, in the unit of the errors.

    Raises:
        ValueError: no error.
    """
    if len(errors) == 0:
        raise ValueError("the area under a recall curve needs at least one pair, got none")
    limits = np.concatenate([[0.0], np.sort(np.asarray(errors, np.float64))])
    recall = np.arange(len(limits)) / (len(limits) - 1)
    areas = []
    for threshold in thresholds:
        end = max(1, int(np.searchsorted(limits, threshold)))
        x, y = np.append(limits[:end], threshold), np.append(recall[:end], recall[end - 1])
        areas.append(float(np.trapezoid(y, x) / threshold))
    return areas
