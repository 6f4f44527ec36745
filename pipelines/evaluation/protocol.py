"""The interface of an evaluation, and what all evaluations share.

An evaluation has an output folder; every method has a folder in it, with its predictions and ``results.json``. The
table and the figures beside them cover all methods evaluated on the same data.
"""

from __future__ import annotations

import dataclasses
import json
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import h5py
import numpy as np

from samfeat.pipelines.extract import Progress, extract_images
from samfeat.pipelines.features.formats import Features, read_features
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.features.stored import StoredFeatures
from samfeat.pipelines.pictures.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = 4  # pairs in a picture of matches
Item = TypeVar("Item")
Value = TypeVar("Value")


class Named(Protocol):
    """Anything that can be evaluated: a name, and JSON values that identify everything its predictions depend on."""

    @property
    def name(self) -> str:
        """Short name, part of file names."""

    @property
    def config(self) -> Mapping[str, Any]:
        """JSON values."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Contents of a method's ``results.json``. Every evaluation adds its own fields.

    Attributes:
        name: name of the method in tables and figures.
        method: its configuration.
        dataset: JSON values that identify the data; a table never mixes data sets.
    """

    name: str
    method: dict[str, Any]
    dataset: dict[str, Any]


M = TypeVar("M", bound=Named)
R = TypeVar("R", bound=Results)


@dataclass(frozen=True, kw_only=True)
class Job(Generic[M]):
    """The evaluation of one method on one data set.

    Attributes:
        data: where the data is.
        output: folder of the evaluation, for any number of methods.
        method: what is evaluated.
        name: name of the method in the output.
        overwrite: recompute stored predictions.
        progress: called with (done, total).
    """

    data: Path
    output: Path
    method: M
    name: str
    overwrite: bool = False
    progress: Progress | None = None

    @property
    def folder(self) -> Path:
        """The folder of this method."""
        return self.output / self.name

    def start(self, dataset: Mapping[str, Any]) -> dict[str, Any]:
        """The fields shared by all results. Call it once the data is known, before anything is computed.

        Raises:
            ValueError: the output holds results of another method on another ``dataset``.
        """
        values = json.loads(json.dumps(dict(dataset)))
        others = [
            stored["name"]
            for path in sorted(self.output.glob("*/results.json"))
            if path.parent.name != self.name and (stored := json.loads(path.read_text()))["dataset"] != values
        ]
        if others:
            raise ValueError(
                f"{self.output} holds results on other data ({', '.join(others)}): "
                "choose another output folder, or remove them"
            )
        return {"name": self.name, "method": dict(self.method.config), "dataset": values}


class Evaluation(ABC, Generic[M, R]):
    """A way of measuring methods: a dataclass whose fields, all with defaults, are its options.

    Attributes:
        results: the class of its results.
        title: what is measured, in a few words (for the page).
        meaning: the same, in a sentence or two.
    """

    results: ClassVar[type[Results]]
    title: ClassVar[str] = ""
    meaning: ClassVar[str] = ""

    def load_method(
        self, name: str, *, weights: Path | None = None, max_keypoints: int | None = None, device: str = "auto"
    ) -> M:
        """Load what is evaluated, by name: a feature extractor, unless an evaluation overrides this.

        Raises:
            ValueError: unknown name, or weights missing, superfluous or damaged.
            FileNotFoundError: the weights do not exist.
        """
        return load_method(name, weights=weights, max_keypoints=max_keypoints, device=device)  # type: ignore[return-value]

    @abstractmethod
    def run(self, job: Job[M]) -> R:
        """Read the data, call :meth:`Job.start`, predict what is not stored, measure, and draw the method's pictures.

        Raises:
            OSError: missing data.
            ValueError: bad data; predictions of another configuration or other data; or other results in the output.
        """

    @abstractmethod
    def table(self, found: Sequence[R]) -> Table:
        """The results of all methods on the same data."""

    def figures(self, found: Sequence[R]) -> dict[str, Figure]:
        """Plots of the results, by file name."""
        return {}

    def draw(self, job: Job[M], found: Sequence[R]) -> None:
        """Write other pictures of all methods, if any, into ``job.output``."""


def predict(
    job: Job[Method], paths: Mapping[str, Path], *, progress: Progress | None = None
) -> Callable[[str], Features]:
    """Features of images; those not stored yet are computed into ``features.h5``.

    Args:
        job: whose method computes them.
        paths: image by name.
        progress: called with (done, total) after every computed image; the job's own by default.

    Returns:
        a function from a name to its features, read from that file (or from the method's own file).

    Raises:
        ValueError: an image cannot be read, or the method's file has no features of it; or the stored features come
            from another configuration or other images.
    """
    method, store = job.method, job.folder / "features.h5"
    if isinstance(method, StoredFeatures):
        read, stored_names = method.read, method.stored_names(paths)
        return lambda name: read(stored_names[name])
    extraction = extract_images(
        paths, store, method=method, overwrite=job.overwrite, verify=True, progress=progress or job.progress
    )
    if extraction.failed:
        raise ValueError(f"{len(extraction.failed)} image(s) cannot be read: {next(iter(extraction.failed.values()))}")

    def features(name: str) -> Features:
        with h5py.File(store, "r") as file:
            return read_features(file, name)

    return features


def shown_pairs(pairs: Sequence[Item]) -> list[Item]:
    """``PICTURES`` evenly spaced pairs to draw, the same for every method."""
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(PICTURES, len(pairs))).round().astype(int)]


def read_results(path: Path, kind: type[R]) -> R:
    """The results in a file.

    Raises:
        ValueError: another version wrote it.
    """
    try:
        return _from_json(kind, json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version ({error}): evaluate that method again") from None


def _from_json(kind: Any, value: Any) -> Any:
    """Dataclasses, tuples and dictionaries of type ``kind`` from plain JSON values."""
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: _from_json(hints[key], part) for key, part in value.items()})  # type: ignore[operator]
    if get_origin(kind) is dict:
        return {key: _from_json(arguments[1], part) for key, part in value.items()}
    if get_origin(kind) is list:
        return [_from_json(arguments[0], part) for part in value]
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _from_json(arguments[0], value)
    return value
