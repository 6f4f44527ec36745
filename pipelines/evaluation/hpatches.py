"""HPatches image matching by the protocol of D2-Net (Dusmanu et al., CVPR 2019).

Mean matching accuracy MMA(t) is the share of mutual nearest neighbours that the ground-truth homography places within t
pixels, averaged over image pairs. Works on any folder of sequences laid out like HPatches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samfeat.images import IMAGE_SUFFIXES, read_image
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Results, predict, shown_pairs
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.match import estimate
from samfeat.pipelines.metrics import MMA_THRESHOLDS, corner_error, error_auc, matched_points, mma, transfer_errors
from samfeat.pipelines.pictures.charts import error_chart, mma_chart
from samfeat.pipelines.pictures.draw import draw_errors, panel, save_png
from samfeat.pipelines.pictures.overlays import feature_tiles
from samfeat.pipelines.pictures.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORNER_THRESHOLDS = (1, 3, 5)  # pixels
SUBSETS = {"i_": "illumination", "v_": "viewpoint"}
TOO_LARGE = frozenset(
    ["i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding", "v_artisans", "v_astronautis", "v_talent"]
)
"""Sequences with images beyond 1600 x 1200 pixels, which the protocol leaves out (the data set's own spelling)."""


class PlanarSequence(NamedTuple):
    """Images of one plane.

    Attributes:
        name: name of the folder.
        images: paths by number; 1 is the reference.
        homographies: float64 [3, 3] by number from 2 on: from pixels of image 1 to pixels of that image.
    """

    name: str
    images: dict[int, Path]
    homographies: dict[int, np.ndarray]

    @property
    def subset(self) -> str | None:
        """``illumination`` or ``viewpoint``, by the prefix of the name; None without one."""
        return SUBSETS.get(self.name[:2])


def find_sequences(folder: str | Path) -> list[PlanarSequence]:
    """The sequences of a folder, in alphabetical order, without the ``TOO_LARGE`` ones.

    A sequence is a folder with images ``1.*``, ``2.*``, ... and, for every image k from 2 on, a text file ``H_1_k``.

    Raises:
        FileNotFoundError: no such folder; or a sequence lacks an image or a homography.
        ValueError: no sequence, two images of one number, or a homography that is not 3 x 3 finite numbers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the one that holds HPatches' sequences")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.glob("H_1_*"))]
    sequences = [_read_sequence(path) for path in found if path.name not in TOO_LARGE]
    if not sequences:
        raise ValueError(f"{folder} holds no sequence: each is a folder with images 1.*, 2.* and homographies H_1_2")
    return sequences


def _read_sequence(folder: Path) -> PlanarSequence:
    images: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdecimal() and path.suffix.lower() in IMAGE_SUFFIXES:
            number = int(path.stem)
            if number in images:
                raise ValueError(f"{folder} holds {images[number].name} and {path.name}: keep one image {number}")
            images[number] = path
    numbers = {int(path.name[4:]) for path in folder.glob("H_1_*") if re.fullmatch(r"H_1_\d+", path.name)}
    for number in sorted(numbers | {1}):
        if number not in images:
            raise FileNotFoundError(f"{folder} lacks image {number}: add it, or remove H_1_{number}")
    for number in sorted(images.keys() - {1}):
        if number not in numbers:
            raise FileNotFoundError(f"{folder} lacks H_1_{number}: add it, or remove {images[number].name}")
    homographies = {number: _read_homography(folder / f"H_1_{number}") for number in sorted(numbers)}
    return PlanarSequence(folder.name, dict(sorted(images.items())), homographies)


def _read_homography(path: Path) -> np.ndarray:
    try:
        matrix = np.loadtxt(path, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} does not hold numbers ({error}): write a 3 x 3 homography, one row a line") from None
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"{path} holds {matrix.shape} values: write a finite 3 x 3 homography, one row a line")
    return matrix


@dataclass(frozen=True)
class FeatureCounts:
    """Keypoints per image."""

    mean: float
    min: int
    max: int


@dataclass(frozen=True)
class PairScore:
    """Matching results of an image pair.

    Attributes:
        sequence: name of the sequence.
        image: number of the second image; the first is image 1.
        matches: number of mutual nearest neighbours.
        accuracy: [T], share of matches within each threshold; 0 if there are none.
        corner_error: of the homography estimated by MAGSAC++, in pixels; None if it fails.
    """

    sequence: str
    image: int
    matches: int
    accuracy: list[float]
    corner_error: float | None


@dataclass(frozen=True, kw_only=True)
class HPatchesResults(Results):
    """Results by subset (``all``, ``illumination``, ``viewpoint``); accuracies and areas lie in [0, 1].

    Attributes:
        thresholds: of the accuracies, in pixels.
        mma: [T] mean matching accuracy.
        auc5: mean of MMA(1) to MMA(5).
        matches: mean number per pair.
        homography_auc: areas under the curve of corner errors up to ``CORNER_THRESHOLDS``.
        features: keypoints per image.
        pairs: one entry per pair.
    """

    thresholds: list[int]
    mma: dict[str, list[float]]
    auc5: dict[str, float]
    matches: dict[str, float]
    homography_auc: dict[str, list[float]]
    features: FeatureCounts
    pairs: list[PairScore]


@dataclass(frozen=True)
class HPatches(Evaluation[Method, HPatchesResults]):
    """Image matching on HPatches, or any other folder of sequences, see :func:`find_sequences`.

    Draws ``matches.png`` and ``keypoints.png`` of some pairs for every method.
    """

    results = HPatchesResults
    title = "Image matching (HPatches)"
    meaning = (
        "Photographs of flat scenes under changes of light (i_*) or viewpoint (v_*), with known homographies. A match, "
        "a pair of mutual nearest neighbours, is correct within t pixels if it lies that near to where the homography "
        "puts it."
    )

    def run(self, job: Job[Method]) -> HPatchesResults:
        """Match every image of each sequence with the first one."""
        sequences = find_sequences(job.data)
        pairs_of = {sequence.name: len(sequence.homographies) for sequence in sequences}
        shared = job.start({"pairs": pairs_of, "homographies_sha256": homographies_sha256(sequences)})
        features = predict(job, {f"{s.name}/{path.name}": path for s in sequences for path in s.images.values()})
        pairs: list[tuple[PlanarSequence, int]] = []
        errors: list[np.ndarray] = []
        corners: list[float] = []
        counts: list[int] = []
        for sequence in sequences:
            stored = {number: features(f"{sequence.name}/{path.name}") for number, path in sequence.images.items()}
            counts += [len(f["keypoints"]) for f in stored.values()]
            image_size = read_image(sequence.images[1]).shape[:2]
            for number, homography in sequence.homographies.items():
                points = matched_points(stored[1], stored[number])
                errors.append(transfer_errors(*points, homography))
                found, _ = estimate(*points, model="homography")
                corners.append(corner_error(found, homography, image_size))
                pairs.append((sequence, number))
        _draw(job.folder, shown_pairs(pairs), features)
        return HPatchesResults(
            **shared,
            thresholds=list(MMA_THRESHOLDS),
            **_summary(errors, corners, [sequence.subset for sequence, _ in pairs]),
            features=FeatureCounts(float(np.mean(counts)), min(counts), max(counts)),
            pairs=[
                PairScore(sequence.name, number, len(e), mma([e]).tolist(), corner if np.isfinite(corner) else None)
                for (sequence, number), e, corner in zip(pairs, errors, corners, strict=True)
            ],
        )

    def table(self, found: Sequence[HPatchesResults]) -> Table:
        """One row per method and subset."""
        columns = [
            Column("method"),
            Column("subset", "all sequences, or only those with changes of light or of viewpoint"),
        ]
        columns += [
            Column(f"MMA@{t}", f"mean share of correct matches within {t} px, in %", ".1f", "highest")
            for t in (1, 3, 5, 10)
        ]
        columns.append(Column("AUC@5", "mean of MMA@1 to MMA@5, in %", ".1f", "highest"))
        columns += [
            Column(
                f"H AUC@{t}", f"area under the curve of homographies' corner errors up to {t} px, %", ".1f", "highest"
            )
            for t in CORNER_THRESHOLDS
        ]
        columns.append(Column("features/image", "mean number of keypoints", ".0f"))
        columns.append(Column("matches/pair", "mean number of mutual nearest neighbours", ".0f"))
        rows: list[list[Cell]] = []
        for results in found:
            for subset, curve in results.mma.items():
                shares = [*(curve[t - 1] for t in (1, 3, 5, 10)), results.auc5[subset], *results.homography_auc[subset]]
                counts = [results.features.mean, results.matches[subset]]
                rows.append([results.name, subset, *(100 * share for share in shares), *counts])
        return Table(columns, rows)

    def figures(self, found: Sequence[HPatchesResults]) -> dict[str, Figure]:
        """Accuracy over the threshold, and recall over the corner error."""
        errors = {r.name: [np.inf if p.corner_error is None else p.corner_error for p in r.pairs] for r in found}
        areas = {results.name: results.homography_auc["all"] for results in found}
        label = "Corner error of the homography [px]"
        return {
            "mma": mma_chart({results.name: results.mma for results in found}),
            "homography": error_chart(errors, areas, thresholds=CORNER_THRESHOLDS, xlabel=label),
        }


def _draw(folder: Path, pairs: Sequence[tuple[PlanarSequence, int]], features: Callable[[str], Features]) -> None:
    """Write ``matches.png`` (coloured by error) and ``keypoints.png`` (coloured by score) for some pairs."""
    matches, keypoints = [], []
    for sequence, number in pairs:
        paths = sequence.images[1], sequence.images[number]
        image0, image1 = map(read_image, paths)
        found0, found1 = (features(f"{sequence.name}/{path.name}") for path in paths)
        points0, points1 = matched_points(found0, found1)
        errors = transfer_errors(points0, points1, sequence.homographies[number])
        title = f"{sequence.name} 1, {number}: {len(errors)} matches, {100 * mma([errors], [3])[0]:.0f} % within 3 px"
        matches.append([(title, draw_errors(image0, image1, points0, points1, errors))])
        keypoints.append(feature_tiles(image0, found0) + feature_tiles(image1, found1))
    save_png(folder / "matches.png", panel(matches, height=320))
    save_png(folder / "keypoints.png", panel(keypoints, height=320))


def _summary(errors: Sequence[np.ndarray], corners: Sequence[float], subsets: Sequence[str | None]) -> dict[str, Any]:
    """``mma``, ``auc5``, ``matches`` and ``homography_auc`` by subset."""
    summary: dict[str, dict[str, Any]] = {"mma": {}, "auc5": {}, "matches": {}, "homography_auc": {}}
    for subset in ("all", *SUBSETS.values()):
        inside = [i for i, own in enumerate(subsets) if subset in ("all", own)]
        chosen = [errors[i] for i in inside]
        if chosen:
            summary["homography_auc"][subset] = error_auc([corners[i] for i in inside], CORNER_THRESHOLDS)
            curve = mma(chosen)
            summary["mma"][subset] = curve.tolist()
            summary["auc5"][subset] = float(curve[:5].mean())
            summary["matches"][subset] = float(np.mean([len(e) for e in chosen]))
    return summary


def homographies_sha256(sequences: Sequence[PlanarSequence]) -> str:
    """Hex digest of the names and homographies of the sequences, which identifies the data."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for number, homography in sequence.homographies.items():
            digest.update(f"{sequence.name}/{number}".encode() + homography.tobytes())
    return digest.hexdigest()
