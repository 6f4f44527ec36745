"""Reconstruction of photo collections: the protocol of the ETH local feature benchmark (Table III of the paper).

Schönberger et al., Comparative evaluation of hand-crafted and learned local features, CVPR 2017: all images of a scene
are matched with each other (mutual nearest neighbours that pass the ratio test), verified and mapped by COLMAP; what
counts is the largest model. Where a scene brings true cameras, the poses are measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycolmap

from samfeat.pipelines.evaluate import collect_results, error_auc, write_table
from samfeat.pipelines.evaluation.camera_poses import (
    PosedCamera,
    align,
    aligned_errors,
    read_cameras,
    relative_pose_errors,
)
from samfeat.pipelines.evaluation.scenes import SceneTask, evaluate_scenes
from samfeat.pipelines.evaluation.sfm import (
    SEED,
    camera_pose,
    count_dense_points,
    count_verified,
    create_database,
    digest,
    guess_camera,
    map_database,
    match_database,
    pinhole,
    points_and_colors,
    posed_cameras,
)
from samfeat.pipelines.evaluation.view3d import View, write_preview, write_view
from samfeat.pipelines.extract import Progress, list_images
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.pictures.draw import bar_figure
from samfeat.teacher_cache.images import IMAGE_SUFFIXES

RATIO = 0.8
ANGLES = (1, 3, 5)  # degrees: thresholds of the relative pose error

_COLUMNS = {  # of the table: heading and format by key of a scene's results
    "registered": ("registered", "d"),
    "points": ("sparse points", "d"),
    "track_length": ("track length", ".2f"),
    "reprojection_error": ("reprojection error [px]", ".2f"),
    "dense_points": ("dense points", "d"),
    "centre_error": ("median centre error", ".4f"),
    "rotation_error": ("median rotation error [deg]", ".3f"),
    **{f"auc{t}": (f"pose AUC@{t}°", ".3f") for t in ANGLES},
}


class Collection(NamedTuple):
    """Photographs of one scene.

    Attributes:
        name: name of the scene.
        folder: what the names of the images are relative to.
        images: path by name.
        truth: true camera by image name, None where nobody knows.
    """

    name: str
    folder: Path
    images: dict[str, Path]
    truth: dict[str, PosedCamera] | None


def find_collections(folder: str | Path) -> list[Collection]:
    """The scenes of a folder, in alphabetical order.

    A scene is a folder with its photographs in ``images`` (as in the ETH benchmark), or with photographs and no such
    folder; true cameras stand in its ``cameras*.json``, see
    :func:`samfeat.pipelines.evaluation.camera_poses.read_cameras`. The folder itself may be a scene, else every
    folder in it is one.

    Raises:
        FileNotFoundError: no such folder; or true cameras of an image that is not there.
        ValueError: no scene.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one scene's, or one with a folder for every scene")
    if (folder / "images").is_dir() or _holds_photographs(folder):
        return [_read_collection(folder)]
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [path for path in found if (path / "images").is_dir() or _holds_photographs(path)]
    if not found:
        raise ValueError(f"{folder} holds no scene: put photographs there, or a folder of photographs for every scene")
    return [_read_collection(path) for path in found]


def _holds_photographs(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _read_collection(folder: Path) -> Collection:
    images = folder / "images" if (folder / "images").is_dir() else folder
    paths, truth = list_images(images), read_cameras(folder)
    missing = sorted((truth or {}).keys() - paths.keys())
    if missing:
        raise FileNotFoundError(f"{images} lacks {missing[0]}, whose camera is given: add it, or remove its camera")
    return Collection(folder.resolve().name, images, paths, truth)


def evaluate_reconstruct(
    folder: str | Path,
    output: str | Path,
    *,
    method: Method,
    name: str | None = None,
    ratio: float | None = RATIO,
    calibrated: bool = True,
    threads: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstructs the scenes of a folder with the features of a method.

    Writes ``<output>/<name>/features.h5`` and ``results.json``; for every scene ``<output>/<name>/<scene>/`` with
    COLMAP's ``database.db`` and ``sparse`` model, the page ``view.html`` and the picture ``view.png``; and from the
    results of all methods in ``output`` the table ``table.md`` and the figure ``reconstruction.png``. Whatever is there
    already is not computed again; one interrupted run goes on with the next.

    Args:
        folder: the scenes, see :func:`find_collections`.
        output: folder of this evaluation, for any number of methods.
        method: what is evaluated. Its descriptors are compared at unit length: a ratio of distances means nothing else.
        name: what the method is called in the output; by default its own name.
        ratio: of the distance to the best and to the second best descriptor; None demands none.
        calibrated: where true cameras are known, use their calibration and keep it (PINHOLE). Else, and elsewhere, the
            calibration is COLMAP's guess (EXIF, or a focal length of 1.2 x the longer side), which mapping refines.
        threads: of the mapper; only 1 gives the same model twice.
        overwrite: compute everything anew.
        progress: called with (done, total); images extracted, pairs matched and images mapped count one each.

    Returns:
        what ``results.json`` holds: ``name``, ``method``, ``dataset``, ``settings``, and in ``scenes`` by name
        ``images``, ``features`` (mean an image), ``verified_pairs``, ``registered``, ``points``, ``observations``,
        ``track_length``, ``reprojection_error`` (pixels; None without points), with CUDA ``dense_points``, and with
        truth ``auc1``, ``auc3``, ``auc5`` (of the relative pose error in degrees over all pairs of images, see
        :func:`samfeat.pipelines.evaluation.camera_poses.relative_pose_errors`), and over the registered images
        ``centre_error`` (units of the truth) and ``rotation_error`` (degrees), medians after alignment (see
        :func:`samfeat.pipelines.evaluation.camera_poses.aligned_errors`), None where too few are registered, and both
        by image in ``errors``.

    Raises:
        ValueError: bad scenes or images; stored features, matches or models of another configuration or other images;
            or results on other scenes in ``output``.
    """
    name = name or method.name
    tasks = {
        scene.name: SceneTask(
            images=scene.images,
            identity=_identity(scene),
            steps=_steps(scene),
            run=partial(_evaluate, scene, name=name, threads=threads, overwrite=overwrite),
        )
        for scene in find_collections(folder)
    }
    settings = {"ratio": ratio, "calibrated": calibrated, "seed": SEED, "colmap": pycolmap.__version__}
    results = evaluate_scenes(
        tasks, output, method=method, name=name, settings=settings, overwrite=overwrite, progress=progress
    )
    write_comparison(output, results["dataset"])
    return results


def _identity(scene: Collection) -> dict[str, Any]:
    truth = {image: [part.tolist() for part in (c.matrix, *c.pose)] for image, c in (scene.truth or {}).items()}
    return {"images": len(scene.images), "names_sha256": digest(list(scene.images)), "truth_sha256": digest(truth)}


def _steps(scene: Collection) -> int:
    """Pairs to match and images to map."""
    return len(scene.images) * (len(scene.images) + 1) // 2


def _evaluate(
    scene: Collection, folder: Path, features: Callable[[str], Features], *, name: str, **options: Any
) -> dict[str, Any]:
    """What is known of a scene's model, which is drawn as well; for the options see :func:`_reconstruct`."""
    model, facts = _reconstruct(scene, folder, features, **options)
    _show(scene, model, folder, f"{scene.name}, {name}")
    return {**facts, **_quality(model, scene.truth)}


def _reconstruct(
    scene: Collection,
    folder: Path,
    features: Callable[[str], Features],
    *,
    config: Mapping[str, Any],
    threads: int,
    overwrite: bool,
    progress: Progress | None,
) -> tuple[pycolmap.Reconstruction, dict[str, Any]]:
    """The model of a scene, and what is known of its images and matches."""
    truth = (scene.truth or {}) if config["calibrated"] else {}
    pairs = list(combinations(scene.images, 2))
    counts, cameras = [], {}
    for image, path in scene.images.items():
        found = features(image)
        width, height = (int(side) for side in found["image_size"])
        counts.append(len(found["keypoints"]))
        cameras[image] = pinhole(truth[image]) if image in truth else guess_camera(path, (height, width))
    database = create_database(folder, cameras, features, config=config, overwrite=overwrite)
    match_database(database, features, pairs, ratio=config["ratio"], progress=progress)
    model = map_database(
        database,
        scene.folder,
        fixed_intrinsics=len(truth) == len(cameras),
        threads=threads,
        progress=progress and (lambda images: progress(len(pairs) + min(images, len(cameras)), 0)),
    )
    facts: dict[str, Any] = {
        "images": len(cameras),
        "features": float(np.mean(counts)),
        "verified_pairs": count_verified(database),
    }
    dense = count_dense_points(database, scene.folder)
    return model, facts if dense is None else {**facts, "dense_points": dense}


def _quality(model: pycolmap.Reconstruction, truth: Mapping[str, PosedCamera] | None) -> dict[str, Any]:
    """What the benchmark counts, and how far the poses are from the truth."""
    points = model.num_points3D()
    quality: dict[str, Any] = {
        "registered": model.num_reg_images(),
        "points": points,
        "observations": model.compute_num_observations(),
        "track_length": model.compute_mean_track_length(),
        "reprojection_error": model.compute_mean_reprojection_error() if points else None,
    }
    if truth is None:
        return quality
    estimated = {image.name: camera_pose(image) for image in model.images.values() if image.has_pose}
    estimated = {image: pose for image, pose in estimated.items() if image in truth}
    relative = relative_pose_errors(estimated, {image: camera.pose for image, camera in truth.items()})
    areas = error_auc(relative, ANGLES) if len(relative) else [0.0] * len(ANGLES)
    quality |= {f"auc{angle}": area for angle, area in zip(ANGLES, areas)}
    known = [truth[image].pose for image in estimated]
    errors = aligned_errors(list(estimated.values()), known)
    if errors is None:
        return {**quality, "centre_error": None, "rotation_error": None, "errors": {}}
    by_image = {
        image: {"centre": float(centre), "rotation": float(rotation)}
        for image, centre, rotation in zip(estimated, errors.centres, errors.rotations, strict=True)
    }
    medians = {"centre_error": float(np.median(errors.centres)), "rotation_error": float(np.median(errors.rotations))}
    return {**quality, **medians, "errors": dict(sorted(by_image.items()))}


def _show(scene: Collection, model: pycolmap.Reconstruction, folder: Path, title: str) -> None:
    """Writes the page and the picture of a model; none of an empty one."""
    if not model.num_reg_images():
        return
    title = f"{title}: {model.num_reg_images()} of {len(scene.images)} images, {model.num_points3D():,} points"
    cameras = {"estimated": posed_cameras(model)}
    if scene.truth is not None:
        shared = [image for image in cameras["estimated"] if image in scene.truth]
        moved = align([scene.truth[i].pose for i in shared], [cameras["estimated"][i].pose for i in shared])
        if moved is not None:
            cameras["true"] = {i: scene.truth[i]._replace(pose=pose) for i, pose in zip(shared, moved, strict=True)}
    view = View(title, *points_and_colors(model), cameras)
    write_view(folder / "view.html", view)
    write_preview(folder / "view.png", view)


def write_comparison(output: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes ``table.md`` and ``reconstruction.png`` of all methods in an evaluation folder."""
    found = collect_results(output, dataset)
    scenes = [(r["name"], scene, facts) for scene in dataset for r in found for facts in [r["scenes"][scene]]]
    columns = {key: column for key, column in _COLUMNS.items() if any(key in facts for _, _, facts in scenes)}
    rows = [
        [scene, method, str(facts["images"]), f"{facts['features']:.0f}"]
        + ["-" if facts.get(key) is None else format(facts[key], form) for key, (_, form) in columns.items()]
        for method, scene, facts in scenes
    ]
    header = ["scene", "method", "images", "features/image", *(heading for heading, _ in columns.values())]
    write_table(Path(output) / "table.md", header, rows)
    panels = {
        heading: {scene: {r["name"]: r["scenes"][scene].get(key) for r in found} for scene in dataset}
        for key, (heading, _) in columns.items()
    }
    bar_figure(Path(output) / "reconstruction.png", panels)
