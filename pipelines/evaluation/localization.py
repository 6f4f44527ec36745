"""Visual localisation: the protocol of Aachen Day-Night v1.1 (Table II of the paper), and of any posed photographs.

Sattler et al., Benchmarking 6DOF outdoor visual localization in changing conditions, CVPR 2018: a map is triangulated
from the matches between database images at their known poses; a query's matches with the database images that were
retrieved for it give 2D-3D matches, from which PnP in RANSAC finds its pose. What counts is the share of queries within
each of three thresholds of position and orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycolmap

from samfeat.pipelines.evaluate import collect_results, write_table
from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera, pose_errors
from samfeat.pipelines.evaluation.posed_scenes import PosedScene, find_posed_scenes
from samfeat.pipelines.evaluation.scenes import SceneTask, evaluate_scenes
from samfeat.pipelines.evaluation.sfm import (
    SEED,
    create_database,
    match_database,
    points_and_colors,
    posed_camera,
    posed_cameras,
    quiet,
    triangulate_database,
)
from samfeat.pipelines.evaluation.view3d import View, write_preview, write_view
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import Method
from samfeat.pipelines.files import write_bytes
from samfeat.pipelines.pictures.draw import bar_figure

REPROJECTION = 12.0  # pixels: RANSAC's threshold, as in hloc's pipeline


class Localized(NamedTuple):
    """What became of a query.

    Attributes:
        pose: where it was taken; None where that cannot be told.
        inliers: 2D-3D matches that agree with the pose.
        matches: 2D-3D matches in all.
    """

    pose: Pose | None
    inliers: int
    matches: int


def evaluate_localize(
    folder: str | Path,
    output: str | Path,
    *,
    method: Method,
    name: str | None = None,
    ratio: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Localises the queries of the scenes of a folder with the features of a method.

    Writes ``<output>/<name>/features.h5`` and ``results.json``; for every scene ``<output>/<name>/<scene>/`` with
    COLMAP's ``database.db`` and the triangulated ``map``, the poses that were found (one line a query, its name without
    folders and qw qx qy qz tx ty tz, world to camera: what visuallocalization.net takes), the page ``view.html`` and
    the picture ``view.png``; and from the results of all methods in ``output`` the table ``table.md`` and the figure
    ``localization.png``. Whatever is there already is not computed again; an interrupted run goes on with the next.

    Args:
        folder: the scenes, see :func:`samfeat.pipelines.evaluation.posed_scenes.find_posed_scenes`.
        output: folder of this evaluation, for any number of methods.
        method: what is evaluated. Its descriptors are compared at unit length, as by the benchmark's own matcher.
        name: what the method is called in the output; by default its own name.
        ratio: also demand that the best match is better than the second by this ratio of distances, in (0, 1].
        overwrite: compute everything anew.
        progress: called with (done, total); images extracted, pairs matched and queries localised count one each.

    Returns:
        what ``results.json`` holds: ``name``, ``method``, ``dataset``, ``settings``, and in ``scenes`` by name
        ``database_images``, ``features`` (mean an image), ``points`` of the map, and in ``queries`` by subset (``all``,
        and others where the scene tells them apart) ``images``, ``localized`` (those with a pose) and ``inliers``
        (median of 2D-3D matches); with truth also ``recall`` (share of the queries within each of the scene's
        ``thresholds``, a query without a pose is outside), ``centre_error`` and ``rotation_error`` (medians over all,
        None where half have no pose). ``poses`` has by query ``inliers``, ``matches`` and the errors.

    Raises:
        ValueError: bad scenes or images; stored features or matches of another configuration or other images; or
            results on other scenes in ``output``.
    """
    name = name or method.name
    tasks = {
        scene.name: SceneTask(
            images={image: scene.folder / image for image in scene.names},
            identity=scene.identity(),
            steps=_steps(scene),
            run=partial(_localize, scene, name=name, overwrite=overwrite),
        )
        for scene in find_posed_scenes(folder)
    }
    settings = {"ratio": ratio, "reprojection": REPROJECTION, "seed": SEED, "colmap": pycolmap.__version__}
    results = evaluate_scenes(
        tasks, output, method=method, name=name, settings=settings, overwrite=overwrite, progress=progress
    )
    write_comparison(output, results["dataset"])
    return results


def _steps(scene: PosedScene) -> int:
    """Pairs to match and queries to localise."""
    return len(scene.map_pairs) + len(scene.query_pairs) + len(scene.queries)


def _localize(
    scene: PosedScene,
    folder: Path,
    features: Callable[[str], Features],
    *,
    name: str,
    config: Mapping[str, Any],
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """Results of one scene."""

    def step(first: int) -> Progress | None:
        return progress and (lambda done, _: progress(first + done, 0))

    cameras = {image: camera for image, (camera, _) in scene.database.items()} | scene.queries
    poses = {image: pose for image, (_, pose) in scene.database.items()}
    counts = _check_sizes(scene, cameras, features)
    database = create_database(folder, cameras, features, config=config, overwrite=overwrite)
    ratio = config["ratio"]
    match_database(database, features, scene.map_pairs, ratio=ratio, progress=step(0))
    first = len(scene.map_pairs)
    match_database(database, features, scene.query_pairs, ratio=ratio, verify=False, progress=step(first))
    model = triangulate_database(database, scene.folder, cameras, poses)
    found = {}
    retrieved: dict[str, list[str]] = {}
    for query, image in scene.query_pairs:
        retrieved.setdefault(query, []).append(image)
    with closing(pycolmap.Database.open(database)) as opened:
        for number, (query, camera) in enumerate(scene.queries.items(), start=1):
            found[query] = localize_image(opened, model, query, retrieved.get(query, []), camera)
            if progress:
                progress(first + len(scene.query_pairs) + number, 0)
    located = {query: answer.pose for query, answer in found.items() if answer.pose is not None}
    write_poses(folder / scene.poses_file.format(name=name), located)
    _show(scene, model, located, folder, f"{scene.name}, {name}: {len(located)} of {len(found)} queries localised")
    results: dict[str, Any] = {
        "database_images": len(scene.database),
        "features": float(np.mean(counts)),
        "points": model.num_points3D(),
    }
    entries: dict[str, dict[str, Any]] = {
        query: {"inliers": answer.inliers, "matches": answer.matches} for query, answer in found.items()
    }
    if scene.truth is not None:
        results["thresholds"] = [list(pair) for pair in scene.thresholds]
        errors = pose_errors(list(located.values()), [scene.truth[query].pose for query in located])
        for query, centre, rotation in zip(located, errors.centres, errors.rotations, strict=True):
            entries[query] |= {"centre": float(centre), "rotation": float(rotation)}
    results["queries"] = {
        subset: _summary({query: entries[query] for query in queries}, located, results.get("thresholds"))
        for subset, queries in scene.subsets().items()
    }
    return {**results, "poses": entries}


def _check_sizes(
    scene: PosedScene, cameras: Mapping[str, pycolmap.Camera], features: Callable[[str], Features]
) -> list[int]:
    """Numbers of keypoints; refuses an image that is not of its camera's size, where every pose would be wrong."""
    counts = []
    for image, camera in cameras.items():
        found = features(image)
        size = tuple(int(side) for side in found["image_size"])
        if size != (camera.width, camera.height):
            raise ValueError(
                f"{scene.folder / image} has {size[0]} x {size[1]} pixels, its camera {camera.width} x "
                f"{camera.height}: give the images that the cameras were calibrated for"
            )
        counts.append(len(found["keypoints"]))
    return counts


def localize_image(
    database: pycolmap.Database,
    model: pycolmap.Reconstruction,
    query: str,
    retrieved: Sequence[str],
    camera: pycolmap.Camera,
) -> Localized:
    """Localises a query by its matches in a database with triangulated images.

    Args:
        database: holds the matches of the query with the retrieved images.
        model: the map.
        query: name of the query.
        retrieved: names of database images; those that are not in the map are passed over.
        camera: of the query.

    Raises:
        KeyError: the database does not hold the query.
    """
    stored = database.read_image_with_name(query)
    if stored is None:
        raise KeyError(query)
    number = stored.image_id
    seen: dict[tuple[int, int], None] = {}  # (keypoint, point), each once, in order
    for name in retrieved:
        image = model.find_image_with_name(name)
        if image is None or not database.exists_matches(number, image.image_id):
            continue
        points = [point.point3D_id if point.has_point3D() else None for point in image.points2D]
        for keypoint, other in database.read_matches(number, image.image_id).tolist():
            if points[other] is not None:
                seen[keypoint, points[other]] = None
    if len(seen) < 4:
        return Localized(None, 0, len(seen))
    keypoints = database.read_keypoints(number)[:, :2].astype(np.float64)
    options = pycolmap.AbsolutePoseEstimationOptions()
    options.ransac.max_error, options.ransac.random_seed = REPROJECTION, SEED
    with quiet():
        answer = pycolmap.estimate_and_refine_absolute_pose(
            keypoints[[keypoint for keypoint, _ in seen]],
            np.array([model.points3D[point].xyz for _, point in seen]),
            camera,
            options,
        )
    if answer is None:
        return Localized(None, 0, len(seen))
    matrix = answer["cam_from_world"].matrix()
    return Localized(Pose(matrix[:, :3], matrix[:, 3]), int(answer["num_inliers"]), len(seen))


def write_poses(path: str | Path, poses: Mapping[str, Pose]) -> Path:
    """Writes ``name qw qx qy qz tx ty tz`` a line, world to camera, names without folders, in the order given.

    Raises:
        ValueError: two names that differ in their folders only.
    """
    lines: dict[str, str] = {}
    for name, pose in poses.items():
        short = name.rsplit("/", 1)[-1]
        if short in lines:
            raise ValueError(f"two queries are called {short!r}: rename one, the file of poses has no folders")
        x, y, z, w = pycolmap.Rotation3d(pose.rotation).quat
        lines[short] = " ".join([short, *(repr(float(v)) for v in (w, x, y, z, *pose.translation))]) + "\n"
    return write_bytes(path, "".join(lines.values()).encode())


def _summary(
    entries: Mapping[str, Mapping[str, Any]], located: Mapping[str, Pose], thresholds: Sequence[Sequence[float]] | None
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "images": len(entries),
        "localized": sum(query in located for query in entries),
        "inliers": float(np.median([entry["inliers"] for entry in entries.values()])),
    }
    if thresholds is None:
        return summary
    centres, rotations = (
        np.array([entry.get(key, np.inf) for entry in entries.values()]) for key in ("centre", "rotation")
    )
    summary["recall"] = [float(((centres <= far) & (rotations <= turned)).mean()) for far, turned in thresholds]
    for key, values in (("centre_error", centres), ("rotation_error", rotations)):
        median = float(np.median(values))
        summary[key] = median if np.isfinite(median) else None
    return summary


def _show(
    scene: PosedScene, model: pycolmap.Reconstruction, located: Mapping[str, Pose], folder: Path, title: str
) -> None:
    """Writes the page and the picture of a map with the queries in it."""
    queries = {query: posed_camera(scene.queries[query], pose) for query, pose in located.items()}
    cameras: dict[str, dict[str, PosedCamera]] = {"database": posed_cameras(model), "localised": queries}
    if scene.truth is not None:
        cameras["true"] = scene.truth
    view = View(title, *points_and_colors(model), cameras)
    write_view(folder / "view.html", view)
    write_preview(folder / "view.png", view)


def write_comparison(output: str | Path, dataset: Mapping[str, Any]) -> None:
    """Writes ``table.md`` and ``localization.png`` of all methods in an evaluation folder."""
    found = collect_results(output, dataset)
    rows: list[list[str]] = []
    panels: dict[str, dict[str, dict[str, float | None]]] = {}
    for scene in dataset:
        for results in found:
            facts = results["scenes"][scene]
            for subset, queries in facts["queries"].items():
                recall = queries.get("recall")
                shares = [f"{100 * share:.1f}" for share in recall] if recall else ["-"] * 3
                errors = [
                    "-" if queries.get(key) is None else format(queries[key], form)
                    for key, form in (("centre_error", ".4f"), ("rotation_error", ".3f"))
                ]
                localized = f"{queries['localized']}/{queries['images']}"
                points, inliers = str(facts["points"]), f"{queries['inliers']:.0f}"
                rows.append([scene, subset, results["name"], points, localized, inliers, *shares, *errors])
                group = scene if subset == "all" else f"{scene}, {subset}"
                values = [queries["localized"] / queries["images"], queries["inliers"], *(recall or [None] * 3)]
                for title, value in zip(("localised", "inliers", "fine", "medium", "coarse"), values, strict=True):
                    panels.setdefault(title, {}).setdefault(group, {})[results["name"]] = value
    header = ["scene", "queries", "method", "map points", "localised", "median inliers", "fine [%]", "medium [%]"]
    header += ["coarse [%]", "median centre error", "median rotation error [deg]"]
    write_table(Path(output) / "table.md", header, rows)
    bar_figure(Path(output) / "localization.png", panels)
