"""Matches: of two images, as a picture; of many, in a file of other tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pycolmap

from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import FeatureFile, Features, write_colmap_database, write_matches
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.features.parts import Parts, open_hdf5
from samfeat.pipelines.pictures.draw import MOST, draw_matches, inlier_colors, panel, save_png
from samfeat.pipelines.pictures.overlays import feature_tiles
from samfeat.teacher_cache.images import read_image

VERIFICATIONS = ("none", "fundamental", "homography")
THRESHOLDS = {"fundamental": 1.0, "homography": 3.0}  # pixels: distance to the epipolar line, distance to the point
CONFIDENCE, TRIALS = 0.9999, 10_000


class Matching(NamedTuple):
    """What :func:`match_pairs` did.

    Attributes:
        images: number of images with features.
        pairs: number of pairs.
        matches: number of matches of all pairs, before geometric verification.
    """

    images: int
    pairs: int
    matches: int


def match_images(
    path0: str | Path,
    path1: str | Path,
    output: str | Path | None = None,
    *,
    method: Method,
    verify: Literal["none", "fundamental", "homography"] = "fundamental",
    estimator: Literal["magsac", "poselib"] = "magsac",
    ratio: float | None = None,
    maps: str | Path | None = None,
) -> dict[str, Any]:
    """Matches two images by mutual nearest neighbours, verifies the matches and draws them.

    Args:
        path0: first image, on the left.
        path1: second image, on the right.
        output: PNG of the matches, inliers in green over outliers in red; None draws nothing.
        method: what computes the features.
        verify: model that inliers agree with: ``fundamental`` for any two views of a rigid
            scene, ``homography`` for planes and turning cameras, ``none`` verifies nothing.
        estimator: see :func:`estimate`.
        ratio: also demand that the best match is better than the second by this ratio of distances, in (0, 1];
            descriptors are then compared at unit length.
        maps: PNG of both images' keypoints coloured by score and, where the method has them, of its dense maps.

    Returns:
        JSON values: ``image0``, ``image1``, ``method``, ``keypoints0``, ``keypoints1``, ``matches``, ``inliers``
        (None without verification), ``model`` (3 x 3, None where there is none), ``drawn`` (matches in the picture, at
        most ``draw.MOST`` of them, chosen at random) and ``picture`` (path or None).

    Raises:
        ValueError: unknown model, or a file that is not an image.
        OSError: an image cannot be opened.
    """
    if verify not in VERIFICATIONS:
        raise ValueError(f"unknown verification {verify!r}: choose one of {', '.join(VERIFICATIONS)}")
    image0, image1 = read_image(path0), read_image(path1)
    features0, features1 = method(image0), method(image1)
    matches = mutual_matches(features0, features1, ratio=ratio)
    points0, points1 = features0["keypoints"][matches[:, 0]], features1["keypoints"][matches[:, 1]]
    model, inliers = (None, None) if verify == "none" else estimate(points0, points1, model=verify, estimator=estimator)
    if output is not None:
        order = np.random.default_rng(0).permutation(len(matches))[:MOST]  # a fair sample of right and wrong ones
        colors = None
        if inliers is not None:
            order = order[np.argsort(inliers[order], kind="stable")]
            colors = inlier_colors(inliers[order])
        save_png(output, draw_matches(image0, image1, points0[order], points1[order], colors=colors))
    if maps is not None:
        sides = ((image0, features0), (image1, features1))
        tiles = [feature_tiles(image, found, method.maps(image) if method.maps else None) for image, found in sides]
        save_png(maps, panel(tiles, height=360))
    return {
        "image0": str(path0),
        "image1": str(path1),
        "method": method.name,
        "keypoints0": len(features0["keypoints"]),
        "keypoints1": len(features1["keypoints"]),
        "matches": len(matches),
        "inliers": None if inliers is None else int(inliers.sum()),
        "model": None if model is None else model.tolist(),
        "drawn": 0 if output is None else min(len(matches), MOST),
        "picture": None if output is None else str(output),
    }


def match_pairs(
    features: str | Path,
    output: str | Path,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    ratio: float | None = None,
    cosine: bool = False,
    images: str | Path | None = None,
    cameras: Mapping[str, pycolmap.Camera] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Matching:
    """Matches pairs of images whose features are in a file, by mutual nearest neighbours.

    A run that was interrupted goes on where it stopped; the output appears when the last pair is done.

    Args:
        features: HDF5 file of hloc's layout.
        output: ``.h5``: hloc's matches (see :func:`samfeat.pipelines.features.formats.write_matches`); ``.db``: a
            COLMAP database with everything that mapping needs (see
            :func:`samfeat.pipelines.features.formats.write_colmap_database`).
        pairs: names of images; every pair of images by default.
        ratio: see :func:`samfeat.student.matching.match`.
        cosine: see :func:`samfeat.student.matching.match`.
        images: folder of the images, for the cameras of a database.
        cameras: known cameras by image name, for a database.
        overwrite: start anew where there is an output.
        progress: called with (done, total) after every pair.

    Raises:
        ValueError: an output that is there already or of another kind, a foreign file of features, an unknown image, or
            a database without images.
        OSError: a file cannot be read or written.
    """
    from samfeat.student.matching import match

    output, stored = Path(output), FeatureFile(features)
    if output.suffix not in (".h5", ".db"):
        raise ValueError(f"{output}: matches are written as .h5 (hloc) or .db (COLMAP); choose such a name")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another name, or overwrite")
    if output.suffix == ".db" and images is None and not set(stored) <= set(cameras or {}):
        raise ValueError("a COLMAP database needs cameras: give the folder of the images")
    pairs = list(combinations(stored, 2)) if pairs is None else list(pairs)
    unknown = sorted({name for pair in pairs for name in pair} - set(stored))
    if unknown:
        raise ValueError(f"{features} holds no features of {unknown[0]}, which the pairs name")
    output.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        Parts.discard(output)
    parts = Parts(output, {"features": _digest(stored), "ratio": ratio, "cosine": cosine})
    first: tuple[str, Features] | None = None
    for done, pair in enumerate(pairs, start=1):
        if _key(pair) not in parts:
            if first is None or first[0] != pair[0]:
                first = pair[0], stored[pair[0]]
            found = match(first[1], stored[pair[1]], ratio=ratio, cosine=cosine)
            arrays = {key: values.numpy() for key, values in found.items()}
            parts.add(_key(pair), {**arrays, "count0": np.array(len(first[1]["keypoints"]))})
        if progress:
            progress(done, len(pairs))
    total = 0
    if output.suffix == ".h5":
        with parts.packed() as file:
            file.clear()
            for pair in pairs:
                part = parts[_key(pair)]
                write_matches(file, pair, part, int(part["count0"]))
                total += len(part["matches"])
    else:
        matches = {pair: parts[_key(pair)]["matches"] for pair in pairs}
        total = sum(map(len, matches.values()))
        folder = Path(images or ".")
        write_colmap_database(
            output, {name: folder / name for name in stored}, features=stored, matches=matches, cameras=cameras
        )
        parts.remove()
    return Matching(len(stored), len(pairs), total)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Pairs of a text file of hloc's kind: two names a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that does not hold two different names, or a pair that occurs twice, in either order.
    """
    path = Path(path)
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        names = line.split()
        if not names:
            continue
        if len(names) != 2 or names[0] == names[1] or frozenset(names) in pairs:
            raise ValueError(f"{path}, line {number}: two different image names are wanted, and every pair once")
        pairs[frozenset(names)] = names[0], names[1]
    return list(pairs.values())


def _key(pair: tuple[str, str]) -> str:
    return "\n".join(pair)


def _digest(stored: FeatureFile) -> str:
    """What the matches of a file depend on, short of reading all of it: how it was made, of which images."""
    with open_hdf5(stored.path) as file:
        images = [(name, file[name].attrs.get("sha256"), len(file[name]["keypoints"])) for name in stored]
    return hashlib.sha256(json.dumps([stored.config, images]).encode()).hexdigest()


def mutual_matches(
    features0: Mapping[str, Any], features1: Mapping[str, Any], *, ratio: float | None = None
) -> np.ndarray:
    """int64 [M, 2]: indices of mutual nearest neighbours by the dot product of descriptors, arrays or tensors.

    With a ratio, descriptors are compared at unit length (see :func:`samfeat.student.matching.match`).
    """
    from samfeat.student.matching import match

    return match(features0, features1, ratio=ratio, cosine=ratio is not None)["matches"].cpu().numpy()


def matched_points(features0: Mapping[str, Any], features1: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, 2] in image 0 and in image 1: the mutual nearest neighbours, arrays on the CPU from either kind."""
    import torch

    matches = mutual_matches(features0, features1)
    points0, points1 = (torch.as_tensor(f["keypoints"]).cpu().double().numpy() for f in (features0, features1))
    return points0[matches[:, 0]], points1[matches[:, 1]]


def estimate(
    points0: np.ndarray,
    points1: np.ndarray,
    *,
    model: Literal["fundamental", "homography"],
    estimator: Literal["magsac", "poselib"] = "magsac",
) -> tuple[np.ndarray | None, np.ndarray]:
    """The model (3 x 3) that most matches agree with, and bool [M], who does.

    Too few matches for any model give None and no inlier.

    Args:
        points0: [M, 2], (x, y) in pixels of the first image.
        points1: [M, 2], in the second.
        model: what to estimate.
        estimator: ``magsac``, OpenCV's MAGSAC++ (Barath et al., CVPR 2020), or ``poselib``, LO-RANSAC with non-linear
            refinement; both with the same threshold, confidence and largest number of trials.
    """
    nobody = np.zeros(len(points0), bool)
    if len(points0) < (8 if model == "fundamental" else 4):
        return None, nobody
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    if estimator == "poselib":
        return _estimate_poselib(points0, points1, model)
    found: np.ndarray | None
    if model == "fundamental":
        found, mask = cv2.findFundamentalMat(points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], CONFIDENCE, TRIALS)
    else:
        found, mask = cv2.findHomography(
            points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], maxIters=TRIALS, confidence=CONFIDENCE
        )
    return (None, nobody) if found is None else (found, mask.ravel().astype(bool))


def _estimate_poselib(
    points0: np.ndarray, points1: np.ndarray, model: Literal["fundamental", "homography"]
) -> tuple[np.ndarray | None, np.ndarray]:
    import poselib

    threshold = "max_epipolar_error" if model == "fundamental" else "max_reproj_error"
    options = {threshold: THRESHOLDS[model], "success_prob": CONFIDENCE, "max_iterations": TRIALS}
    solve = poselib.estimate_fundamental if model == "fundamental" else poselib.estimate_homography
    found, info = solve(points0, points1, options, {})
    inliers = np.array(info["inliers"], bool)
    return (found, inliers) if inliers.any() else (None, np.zeros(len(points0), bool))
