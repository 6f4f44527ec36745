"""Edge maps against human boundaries: ODS, OIS and AP as in the Berkeley benchmark (BSDS500).

Arbelaez, Maire, Fowlkes, Malik, "Contour Detection and Hierarchical Image Segmentation", PAMI 2011. An edge map is
thinned and cut at 99 thresholds. At each of them its pixels are assigned one to one to those of every person's
boundaries within 0.75 % of the image's diagonal. Recall counts assigned boundary pixels over all people; precision
counts pixels of the map that are assigned for at least one person.

Two things differ from the original program. Thinning happens once, before the map is cut, not after each cut. And of
all largest assignments the original takes the one of least distance, at each threshold anew; here stronger pixels come
first and distance second, which one assignment gives for all thresholds: the largest one at each (a matroid). So
recalls agree, and precisions may differ where a line of the map has several pixels for one of the boundary.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin
from scipy.io import loadmat
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from samfeat.files import write_bytes
from samfeat.images import IMAGE_SUFFIXES, read_image
from samfeat.pipelines.evaluation.edge_detectors import LEVELS, EdgeDetector, load_detector
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Results
from samfeat.pipelines.features.parts import check_config
from samfeat.pipelines.pictures.charts import precision_recall_chart
from samfeat.pipelines.pictures.draw import panel, save_png
from samfeat.pipelines.pictures.tables import Cell, Column, Table
from samfeat.teacher_cache.teachers.edges import thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 0.0075  # of the image's diagonal
GALLERY = 4  # photographs in the gallery


class Counts(NamedTuple):
    """Pixel counts of one image at the thresholds 1/100 to 99/100, int64 [99] each.

    Attributes:
        found: boundary pixels, over all annotators, that have an edge pixel assigned.
        drawn: boundary pixels over all annotators, the same at each threshold.
        right: edge pixels assigned for at least one annotator.
        edges: edge pixels.
    """

    found: np.ndarray
    drawn: np.ndarray
    right: np.ndarray
    edges: np.ndarray


def count(strength: np.ndarray, boundaries: Sequence[np.ndarray], *, tolerance: float = TOLERANCE) -> Counts:
    """Compare a thinned edge map with the boundaries of every annotator.

    Args:
        strength: [H, W] in [0, 1].
        boundaries: one [H, W] per annotator, non-zero on boundaries.
        tolerance: largest distance of an assignment, in lengths of the diagonal.

    Raises:
        ValueError: no boundaries, or sizes that differ.
    """
    if not boundaries or any(drawn.shape != strength.shape for drawn in boundaries):
        shapes = [drawn.shape for drawn in boundaries]
        raise ValueError(f"boundaries must have the size of the edge map, {strength.shape}, got {shapes}")
    levels = np.clip(np.floor(strength * LEVELS + 1e-4), 0, LEVELS - 1).astype(int)
    pixels, ranks = np.argwhere(levels), levels[levels > 0]
    reach = tolerance * float(np.hypot(*strength.shape))
    found = np.zeros(LEVELS, np.int64)
    right = np.zeros(len(pixels), bool)
    for drawn in boundaries:
        assigned = _assign(pixels, ranks, np.argwhere(drawn), reach)
        right[assigned] = True
        found += np.bincount(ranks[assigned], minlength=LEVELS)
    total = np.full(LEVELS - 1, sum(int(np.count_nonzero(drawn)) for drawn in boundaries))
    return Counts(
        _at_least(found), total, *(_at_least(np.bincount(r, minlength=LEVELS)) for r in (ranks[right], ranks))
    )


def _at_least(histogram: np.ndarray) -> np.ndarray:
    """Number of values at or above each of the levels 1 to 99."""
    return histogram[::-1].cumsum()[::-1][1:]


def _assign(pixels: np.ndarray, ranks: np.ndarray, drawn: np.ndarray, reach: float) -> np.ndarray:
    """Indices of the ``pixels`` [N, 2] that are assigned to one of ``drawn`` [M, 2] each, strong pixels first."""
    if len(pixels) == 0 or len(drawn) == 0:
        return np.zeros(0, int)
    near = cKDTree(pixels).sparse_distance_matrix(cKDTree(drawn), reach, output_type="ndarray")
    if len(near) == 0:
        return np.zeros(0, int)
    rows, row = np.unique(near["i"], return_inverse=True)
    own = np.arange(len(rows))  # a column per pixel, so that it may stay unassigned
    gain = 1 + ranks[near["i"]] / LEVELS - 1e-6 * near["v"] / reach
    costs = np.concatenate([3 - gain, np.full(len(rows), 3.0)])  # positive, since a sparse matrix drops zeros
    columns = np.concatenate([near["j"], len(drawn) + own])
    graph = coo_array((costs, (np.concatenate([row, own]), columns)), shape=(len(rows), len(drawn) + len(rows)))
    chosen_rows, chosen_columns = min_weight_full_bipartite_matching(graph.tocsr())
    return rows[chosen_rows[chosen_columns < len(drawn)]]


@dataclass(frozen=True)
class Score:
    """Precision, recall and their harmonic mean, in [0, 1]."""

    precision: float
    recall: float
    f: float


@dataclass(frozen=True)
class Curve:
    """Precision and recall at the thresholds 1/100 to 99/100."""

    precision: list[float]
    recall: list[float]


@dataclass(frozen=True)
class Summary:
    """Results on a data set.

    Attributes:
        ods: at the best threshold for all images.
        threshold: that threshold.
        ois: at the best threshold of each image.
        ap: area under the precision-recall curve, with precision 0 at recalls that no threshold reaches.
        curve: at all thresholds.
    """

    ods: Score
    threshold: float
    ois: Score
    ap: float
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class EdgeResults(Results):
    """Results of an edge detector.

    Attributes:
        tolerance: largest distance of an assignment, in lengths of the diagonal.
        scipy: version of SciPy, which computes the assignment.
        summary: over all images.
        images: best F of every image.
    """

    tolerance: float
    scipy: str
    summary: Summary
    images: dict[str, float]


def _scores(counts: Counts) -> list[Score]:
    """F at each threshold; 0 if precision and recall are 0."""
    recalls = counts.found / np.maximum(counts.drawn, 1)
    precisions = counts.right / np.maximum(counts.edges, 1)
    means = 2 * precisions * recalls / np.maximum(precisions + recalls, 1e-12)
    return [Score(*values) for values in zip(precisions.tolist(), recalls.tolist(), means.tolist(), strict=True)]


def _best(scores: Sequence[Score]) -> int:
    """Index of the highest F (the first, if tied)."""
    return int(np.argmax([score.f for score in scores]))


def summarise(counts: Sequence[Counts]) -> Summary:
    """What the benchmark says of a data set.

    Raises:
        ValueError: no image.
    """
    if not counts:
        raise ValueError("boundaries are measured on at least one image, got none")
    curve = _scores(Counts(*(np.sum(values, axis=0) for values in zip(*counts, strict=True))))
    best = _best(curve)
    at_best = [[values[_best(_scores(image))] for values in image] for image in counts]  # four numbers an image
    ois = _scores(Counts(*(np.atleast_1d(value) for value in np.sum(at_best, axis=0))))[0]
    recalls, first = np.unique([score.recall for score in curve], return_index=True)
    precisions = np.array([score.precision for score in curve])[first]
    precision_at = np.interp(np.linspace(0, 1, 101), recalls, precisions, left=0, right=0)
    whole = Curve([score.precision for score in curve], [score.recall for score in curve])
    return Summary(curve[best], (best + 1) / LEVELS, ois, float(precision_at.sum() / 100), whole)


def find_photographs(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Photographs and their ground truth by name: ``images/**/<name>.jpg`` with ``groundTruth/**/<name>.mat``, as
    BSDS500 has.

    Raises:
        FileNotFoundError: no such folder, or ground truth without its photograph.
        ValueError: there is no ground truth.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the one that holds BSDS500's images and groundTruth")
    images = {
        path.relative_to(folder / "images").with_suffix("").as_posix(): path
        for path in sorted((folder / "images").rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    truths = sorted((folder / "groundTruth").rglob("*.mat"))
    if not truths:
        raise ValueError(f"{folder} holds no groundTruth/*.mat: give the folder of BSDS500's data")
    names = {path.relative_to(folder / "groundTruth").with_suffix("").as_posix(): path for path in truths}
    missing = [name for name in names if name not in images]
    if missing:
        raise FileNotFoundError(f"{folder}/images lacks {missing[0]}, which groundTruth has: copy it there")
    return {name: (images[name], truth) for name, truth in names.items()}


def read_boundaries(path: str | Path) -> list[np.ndarray]:
    """Boundaries in a ground-truth file of BSDS500, one bool [H, W] per annotator.

    Raises:
        ValueError: it is another file.
    """
    try:
        people = loadmat(path)["groundTruth"].ravel()
        drawn = [np.asarray(person["Boundaries"][0, 0], bool) for person in people]
    except (KeyError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"{path} is not a ground-truth file of BSDS500 ({error!r})") from None
    return drawn


@dataclass(frozen=True)
class Edges(Evaluation[EdgeDetector, EdgeResults]):
    """Edge maps of photographs against human boundaries, see :func:`find_photographs`.

    Each detector's maps are stored as ``edges/*.png`` (255 is strength 1); ``gallery.png`` shows them all, mid-grey at
    the best threshold.
    """

    results = EdgeResults
    title = "Edges and human boundaries"
    meaning = (
        "Photographs in which people drew boundaries. ODS is the F-measure, the harmonic mean of precision and recall, "
        "at the threshold that is best for all photographs together, OIS at the best one of each."
    )

    def load_method(
        self, name: str, *, weights: Path | None = None, max_keypoints: int | None = None, device: str = "auto"
    ) -> EdgeDetector:
        """Load an edge detector, see :func:`load_detector`; it has no keypoints.

        Raises:
            ValueError: see :func:`load_detector`; or a number of keypoints.
        """
        if max_keypoints is not None:
            raise ValueError("edges have no keypoints: leave out max_keypoints")
        return load_detector(name, weights=weights, device=device)

    def run(self, job: Job[EdgeDetector]) -> EdgeResults:
        """Detect edges where no map is stored yet, and evaluate."""
        photographs = find_photographs(job.data)
        digest = hashlib.sha256()
        for _, drawn in photographs.values():
            digest.update(drawn.read_bytes())
        shared = job.start({"images": len(photographs), "truth_sha256": digest.hexdigest()})
        counts = []
        for done, (image, (photograph, truth)) in enumerate(photographs.items(), start=1):
            stored = job.folder / "edges" / f"{image}.png"
            strength = _predicted(stored, photograph, job.method, job.overwrite)
            counts.append(count(strength if job.method.thinned else thin(strength), read_boundaries(truth)))
            if job.progress:
                job.progress(done, len(photographs))
        best = {image: max(score.f for score in _scores(c)) for image, c in zip(photographs, counts, strict=True)}
        return EdgeResults(
            **shared, tolerance=TOLERANCE, scipy=version("scipy"), summary=summarise(counts), images=best
        )

    def table(self, found: Sequence[EdgeResults]) -> Table:
        """One row per detector."""
        columns = [
            Column("method"),
            Column("ODS", "F at the threshold that is best for all photographs, in [0, 1]", ".3f", "highest"),
            Column("OIS", "F at the best threshold of each photograph, in [0, 1]", ".3f", "highest"),
            Column("AP", "area under precision over recall, in [0, 1]", ".3f", "highest"),
            Column("precision", "at the threshold of ODS", ".3f"),
            Column("recall", "at the threshold of ODS", ".3f"),
            Column("threshold", "the one of ODS", ".2f"),
        ]
        rows: list[list[Cell]] = [
            [r.name, s.ods.f, s.ois.f, s.ap, s.ods.precision, s.ods.recall, s.threshold]
            for r in found
            for s in [r.summary]
        ]
        return Table(columns, rows)

    def figures(self, found: Sequence[EdgeResults]) -> dict[str, Figure]:
        """Precision over recall."""
        curves = {r.name: (r.summary.curve.recall, r.summary.curve.precision, astuple(r.summary.ods)) for r in found}
        return {"edges": precision_recall_chart(curves)}

    def draw(self, job: Job[EdgeDetector], found: Sequence[EdgeResults]) -> None:
        """Write ``gallery.png``: some photographs with human boundaries and the maps of all methods."""
        photographs = find_photographs(job.data)
        names = list(photographs)
        sheet = []
        for image in [names[i] for i in np.linspace(0, len(names) - 1, min(GALLERY, len(names))).round().astype(int)]:
            photograph, truth = photographs[image]
            row = [(image, read_image(photograph)), ("people", _ink(np.mean(read_boundaries(truth), axis=0)))]
            for results in found:
                with Image.open(job.output / results.name / "edges" / f"{image}.png") as png:
                    strength = np.asarray(png, float) / 255
                row.append((results.name, _ink(strength / (2 * results.summary.threshold))))
            sheet.append(row)
        save_png(job.output / "gallery.png", panel(sheet))


def _predicted(stored: Path, photograph: Path, method: EdgeDetector, overwrite: bool) -> np.ndarray:
    """Strengths float32 [H, W] of a photograph, read from ``stored``, or computed and stored there. The PNG records its
    origin: ``config``, and ``sha256`` of the photograph's file.
    """
    data = photograph.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not stored.exists() or overwrite:
        strength = np.rint(255 * method.detect(read_image(data, name=str(photograph)))).astype(np.uint8)
        origin = PngImagePlugin.PngInfo()
        origin.add_text("config", json.dumps(dict(method.config)))
        origin.add_text("sha256", digest)
        buffer = io.BytesIO()
        Image.fromarray(strength).save(buffer, "png", pnginfo=origin)
        write_bytes(stored, buffer.getvalue())
    with Image.open(stored) as png:
        origin_of = png.info
        check_config(json.loads(origin_of.get("config", "null")), method.config, stored)
        if origin_of.get("sha256") != digest:
            raise ValueError(f"{photograph} has changed since {stored} was written: overwrite the stored maps")
        return np.asarray(png, np.float32) / 255


def _ink(strength: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: white at 0 to black at 1 and beyond."""
    return np.repeat(np.rint(255 * (1 - np.minimum(strength, 1))).astype(np.uint8)[..., None], 3, axis=2)
