"""Evaluation in two steps: predict once into a file of features, then evaluate what is stored.

An evaluation has a folder; every method has a folder in it, with ``features.h5`` and ``results.json``. Beside them
stand a table and a figure of all methods that were evaluated on the same data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from samfeat.pipelines.extract import Method, Progress, extract_images
from samfeat.pipelines.files import write_bytes, write_json
from samfeat.pipelines.formats import Features, read_features


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
        output: HDF5 file that keeps the features.
        method: what computes them.
        overwrite: compute them anew.
        progress: called with (done, total) after every image that had to be computed.

    Returns:
        a function from a name to its features, read from the file.

    Raises:
        ValueError: an image cannot be read; or the stored features come from another configuration or other images.
    """
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
    """Writes a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return write_bytes(path, "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
