"""Match two images and draw or save the result, or match many into a file for other tools."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import pycolmap

from samfeat.files import check_outputs, read_lines, write_bytes
from samfeat.images import read_image
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import FeatureFile, Features, pair_group, write_colmap_database, write_matches
from samfeat.pipelines.features.parts import Parts, open_hdf5
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.metrics import mutual_matches
from samfeat.pipelines.pictures.draw import MOST, captioned, draw_verified, panel, save_png
from samfeat.pipelines.pictures.overlays import feature_tiles

Verification = Literal["none", "fundamental", "homography"]
Estimator = Literal["magsac", "poselib"]

Matcher = Callable[[Features, Features], Mapping[str, Any]]
"""Features of two images -> ``matches``, a tensor int64 [K, 2], as :class:`samfeat.student.lightglue.LightGlue` is."""

THRESHOLDS = {"fundamental": 1.0, "homography": 3.0}  # pixels: distance to the epipolar line, distance to the point
CONFIDENCE, TRIALS = 0.9999, 10_000


class MatchedPairs(NamedTuple):
    """The result of :func:`match_pairs`.

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
    verify: Verification = "fundamental",
    estimator: Estimator = "magsac",
    ratio: float | None = None,
    matcher: Matcher | None = None,
    maps: str | Path | None = None,
) -> dict[str, Any]:
    """Match two images, by mutual nearest neighbours or a matcher, verify the matches, and draw or write them.

    Args:
        path0: first image, on the left.
        path1: second image, on the right.
        output: ``.png``: a picture of the matches, inliers in green over outliers in red; ``.npz`` or ``.csv``: their
            coordinates (see :func:`save_matches`); None writes nothing.
        method: what computes the features.
        verify: model that inliers agree with: ``fundamental`` for any two views of a rigid
            scene, ``homography`` for planes and turning cameras, ``none`` verifies nothing.
        estimator: see :func:`estimate`.
        ratio: also require the best match to be better than the second by this ratio of distances, in (0, 1];
            descriptors are then compared at unit length.
        matcher: finds the matches instead of mutual nearest neighbours.
        maps: PNG of both images' keypoints coloured by score and, if the method has them, of its dense maps.

    Returns:
        JSON values: ``image0``, ``image1``, ``method``, ``keypoints0``, ``keypoints1``, ``matches``, ``inliers``
        (None without verification), ``model`` (3 x 3, None if there is none), ``drawn`` (matches in the picture, at
        most ``draw.MOST`` of them, chosen at random) and ``picture`` (path or None).

    Raises:
        ValueError: unknown model, a file that is not an image, or an output that is an input or of another kind.
        OSError: an image cannot be opened.
    """
    check_outputs([output, maps], [path0, path1])
    for path, suffixes in ((output, (".png", ".npz", ".csv")), (maps, (".png",))):
        if path is not None and Path(path).suffix.lower() not in suffixes:
            raise ValueError(f"{path}: choose a name that ends in {' or '.join(suffixes)}")
    check_verification(verify)
    image0, image1 = read_image(path0), read_image(path1)
    features0, features1 = method(image0), method(image1)
    found = verified_matches(features0, features1, verify=verify, estimator=estimator, ratio=ratio, matcher=matcher)
    points0, points1, inliers = found.points0, found.points1, found.inliers
    wants_picture = output is not None and Path(output).suffix.lower() == ".png"
    if output is not None and not wants_picture:
        save_matches(output, points0, points1, inliers=inliers)
    if output is not None and wants_picture:
        drawn, legend = draw_verified(image0, image1, points0, points1, inliers)
        counts = f"{len(features0['keypoints'])} and {len(features1['keypoints'])} keypoints, {len(points0)} matches"
        if inliers is not None:
            counts += f", {inliers.sum()} agree with one {verify}{' matrix' if verify == 'fundamental' else ''}"
        title = f"{Path(path0).name} and {Path(path1).name}, {method.name}: {counts}"
        save_png(output, captioned(drawn, title, legend))
    if maps is not None:
        sides = ((image0, features0), (image1, features1))
        tiles = [feature_tiles(image, own, method.maps(image) if method.maps else None) for image, own in sides]
        save_png(maps, panel(tiles, height=360))
    return {
        "image0": str(path0),
        "image1": str(path1),
        "method": method.name,
        "keypoints0": len(features0["keypoints"]),
        "keypoints1": len(features1["keypoints"]),
        "matches": len(points0),
        "inliers": None if inliers is None else int(inliers.sum()),
        "model": None if found.model is None else found.model.tolist(),
        "drawn": min(len(points0), MOST) if wants_picture else 0,
        "picture": str(output) if wants_picture else None,
    }


class VerifiedMatches(NamedTuple):
    """The result of :func:`verified_matches`: M matches.

    Attributes:
        matches: int64 [M, 2], rows of the first and of the second features.
        points0: float32 [M, 2], (x, y) in pixels of the first image.
        points1: the same in the second image.
        model: float64 [3, 3], the fundamental matrix or the homography; None without verification, or if there is none.
        inliers: bool [M], which matches agree with the model; None without verification.
    """

    matches: np.ndarray
    points0: np.ndarray
    points1: np.ndarray
    model: np.ndarray | None
    inliers: np.ndarray | None


def verified_matches(
    features0: Features,
    features1: Features,
    *,
    verify: Verification = "fundamental",
    estimator: Estimator = "magsac",
    ratio: float | None = None,
    matcher: Matcher | None = None,
) -> VerifiedMatches:
    """Matches of the features of two images, and the geometric model that most of them agree with.

    Args:
        features0: ``keypoints`` [K, 2] and ``descriptors`` [K, D] of the first image.
        features1: those of the second.
        verify: see :func:`match_images`.
        estimator: see :func:`estimate`.
        ratio: see :func:`match_images`.
        matcher: see :func:`match_images`.

    Raises:
        ValueError: unknown verification, a ratio outside (0, 1], or a ratio for a matcher.
    """
    check_verification(verify)
    if matcher is None:
        matches = mutual_matches(features0, features1, ratio=ratio)
    elif ratio is None:
        matches = matcher(features0, features1)["matches"].cpu().numpy()
    else:
        raise ValueError("a ratio test belongs to mutual nearest neighbours: leave it out with a matcher")
    points0, points1 = features0["keypoints"][matches[:, 0]], features1["keypoints"][matches[:, 1]]
    if verify == "none":
        return VerifiedMatches(matches, points0, points1, None, None)
    return VerifiedMatches(matches, points0, points1, *estimate(points0, points1, model=verify, estimator=estimator))


def check_verification(verify: str) -> None:
    """Raise ValueError unless there is such a verification."""
    if verify not in get_args(Verification):
        raise ValueError(f"unknown verification {verify!r}: choose one of {', '.join(get_args(Verification))}")


def save_matches(
    path: str | Path, points0: np.ndarray, points1: np.ndarray, *, inliers: np.ndarray | None = None
) -> Path:
    """Write the coordinates of matches.

    Args:
        path: ``.npz``: arrays ``points0`` and ``points1``, float32 [M, 2], and ``inliers``, bool [M], if known;
            otherwise CSV with the columns x0, y0, x1, y1 and, if known, inlier (0 or 1).
        points0: [M, 2], (x, y) in pixels of the first image, (0, 0) being the centre of the top-left one.
        points1: the same in the second image.
        inliers: which matches agree with the geometric model.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        arrays = {"points0": points0.astype(np.float32), "points1": points1.astype(np.float32)}
        buffer = io.BytesIO()
        np.savez(buffer, **(arrays if inliers is None else arrays | {"inliers": inliers}))
        return write_bytes(path, buffer.getvalue())
    lines = ["x0,y0,x1,y1" + ("" if inliers is None else ",inlier")]
    for number, row in enumerate(np.hstack([points0, points1]).tolist()):
        values = [f"{value:.3f}" for value in row]
        lines.append(",".join(values if inliers is None else [*values, str(int(inliers[number]))]))
    return write_bytes(path, ("\n".join(lines) + "\n").encode())


def match_pairs(
    features: str | Path,
    output: str | Path,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    ratio: float | None = None,
    cosine: bool = False,
    lightglue: str | Path | None = None,
    images: str | Path | None = None,
    cameras: Mapping[str, pycolmap.Camera] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MatchedPairs:
    """Match pairs of images from a feature file, by mutual nearest neighbours or by LightGlue.

    An interrupted run resumes where it stopped; the output appears when the last pair is done.

    Args:
        features: HDF5 file in hloc's layout.
        output: ``.h5``: hloc's matches (see :func:`samfeat.pipelines.features.formats.write_matches`); ``.db``: a
            COLMAP database with everything that mapping needs (see
            :func:`samfeat.pipelines.features.formats.write_colmap_database`).
        pairs: names of images; every pair of images by default.
        ratio: see :func:`samfeat.student.matching.match`.
        cosine: see :func:`samfeat.student.matching.match`.
        lightglue: weights for :meth:`samfeat.student.lightglue.LightGlue.from_pretrained`, to match with it instead.
        images: folder of the images, for the cameras of a database.
        cameras: known cameras by image name, for a database.
        overwrite: replace an existing output.
        progress: called with (done, total) after every pair.

    Raises:
        ValueError: an output that already exists, is of another kind, or is one of the inputs; a foreign feature file;
            an unknown image; a database without images; or pairs that hloc's layout cannot tell apart.
        OSError: a file cannot be read or written.
    """
    from samfeat.student.lightglue import LightGlue
    from samfeat.student.matching import match

    if lightglue and (ratio is not None or cosine):
        raise ValueError("ratio and cosine belong to mutual nearest neighbours: leave them out with LightGlue")
    output, stored = Path(output), FeatureFile(features)
    if output.suffix not in (".h5", ".db"):
        raise ValueError(f"{output}: matches are written as .h5 (hloc) or .db (COLMAP); choose such a name")
    check_outputs([output], [features, images, lightglue])
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another name, or overwrite")
    if output.suffix == ".db" and images is None and not set(stored) <= set(cameras or {}):
        raise ValueError("a COLMAP database needs cameras: give the folder of the images")
    pairs = list(combinations(stored, 2)) if pairs is None else list(pairs)
    unknown = sorted({name for pair in pairs for name in pair} - set(stored))
    if unknown:
        raise ValueError(f"{features} holds no features of {unknown[0]}, which the pairs name")
    if output.suffix == ".h5":
        groups: dict[str, tuple[str, str]] = {}
        for pair in pairs:
            other = groups.setdefault(pair_group(pair), pair)
            if other != pair:
                raise ValueError(
                    f"pairs {' '.join(other)} and {' '.join(pair)} have one name in hloc's layout, where / becomes -: "
                    "rename an image, or write a .db file"
                )
    output.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        Parts.discard(output)
    find: Matcher = partial(match, ratio=ratio, cosine=cosine)
    identity: dict[str, Any] = {"ratio": ratio, "cosine": cosine}
    if lightglue:
        find = LightGlue.from_pretrained(lightglue)
        identity = {"lightglue": hashlib.sha256(Path(lightglue).read_bytes()).hexdigest()}
    parts = Parts(output, {"features": _digest(stored), **identity})
    first: tuple[str, Features] | None = None
    for done, pair in enumerate(pairs, start=1):
        if _key(pair) not in parts:
            if first is None or first[0] != pair[0]:
                first = pair[0], stored[pair[0]]
            found = find(first[1], stored[pair[1]])
            arrays = {key: values.cpu().numpy() for key, values in found.items()}
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
    return MatchedPairs(len(stored), len(pairs), total)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Read pairs from a text file in hloc's format: two names per line, separated by spaces.

    Names with spaces are put in double quotes, or separated by a tab. Lines that begin with ``#`` are comments.
    Of pairs that occur twice, in either order (as written by hloc's ``pairs_from_retrieval``), the first is kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, or a line does not have two different names.
    """
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for number, line in read_lines(path):
        names = _names(line)
        if len(names) != 2 or names[0] == names[1]:
            raise ValueError(
                f"{path}, line {number}: two different image names are wanted; separate names that hold blanks by a tab"
            )
        pairs.setdefault(frozenset(names), (names[0], names[1]))
    return list(pairs.values())


def _names(line: str) -> list[str]:
    if "\t" in line:
        return [name.strip().strip('"') for name in line.split("\t") if name.strip()]
    if '"' in line:
        try:
            return shlex.split(line)
        except ValueError:
            return []
    return line.split()


def _key(pair: tuple[str, str]) -> str:
    return "\n".join(pair)


def _digest(stored: FeatureFile) -> str:
    """What the matches of a file depend on, without reading all of it: its configuration and its images."""
    with open_hdf5(stored.path) as file:
        entries = ((name, file[name]) for name in stored)
        images = [
            (name, str(entry.attrs.get("sha256")), getattr(entry["keypoints"], "shape", None))
            for name, entry in entries
        ]
    return hashlib.sha256(json.dumps([stored.config, images]).encode()).hexdigest()


def estimate(
    points0: np.ndarray,
    points1: np.ndarray,
    *,
    model: Literal["fundamental", "homography"],
    estimator: Estimator = "magsac",
) -> tuple[np.ndarray | None, np.ndarray]:
    """Estimate the model (3 x 3) that most matches agree with; also returns the inliers, bool [M].

    With too few matches, returns None and no inliers.

    Args:
        points0: [M, 2], (x, y) in pixels of the first image.
        points1: [M, 2], in the second.
        model: what to estimate.
        estimator: ``magsac``, OpenCV's MAGSAC++ (Barath et al., CVPR 2020), or ``poselib``, LO-RANSAC with non-linear
            refinement; both with the same threshold, confidence and largest number of trials. OpenCV's raises an
            assertion of its own for some planar scenes; PoseLib then estimates instead.
    """
    nobody = np.zeros(len(points0), bool)
    if len(points0) < (8 if model == "fundamental" else 4):
        return None, nobody
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    if estimator == "poselib":
        return _estimate_poselib(points0, points1, model)
    found: np.ndarray | None
    try:
        if model == "fundamental":
            found, mask = cv2.findFundamentalMat(
                points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], CONFIDENCE, TRIALS
            )
        else:
            found, mask = cv2.findHomography(
                points0, points1, cv2.USAC_MAGSAC, THRESHOLDS[model], maxIters=TRIALS, confidence=CONFIDENCE
            )
    except cv2.error:
        return _estimate_poselib(points0, points1, model)
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
