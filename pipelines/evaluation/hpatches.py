"""HPatches image matching by the protocol of D2-Net (Dusmanu et al., CVPR 2019), and its metric for other uses.

Mean matching accuracy MMA(t) is the share of mutual nearest neighbours that the ground-truth homography places within t
pixels, averaged over image pairs. Any folder of sequences in HPatches' shape will do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samfeat.pipelines.evaluate import collect_results, error_auc, predict, shown_pairs, write_results, write_table
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.match import estimate, matched_points
from samfeat.pipelines.pictures.draw import draw_errors, error_figure, mma_figure, panel, save_png
from samfeat.pipelines.pictures.overlays import feature_tiles
from samfeat.teacher_cache.images import IMAGE_SUFFIXES, read_image

THRESHOLDS = tuple(range(1, 11))
CORNER_THRESHOLDS = (1, 3, 5)  # pixels
SUBSETS = {"i_": "illumination", "v_": "viewpoint"}
TOO_LARGE = frozenset(
    ["i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding", "v_artisans", "v_astronautis", "v_talent"]
)
"""Sequences with images beyond 1600 x 1200 pixels, which the protocol leaves out (the data set's own spelling)."""


class PlanarSequence(NamedTuple):
    """Photographs of one plane.

    Attributes:
        name: name of the folder.
        images: path by number, 1 being the reference.
        homographies: float64 [3, 3] by number from 2 on: pixels of image 1 to pixels of that image.
    """

    name: str
    images: dict[int, Path]
    homographies: dict[int, np.ndarray]

    @property
    def subset(self) -> str | None:
        """``illumination`` or ``viewpoint`` by the prefix of the name, None without one."""
        return SUBSETS.get(self.name[:2])


class PairScore(NamedTuple):
    """How well two images match.

    Attributes:
        accuracy: float64 [T], share of the matches within each threshold; 0 without matches.
        matches: number of mutual nearest neighbours.
    """

    accuracy: np.ndarray
    matches: int


def match_errors(features0: Mapping[str, Any], features1: Mapping[str, Any], homography: np.ndarray) -> np.ndarray:
    """float64 [M]: distance in pixels of every mutual nearest neighbour in image 1 from where it should be.

    Args:
        features0: ``keypoints`` [K, 2] and ``descriptors`` [K, D], arrays or tensors.
        features1: the same of the other image.
        homography: [3, 3], pixels of image 0 to pixels of image 1.
    """
    points0, points1 = matched_points(features0, features1)
    return _distances(_project(points0, homography), points1)


def _project(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    projected = np.pad(points, ((0, 0), (0, 1)), constant_values=1) @ np.asarray(homography, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return projected[:, :2] / projected[:, 2:]


def _distances(points0: np.ndarray, points1: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.linalg.norm(points0 - points1, axis=1), nan=np.inf, posinf=np.inf)


def corner_error(estimated: np.ndarray | None, homography: np.ndarray, image_size: tuple[int, int]) -> float:
    """Mean distance in pixels between where two homographies put the four corners of an image.

    Args:
        estimated: [3, 3]; None, for a failure, is infinitely wrong.
        homography: [3, 3], the true one.
        image_size: (height, width); the corners are the centres of the outermost pixels.
    """
    if estimated is None:
        return float("inf")
    height, width = image_size
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)], np.float64)
    return float(_distances(_project(corners, estimated), _project(corners, homography)).mean())


def mma(errors: Sequence[np.ndarray], thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """Mean matching accuracy, float64 [T] in [0, 1].

    Args:
        errors: one array of match errors in pixels for every pair; a pair without matches counts as 0.
        thresholds: in pixels, an error on the threshold is right.

    Raises:
        ValueError: no pair.
    """
    if len(errors) == 0:
        raise ValueError("mean matching accuracy needs at least one pair of images, got none")
    limits = np.asarray(thresholds, np.float64)
    shares = [(np.asarray(e)[:, None] <= limits).mean(0) if len(e) else np.zeros(len(limits)) for e in errors]
    return np.mean(shares, axis=0)


def match_accuracy(
    features0: Mapping[str, Any],
    features1: Mapping[str, Any],
    homography: np.ndarray,
    thresholds: Sequence[float] = THRESHOLDS,
) -> PairScore:
    """Matching accuracy of one pair; arguments as in :func:`match_errors` and :func:`mma`."""
    errors = match_errors(features0, features1, homography)
    return PairScore(mma([errors], thresholds), len(errors))


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


def evaluate_hpatches(
    folder: str | Path,
    output: str | Path,
    *,
    method: Method,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a method on the sequences of a folder.

    Writes ``<output>/<name>/features.h5``, ``results.json``, and pictures of some pairs: ``matches.png`` and
    ``keypoints.png``; and from the results of all methods in ``output`` the table ``table.md`` and
    the figures ``mma.png`` and ``homography.png``.

    Args:
        folder: the sequences, see :func:`find_sequences`.
        output: folder of this evaluation, for any number of methods.
        method: what is evaluated.
        name: what the method is called in the output; by default its own name.
        overwrite: compute features anew that are stored already.
        progress: called with (done, total) after every image whose features had to be computed.

    Returns:
        what ``results.json`` holds: ``name``, ``method`` (configuration), ``dataset``, ``thresholds``, and by subset
        (``all``, and ``illumination``, ``viewpoint`` where names tell) ``mma`` [T], ``auc5`` (mean of MMA(1) to
        MMA(5)), mean ``matches`` and ``homography_auc`` (of the :func:`corner_error` of homographies that MAGSAC++
        finds, at ``CORNER_THRESHOLDS``); ``features`` (mean, min, max), and one entry a pair in ``pairs``.

    Raises:
        ValueError: bad sequences or images; stored features of another configuration or other images; or results on
            other sequences in ``output``.
    """
    sequences = find_sequences(folder)
    name = name or method.name
    paths = {f"{s.name}/{path.name}": path for s in sequences for path in s.images.values()}
    dataset = {
        "pairs": {s.name: len(s.homographies) for s in sequences},
        "homographies_sha256": homographies_sha256(sequences),
    }
    collect_results(output, dataset, replacing=name)
    store = Path(output) / name / "features.h5"
    features = predict(paths, store, method=method, overwrite=overwrite, progress=progress)
    pairs: list[tuple[PlanarSequence, int]] = []
    errors: list[np.ndarray] = []
    corners: list[float] = []
    counts: list[int] = []
    for sequence in sequences:
        stored = {number: features(f"{sequence.name}/{path.name}") for number, path in sequence.images.items()}
        counts += [len(f["keypoints"]) for f in stored.values()]
        image_size = read_image(sequence.images[1]).shape[:2]
        for number, homography in sequence.homographies.items():
            points0, points1 = matched_points(stored[1], stored[number])
            errors.append(_distances(_project(points0, homography), points1))
            found, _ = estimate(points0, points1, model="homography")
            corners.append(corner_error(found, homography, image_size))
            pairs.append((sequence, number))
    results = {
        "name": name,
        "method": dict(method.config),
        "dataset": dataset,
        "thresholds": list(THRESHOLDS),
        **_summary(errors, corners, [sequence.subset for sequence, _ in pairs]),
        "features": {"mean": float(np.mean(counts)), "min": min(counts), "max": max(counts)},
        "pairs": [
            {
                "sequence": sequence.name,
                "image": number,
                "matches": len(e),
                "accuracy": mma([e]).tolist(),
                "corner_error": corner if np.isfinite(corner) else None,
            }
            for (sequence, number), e, corner in zip(pairs, errors, corners, strict=True)
        ],
    }
    write_results(Path(output) / name, results)
    _draw(Path(output) / name, shown_pairs(pairs), features)
    write_comparison(output, dataset)
    return results


def _draw(folder: Path, pairs: Sequence[tuple[PlanarSequence, int]], features: Callable[[str], Features]) -> None:
    """Writes ``matches.png``, matches coloured by error, and ``keypoints.png``, keypoints by score, of some pairs."""
    matches, keypoints = [], []
    for sequence, number in pairs:
        paths = sequence.images[1], sequence.images[number]
        image0, image1 = map(read_image, paths)
        found0, found1 = (features(f"{sequence.name}/{path.name}") for path in paths)
        points0, points1 = matched_points(found0, found1)
        errors = _distances(_project(points0, sequence.homographies[number]), points1)
        title = f"{sequence.name} 1, {number}: {len(errors)} matches, {100 * mma([errors], [3])[0]:.0f} % within 3 px"
        matches.append([(title, draw_errors(image0, image1, points0, points1, errors))])
        keypoints.append(feature_tiles(image0, found0) + feature_tiles(image1, found1))
    save_png(folder / "matches.png", panel(matches, height=320))
    save_png(folder / "keypoints.png", panel(keypoints, height=320))


def write_comparison(output: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes ``table.md``, ``mma.png`` and ``homography.png`` of all methods in an evaluation folder."""
    found = collect_results(output, dataset)
    rows = []
    for results in found:
        for subset, curve in results["mma"].items():
            percent = [f"{100 * curve[t - 1]:.1f}" for t in (1, 3, 5, 10)]
            auc, matches = f"{100 * results['auc5'][subset]:.1f}", f"{results['matches'][subset]:.0f}"
            corners = [f"{100 * value:.1f}" for value in results["homography_auc"][subset]]
            number = f"{results['features']['mean']:.0f}"
            rows.append([results["name"], subset, *percent, auc, *corners, number, matches])
    header = ["method", "subset", "MMA@1", "MMA@3", "MMA@5", "MMA@10", "AUC@5"]
    header += [*(f"H AUC@{t}" for t in CORNER_THRESHOLDS), "features/image", "matches/pair"]
    write_table(Path(output) / "table.md", header, rows)
    mma_figure(Path(output) / "mma.png", {results["name"]: results["mma"] for results in found})
    errors = {
        results["name"]: [np.inf if p["corner_error"] is None else p["corner_error"] for p in results["pairs"]]
        for results in found
    }
    areas = {results["name"]: results["homography_auc"]["all"] for results in found}
    path = Path(output) / "homography.png"
    error_figure(path, errors, areas, thresholds=CORNER_THRESHOLDS, xlabel="Corner error of the homography [px]")


def _summary(
    errors: Sequence[np.ndarray], corners: Sequence[float], subsets: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
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
    """Hex digest of the names and homographies of sequences: what results on the same data share."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for number, homography in sequence.homographies.items():
            digest.update(f"{sequence.name}/{number}".encode() + homography.tobytes())
    return digest.hexdigest()
