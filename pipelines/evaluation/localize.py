"""Visual localisation: the protocol of Aachen Day-Night v1.1 (Table II of the paper), and of any posed photographs.

Sattler et al., Benchmarking 6DOF outdoor visual localization in changing conditions, CVPR 2018: a map is triangulated
from the matches between database images at their known poses; a query's matches with the database images that were
retrieved for it give 2D-3D matches, from which PnP in RANSAC finds its pose. What counts is the share of queries within
each of three thresholds of position and orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pycolmap

from samfeat.files import write_bytes
from samfeat.pipelines.evaluation.camera_poses import Pose, PosedCamera, pose_errors
from samfeat.pipelines.evaluation.per_scene import RATIO_MEANING, RATIOS, SceneTask, check_ratios, run_scenes
from samfeat.pipelines.evaluation.posed_scenes import PosedScene, find_posed_scenes
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Results
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
from samfeat.pipelines.evaluation.view3d import SceneView, write_preview, write_view
from samfeat.pipelines.extract import Progress
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.pictures.charts import bar_chart
from samfeat.pipelines.pictures.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPROJECTION = 12.0  # pixels: RANSAC's threshold, as in hloc's pipeline


class Localized(NamedTuple):
    """Estimated pose of a query.

    Attributes:
        pose: estimated pose; None if there is none.
        inliers: 2D-3D matches that agree with the pose.
        matches: 2D-3D matches in all.
    """

    pose: Pose | None
    inliers: int
    matches: int


@dataclass(frozen=True)
class LocalizedQuery:
    """A query.

    Attributes:
        inliers: 2D-3D matches that agree with its pose.
        matches: 2D-3D matches in all.
        centre: distance from the true centre, in the units of the ground truth; None without ground truth or without a
            pose.
        rotation: angle to the true orientation, in degrees; None likewise.
    """

    inliers: int
    matches: int
    centre: float | None = None
    rotation: float | None = None


@dataclass(frozen=True)
class QuerySummary:
    """Results on a set of queries.

    Attributes:
        images: their number.
        localized: number with a pose.
        inliers: median number of 2D-3D matches that agree with the pose.
        recall: share within each of the scene's thresholds, queries without a pose counting as outside; None without
            ground truth.
        centre_error: median over all, in the units of the ground truth; None if half of the queries have no pose, or
            without ground truth.
        rotation_error: the same in degrees.
    """

    images: int
    localized: int
    inliers: float
    recall: list[float] | None = None
    centre_error: float | None = None
    rotation_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LocalizedScene:
    """A scene.

    Attributes:
        database_images: images that the map is built from.
        features: mean number per image.
        points: of the map.
        thresholds: (distance, degrees), fine, medium and coarse; None without ground truth.
        queries: by subset: ``all``, and others that the scene defines.
        poses: by query.
    """

    database_images: int
    features: float
    points: int
    thresholds: list[list[float]] | None
    queries: dict[str, QuerySummary]
    poses: dict[str, LocalizedQuery]


@dataclass(frozen=True, kw_only=True)
class LocalizeResults(Results):
    """Poses of queries.

    Attributes:
        settings: what the poses depend on besides method, data and ratio.
        scenes: by scene and by ratio of distances, ``none`` or a number.
    """

    settings: dict[str, Any]
    scenes: dict[str, dict[str, LocalizedScene]]


@dataclass(frozen=True)
class Localize(Evaluation[Method, LocalizeResults]):
    """Localises queries, see :func:`samfeat.pipelines.evaluation.posed_scenes.find_posed_scenes`.

    Every scene has a folder for every ratio with COLMAP's ``database.db`` and the triangulated ``map``, the estimated
    poses (one line per query: its name without folders and qw qx qy qz tx ty tz, world to camera, as expected by
    visuallocalization.net), the page ``view.html`` and the picture ``view.png``. Descriptors are compared at unit
    length, as by the benchmark's own matcher.

    Attributes:
        ratios: maximum ratio of the distances to the best and the second best descriptor; None for no ratio test.
    """

    ratios: tuple[float | None, ...] = RATIOS

    results = LocalizeResults
    title = "Visual localisation"
    meaning = (
        "A map is triangulated from database photographs with known poses; queries are placed in it. Fine, medium and "
        "coarse are three pairs of limits of position and orientation, for Aachen 0.25 m and 2 degrees, 0.5 m and 5, "
        "5 m and 10."
    )

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def run(self, job: Job[Method]) -> LocalizeResults:
        """Localise with every ratio; every extracted image, matched pair and localised query counts as one step."""
        tasks = {
            scene.name: SceneTask(
                images={image: scene.folder / image for image in scene.names},
                identity=scene.identity(),
                steps=_steps(scene),
                run=partial(_localize, scene, name=job.name, overwrite=job.overwrite),
            )
            for scene in find_posed_scenes(job.data)
        }
        settings = {"reprojection": REPROJECTION, "seed": SEED, "colmap": pycolmap.__version__}
        shared, found = run_scenes(job, tasks, ratios=self.ratios, settings=settings)
        return LocalizeResults(**shared, settings=settings, scenes=found)

    def table(self, found: Sequence[LocalizeResults]) -> Table:
        """One row per scene, subset, method and ratio."""
        columns = [Column("scene"), Column("queries", "all, or those by day or by night"), Column("method")]
        columns += [
            Column("ratio", RATIO_MEANING),
            Column("map points", "triangulated from the database", "d"),
            Column("localised [%]", "share of queries that get a pose", ".1f", "highest"),
            Column("median inliers", "2D-3D matches that agree with the pose", ".0f"),
        ]
        columns += [
            Column(f"{grade} [%]", "share of queries within the limits", ".1f", "highest")
            for grade in ("fine", "medium", "coarse")
        ]
        columns += [
            Column("median centre error", "distance from the true position, in units of the truth", ".4f", "lowest"),
            Column("median rotation error [deg]", "angle from the true orientation", ".3f", "lowest"),
        ]
        rows: list[list[Cell]] = []
        for scene, subset, method, ratio, facts, queries in _flat(found):
            recall: list[Cell] = [100 * share for share in queries.recall] if queries.recall else [None] * 3
            share = 100 * queries.localized / queries.images
            rows.append([scene, subset, method, ratio, facts.points, share, queries.inliers, *recall])
            rows[-1] += [queries.centre_error, queries.rotation_error]
        return Table(columns, rows)

    def figures(self, found: Sequence[LocalizeResults]) -> dict[str, Figure]:
        """Bars of all quantities."""
        panels: dict[str, dict[str, dict[str, float | None]]] = {}
        for scene, subset, method, ratio, _, queries in _flat(found):
            group = f"{scene if subset == 'all' else f'{scene}, {subset}'}\nratio {ratio}"
            recall: list[float | None] = [*queries.recall] if queries.recall else [None] * 3
            values = [queries.localized / queries.images, queries.inliers, *recall]
            for title, value in zip(("localised", "inliers", "fine", "medium", "coarse"), values, strict=True):
                panels.setdefault(title, {}).setdefault(group, {})[method] = value
        return {"localization": bar_chart(panels)}


def _flat(found: Sequence[LocalizeResults]) -> list[tuple[str, str, str, str, LocalizedScene, QuerySummary]]:
    """(scene, subset, method, ratio, results of the scene, results of the subset), scene by scene."""
    return [
        (scene, subset, results.name, ratio, facts, queries)
        for scene in found[0].scenes
        for results in found
        for ratio, facts in results.scenes[scene].items()
        for subset, queries in facts.queries.items()
    ]


def _steps(scene: PosedScene) -> int:
    """Number of pairs to match and queries to localise."""
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
) -> LocalizedScene:
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
    errors: dict[str, tuple[float, float]] = {}
    if scene.truth is not None:
        off = pose_errors(list(located.values()), [scene.truth[query].pose for query in located])
        errors = dict(zip(located, zip(off.centres.tolist(), off.rotations.tolist()), strict=True))
    entries = {
        query: LocalizedQuery(answer.inliers, answer.matches, *errors.get(query, ())) for query, answer in found.items()
    }
    thresholds = None if scene.truth is None else [list(pair) for pair in scene.thresholds]
    return LocalizedScene(
        database_images=len(scene.database),
        features=float(np.mean(counts)),
        points=model.num_points3D(),
        thresholds=thresholds,
        queries={
            subset: _summary({query: entries[query] for query in queries}, located, thresholds)
            for subset, queries in scene.subsets().items()
        },
        poses=entries,
    )


def _check_sizes(
    scene: PosedScene, cameras: Mapping[str, pycolmap.Camera], features: Callable[[str], Features]
) -> list[int]:
    """Numbers of keypoints; refuses an image that differs from its camera's size, since every pose would be wrong."""
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
    """Localise a query by its matches with triangulated images.

    Args:
        database: holds the matches of the query with the retrieved images.
        model: the map.
        query: name of the query.
        retrieved: names of database images; those not in the map are skipped.
        camera: of the query.

    Raises:
        KeyError: the database does not hold the query.
    """
    stored = database.read_image_with_name(query)
    if stored is None:
        raise KeyError(query)
    number = stored.image_id
    seen: dict[tuple[int, int], None] = {}  # (keypoint, point), unique and sorted
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
    """Write lines of ``name qw qx qy qz tx ty tz``, world to camera, names without folders, in the given order.

    Raises:
        ValueError: two names that differ only in their folders.
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
    entries: Mapping[str, LocalizedQuery], located: Mapping[str, Pose], thresholds: Sequence[Sequence[float]] | None
) -> QuerySummary:
    localized = sum(query in located for query in entries)
    inliers = float(np.median([entry.inliers for entry in entries.values()]))
    if thresholds is None:
        return QuerySummary(len(entries), localized, inliers)
    centres = np.array([np.inf if entry.centre is None else entry.centre for entry in entries.values()])
    rotations = np.array([np.inf if entry.rotation is None else entry.rotation for entry in entries.values()])
    recall = [float(((centres <= far) & (rotations <= turned)).mean()) for far, turned in thresholds]
    medians = (float(np.median(values)) for values in (centres, rotations))
    return QuerySummary(len(entries), localized, inliers, recall, *(m if np.isfinite(m) else None for m in medians))


def _show(
    scene: PosedScene, model: pycolmap.Reconstruction, located: Mapping[str, Pose], folder: Path, title: str
) -> None:
    """Write the page and the picture of a map with its queries."""
    queries = {query: posed_camera(scene.queries[query], pose) for query, pose in located.items()}
    cameras: dict[str, dict[str, PosedCamera]] = {"database": posed_cameras(model), "localised": queries}
    if scene.truth is not None:
        cameras["true"] = scene.truth
    view = SceneView(title, *points_and_colors(model), cameras)
    write_view(folder / "view.html", view)
    write_preview(folder / "view.png", view)
