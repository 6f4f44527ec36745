"""Edge maps against boundaries that people drew: ODS, OIS and AP as the Berkeley benchmark (BSDS500) measures them.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, PngImagePlugin
from scipy.io import loadmat
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from samfeat.pipelines.evaluate import collect_results, write_results, write_table
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.parts import check_config
from samfeat.pipelines.features.peers import choose_device
from samfeat.pipelines.files import write_bytes
from samfeat.pipelines.pictures.draw import panel, precision_recall_figure, save_png
from samfeat.teacher_cache.edges import thin
from samfeat.teacher_cache.images import IMAGE_SUFFIXES, read_image

TEACHERS = ("classical", "sam_vit_h", "sam_vit_l", "sam_vit_b")
DETECTORS = ("samfeat", "canny", *TEACHERS)
LEVELS = 100  # thresholds are 1/100 to 99/100
TOLERANCE = 0.0075  # of the image's diagonal
CANNY_SIGMA, CANNY_RATIO, CANNY_RANGE = 2.0, 0.4, 400.0  # pixels; low over high threshold; high threshold of level 100
GALLERY = 4  # photographs in the gallery


@dataclass(frozen=True)
class EdgeDetector:
    """A detector of edges: uint8 [H, W, 3] in RGB to strengths, float32 [H, W] in [0, 1].

    Attributes:
        name: short name.
        config: JSON values that identify the detector and all that its maps depend on.
        detect: the function itself.
        thinned: its lines are one pixel wide already.
    """

    name: str
    config: Mapping[str, Any]
    detect: Callable[[np.ndarray], np.ndarray]
    thinned: bool = False


def load_detector(name: str, *, weights: str | Path | None = None, device: str = "auto") -> EdgeDetector:
    """An edge detector by its name.

    Args:
        name: ``samfeat`` (the edge map that the network learned), ``canny`` (OpenCV's; the strength of a pixel is the
            highest threshold at which it belongs to an edge), or a teacher.
        weights: weights file of ``samfeat``, checkpoint of a SAM teacher.
        device: where they run: ``cpu``, ``cuda``, or ``auto``, which takes a GPU where there is one.

    Raises:
        ValueError: unknown name, or weights missing, superfluous or damaged.
        FileNotFoundError: the weights do not exist.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown edge detector {name!r}: choose one of {', '.join(DETECTORS)}")
    if weights is None and name not in ("canny", "classical"):
        raise ValueError(f"edges of {name} need weights: give the .safetensors of training, or SAM's checkpoint")
    if weights is not None and name in ("canny", "classical"):
        raise ValueError(f"edges of {name} take no weights, got {weights}: leave them out, or choose samfeat")
    if name == "canny":
        config = {"method": name, "sigma": CANNY_SIGMA, "ratio": CANNY_RATIO, "range": CANNY_RANGE}
        return EdgeDetector(name, {**config, "opencv": cv2.__version__}, _canny, thinned=True)
    if name in TEACHERS:
        from samfeat.pipelines.caching.inputs import make_teacher

        teacher = make_teacher(name, checkpoint=None if weights is None else Path(weights), device=device)
        config = {"method": name, **teacher.provenance()}
        return EdgeDetector(name, config, lambda image: teacher(image[None])[0].edges.astype(np.float32) / 255)
    return _samfeat(Path(str(weights)), choose_device(device))


def _samfeat(weights: Path, device: str) -> EdgeDetector:
    import torch

    from samfeat.student.extractor import SIZE_MULTIPLE, SAMFeat
    from samfeat.student.network import resize

    network = SAMFeat.from_pretrained(weights).to(device).network

    @torch.no_grad()
    def detect(image: np.ndarray) -> np.ndarray:
        width, height = (max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in image.shape[1::-1])
        pixels = torch.from_numpy(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
        dense = network(pixels.to(device).permute(2, 0, 1)[None].float() / 255 * 2 - 1)
        return resize(dense.edges, image.shape[:2])[0, 0].cpu().numpy()

    config = {"method": "samfeat", "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return EdgeDetector("samfeat", config, detect)


def _canny(image: np.ndarray) -> np.ndarray:
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), CANNY_SIGMA)
    strength = np.zeros(grey.shape, np.float32)
    for level in range(1, LEVELS):
        high = level / LEVELS * CANNY_RANGE
        strength[cv2.Canny(grey, CANNY_RATIO * high, high, L2gradient=True) > 0] = level / LEVELS
    return strength


class Counts(NamedTuple):
    """Pixels of one image at the thresholds 1/100 to 99/100, int64 [99] each.

    Attributes:
        found: boundary pixels, of all people together, that an edge pixel is assigned to.
        drawn: boundary pixels of all people together, the same at each threshold.
        right: edge pixels that are assigned for at least one person.
        edges: edge pixels.
    """

    found: np.ndarray
    drawn: np.ndarray
    right: np.ndarray
    edges: np.ndarray


def count(strength: np.ndarray, boundaries: Sequence[np.ndarray], *, tolerance: float = TOLERANCE) -> Counts:
    """Compares a thinned edge map with the boundaries that each person drew.

    Args:
        strength: [H, W] in [0, 1].
        boundaries: one [H, W] a person, not 0 on the boundaries.
        tolerance: largest distance of an assignment, in lengths of the diagonal.

    Raises:
        ValueError: nobody drew anything, or sizes that do not agree.
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
    """How many lie at each of the levels 1 to 99, or above."""
    return histogram[::-1].cumsum()[::-1][1:]


def _assign(pixels: np.ndarray, ranks: np.ndarray, drawn: np.ndarray, reach: float) -> np.ndarray:
    """Indices of the ``pixels`` [N, 2] that are assigned to one of ``drawn`` [M, 2] each, strong pixels first."""
    if len(pixels) == 0 or len(drawn) == 0:
        return np.zeros(0, int)
    near = cKDTree(pixels).sparse_distance_matrix(cKDTree(drawn), reach, output_type="ndarray")
    if len(near) == 0:
        return np.zeros(0, int)
    rows, row = np.unique(near["i"], return_inverse=True)
    own = np.arange(len(rows))  # every pixel may also stay alone, in a column of its own
    gain = 1 + ranks[near["i"]] / LEVELS - 1e-6 * near["v"] / reach
    costs = np.concatenate([3 - gain, np.full(len(rows), 3.0)])  # positive, since 0 is no entry of a sparse matrix
    columns = np.concatenate([near["j"], len(drawn) + own])
    graph = coo_array((costs, (np.concatenate([row, own]), columns)), shape=(len(rows), len(drawn) + len(rows)))
    chosen_rows, chosen_columns = min_weight_full_bipartite_matching(graph.tocsr())
    return rows[chosen_rows[chosen_columns < len(drawn)]]


class Score(NamedTuple):
    """Precision, recall and their harmonic mean, in [0, 1]."""

    precision: float
    recall: float
    f: float


def _scores(counts: Counts) -> list[Score]:
    """At each threshold; 0 where there is nothing to divide by."""
    recalls = counts.found / np.maximum(counts.drawn, 1)
    precisions = counts.right / np.maximum(counts.edges, 1)
    means = 2 * precisions * recalls / np.maximum(precisions + recalls, 1e-12)
    return [Score(*values) for values in zip(precisions.tolist(), recalls.tolist(), means.tolist(), strict=True)]


def _best(scores: Sequence[Score]) -> int:
    """Index of the highest F, the first of equal ones."""
    return int(np.argmax([score.f for score in scores]))


def summarise(counts: Sequence[Counts]) -> dict[str, Any]:
    """What the benchmark says of a data set.

    Returns:
        ``ods`` (best threshold for all images: ``threshold``, ``precision``, ``recall``, ``f``), ``ois`` (best
        threshold of each image), ``ap`` (area under precision over recall, which is 0 where no threshold reaches), and
        the ``curve``: ``precision`` and ``recall`` at the 99 thresholds.

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
    return {
        "ods": {"threshold": (best + 1) / LEVELS, **curve[best]._asdict()},
        "ois": ois._asdict(),
        "ap": float(precision_at.sum() / 100),
        "curve": {key: [getattr(score, key) for score in curve] for key in ("precision", "recall")},
    }


def find_photographs(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Photograph and ground truth by name: ``images/**/<name>.jpg`` with ``groundTruth/**/<name>.mat``, as BSDS500 has.

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
    """bool [H, W] a person: the boundaries in a ground-truth file of BSDS500.

    Raises:
        ValueError: it is another file.
    """
    try:
        people = loadmat(path)["groundTruth"].ravel()
        drawn = [np.asarray(person["Boundaries"][0, 0], bool) for person in people]
    except (KeyError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"{path} is not a ground-truth file of BSDS500 ({error!r})") from None
    return drawn


def evaluate_edges(
    folder: str | Path,
    output: str | Path,
    *,
    method: EdgeDetector,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates an edge detector on photographs with boundaries that people drew.

    Writes ``<output>/<name>/edges/*.png`` (strengths, 255 for 1) and ``results.json``, and from the results of all
    detectors in ``output`` the table ``table.md``, the figure ``edges.png`` and the pictures ``gallery.png`` (half
    grey at the best threshold). Images whose map is there already are not computed again.

    Args:
        folder: see :func:`find_photographs`.
        output: folder of this evaluation, for any number of detectors.
        method: what is evaluated.
        name: what the detector is called in the output; by default its own name.
        overwrite: compute maps anew that are stored already.
        progress: called with (done, total) after every image.

    Returns:
        what ``results.json`` holds: ``name``, ``method`` (configuration), ``dataset``, ``tolerance``, what
        :func:`summarise` returns, and the best F of every image in ``images``.

    Raises:
        FileNotFoundError: a folder or photograph is missing.
        ValueError: a bad photograph or ground truth, maps of another configuration or other photographs, or results on
            other data in ``output``.
    """
    photographs = find_photographs(folder)
    name = name or method.name
    digest = hashlib.sha256()
    for _, drawn in photographs.values():
        digest.update(drawn.read_bytes())
    dataset = {"images": len(photographs), "truth_sha256": digest.hexdigest()}
    collect_results(output, dataset, replacing=name)
    counts = []
    for done, (image, (photograph, truth)) in enumerate(photographs.items(), start=1):
        stored = Path(output) / name / "edges" / f"{image}.png"
        strength = _predicted(stored, photograph, method, overwrite)
        counts.append(count(strength if method.thinned else thin(strength), read_boundaries(truth)))
        if progress:
            progress(done, len(photographs))
    results = {
        "name": name,
        "method": dict(method.config),
        "dataset": dataset,
        "tolerance": TOLERANCE,
        "scipy": version("scipy"),
        **summarise(counts),
        "images": {image: max(score.f for score in _scores(c)) for image, c in zip(photographs, counts, strict=True)},
    }
    write_results(Path(output) / name, results)
    write_comparison(output, dataset, photographs)
    return results


def _predicted(stored: Path, photograph: Path, method: EdgeDetector, overwrite: bool) -> np.ndarray:
    """Strengths float32 [H, W] of a photograph, read from ``stored`` or computed and written there.

    The PNG says what made it: ``config``, and ``sha256`` of the photograph's file.
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


def write_comparison(
    output: str | Path, dataset: Mapping[str, Any], photographs: Mapping[str, tuple[Path, Path]]
) -> None:
    """Writes ``table.md``, ``edges.png`` and ``gallery.png`` of all detectors in an evaluation folder."""
    output = Path(output)
    found = collect_results(output, dataset)
    rows = []
    for results in found:
        ods = results["ods"]
        values = [ods["f"], results["ois"]["f"], results["ap"], ods["precision"], ods["recall"], ods["threshold"]]
        rows.append([results["name"], *(f"{value:.3f}" for value in values)])
    write_table(output / "table.md", ["method", "ODS", "OIS", "AP", "precision", "recall", "threshold"], rows)
    precision_recall_figure(
        output / "edges.png", {r["name"]: (r["curve"]["recall"], r["curve"]["precision"], r["ods"]) for r in found}
    )
    names = list(photographs)
    sheet = []
    for image in [names[i] for i in np.linspace(0, len(names) - 1, min(GALLERY, len(names))).round().astype(int)]:
        photograph, truth = photographs[image]
        row = [(image, read_image(photograph)), ("people", _ink(np.mean(read_boundaries(truth), axis=0)))]
        for results in found:
            with Image.open(output / results["name"] / "edges" / f"{image}.png") as png:
                strength = np.asarray(png, float) / 255
            row.append((results["name"], _ink(strength / (2 * results["ods"]["threshold"]))))
        sheet.append(row)
    save_png(output / "gallery.png", panel(sheet))


def _ink(strength: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: white at 0 to black at 1 and beyond."""
    return np.repeat(np.rint(255 * (1 - np.minimum(strength, 1))).astype(np.uint8)[..., None], 3, axis=2)
