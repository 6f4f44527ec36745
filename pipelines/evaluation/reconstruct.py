"""Reconstruction of photo collections: the protocol of the ETH local feature benchmark (Table III of the paper).

Schönberger et al., Comparative evaluation of hand-crafted and learned local features, CVPR 2017: all images of a scene
are matched with each other (mutual nearest neighbours that pass the ratio test), verified and mapped by COLMAP; the
largest model is evaluated. If a scene has ground-truth cameras, the poses are measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pycolmap

from samfeat.images import IMAGE_SUFFIXES
from samfeat.pipelines.evaluation.camera_poses import (
    PosedCamera,
    align,
    aligned_errors,
    read_cameras,
    relative_pose_errors,
)
from samfeat.pipelines.evaluation.per_scene import RATIO_MEANING, RATIOS, SceneTask, check_ratios, run_scenes
from samfeat.pipelines.evaluation.protocol import Evaluation, Job, Results
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
from samfeat.pipelines.evaluation.view3d import SceneView, write_preview, write_view
from samfeat.pipelines.extract import Progress, list_images
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.protocol import Method
from samfeat.pipelines.metrics import error_auc
from samfeat.pipelines.pictures.charts import bar_chart
from samfeat.pipelines.pictures.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANGLES = (1, 3, 5)  # degrees: thresholds of the relative pose error

_COLUMNS = {  # by field of a scene's results
    "registered": Column("registered", "photographs that the largest model places", "d", "highest"),
    "points": Column("sparse points", "3-D points of that model", "d", "highest"),
    "track_length": Column("track length", "mean number of photographs that show a point", ".2f", "highest"),
    "reprojection_error": Column(
        "reprojection error [px]", "mean distance between keypoints and their projected points", ".2f"
    ),
    "dense_points": Column("dense points", "of COLMAP's multi-view stereo", "d", "highest"),
    "centre_error": Column(
        "median centre error",
        "distance of camera centres from the truth, aligned, in its units",
        ".4f",
        "lowest",
    ),
    "rotation_error": Column(
        "median rotation error [deg]", "angle of cameras from the truth after alignment", ".3f", "lowest"
    ),
    **{
        f"auc{t}": Column(
            f"pose AUC@{t}°",
            f"area under the curve of relative pose errors up to {t} degrees, all pairs of photographs, in [0, 1]",
            ".3f",
            "highest",
        )
        for t in ANGLES
    },
}


class Collection(NamedTuple):
    """Photographs of one scene.

    Attributes:
        name: name of the scene.
        folder: folder that image names are relative to.
        images: path by name.
        truth: true camera by image name; None if unknown.
    """

    name: str
    folder: Path
    images: dict[str, Path]
    truth: dict[str, PosedCamera] | None


def find_collections(folder: str | Path) -> list[Collection]:
    """The scenes of a folder, in alphabetical order.

    A scene is a folder with its photographs in ``images`` (as in the ETH benchmark), or directly in the folder; true
    cameras are read from its ``cameras*.json``, see :func:`samfeat.pipelines.evaluation.camera_poses.read_cameras`. The
    folder may be a scene itself; otherwise every folder in it is one.

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


@dataclass(frozen=True)
class CameraError:
    """Errors of one camera after alignment: distance of its centre in the units of the ground truth, and angle in
    degrees."""

    centre: float
    rotation: float


@dataclass(frozen=True, kw_only=True)
class ReconstructedScene:
    """The largest model of a scene.

    Attributes:
        images: number of photographs.
        features: mean number per photograph.
        verified_pairs: pairs of photographs that pass geometric verification.
        registered: photographs in the model.
        points: 3-D points.
        observations: keypoints that observe one of them.
        track_length: observations per point.
        reprojection_error: mean, in pixels; None without points.
        dense_points: of multi-view stereo; None without CUDA.
        auc1, auc3, auc5: areas under the curve of relative pose errors over all pairs of images, see
            :func:`samfeat.pipelines.evaluation.camera_poses.relative_pose_errors`; None without ground truth, as for
            the rest.
        centre_error: median over the registered images after alignment, in units of the truth (see
            :func:`samfeat.pipelines.evaluation.camera_poses.aligned_errors`); None where too few are registered.
        rotation_error: the same in degrees.
        errors: both by image.
    """

    images: int
    features: float
    verified_pairs: int
    registered: int
    points: int
    observations: int
    track_length: float
    reprojection_error: float | None
    dense_points: int | None = None
    auc1: float | None = None
    auc3: float | None = None
    auc5: float | None = None
    centre_error: float | None = None
    rotation_error: float | None = None
    errors: dict[str, CameraError] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReconstructResults(Results):
    """Models.

    Attributes:
        settings: what the models depend on besides method, data and ratio.
        scenes: by scene and by ratio of distances, ``none`` or a number.
    """

    settings: dict[str, Any]
    scenes: dict[str, dict[str, ReconstructedScene]]


@dataclass(frozen=True)
class Reconstruct(Evaluation[Method, ReconstructResults]):
    """Reconstruction of the scenes of a folder, see :func:`find_collections`.

    Every scene has a folder for every ratio with COLMAP's ``database.db`` and ``sparse`` model, the page ``view.html``
    and the picture ``view.png``. Descriptors are compared at unit length, since a ratio of distances makes sense only
    there.

    Attributes:
        ratios: maximum ratio of the distances to the best and the second best descriptor; None for no ratio test.
        calibrated: use the calibration of ground-truth cameras and keep it fixed (PINHOLE). Otherwise the calibration
            is COLMAP's guess (EXIF, or a focal length of 1.2 x the longer side), which mapping refines.
        threads: threads of the mapper; only 1 is reproducible.
    """

    ratios: tuple[float | None, ...] = RATIOS
    calibrated: bool = True
    threads: int = 1

    results = ReconstructResults
    title = "Reconstruction"
    meaning = (
        "Collections of photographs. All pairs of a scene are matched, verified and mapped by COLMAP; what counts is "
        "the largest model."
    )

    def __post_init__(self) -> None:
        check_ratios(self.ratios)

    def run(self, job: Job[Method]) -> ReconstructResults:
        """Map every scene with every ratio; every extracted image, matched pair and mapped image counts as one step."""
        tasks = {
            scene.name: SceneTask(
                images=scene.images,
                identity=_identity(scene),
                steps=_steps(scene),
                run=partial(_evaluate, scene, name=job.name, threads=self.threads, overwrite=job.overwrite),
            )
            for scene in find_collections(job.data)
        }
        settings = {"calibrated": self.calibrated, "seed": SEED, "colmap": pycolmap.__version__}
        shared, found = run_scenes(job, tasks, ratios=self.ratios, settings=settings)
        return ReconstructResults(**shared, settings=settings, scenes=found)

    def table(self, found: Sequence[ReconstructResults]) -> Table:
        """One row per scene, method and ratio; quantities that no method has are left out."""
        scenes = _flat(found)
        shown = _shown(scenes)
        columns = [Column("scene"), Column("method"), Column("ratio", RATIO_MEANING)]
        columns += [Column("images", "photographs in all", "d"), Column("features/image", "mean number", ".0f")]
        rows: list[list[Cell]] = [
            [scene, method, ratio, facts.images, facts.features, *(getattr(facts, key) for key in shown)]
            for scene, method, ratio, facts in scenes
        ]
        return Table([*columns, *(_COLUMNS[key] for key in shown)], rows)

    def figures(self, found: Sequence[ReconstructResults]) -> dict[str, Figure]:
        """Bars of all quantities."""
        scenes = _flat(found)
        panels: dict[str, dict[str, dict[str, float | None]]] = {}
        for key in _shown(scenes):
            groups = panels.setdefault(_COLUMNS[key].title, {})
            for scene, method, ratio, facts in scenes:
                groups.setdefault(f"{scene}\nratio {ratio}", {})[method] = getattr(facts, key)
        return {"reconstruction": bar_chart(panels)}


def _flat(found: Sequence[ReconstructResults]) -> list[tuple[str, str, str, ReconstructedScene]]:
    """(scene, method, ratio, results), scene by scene."""
    return [
        (scene, results.name, ratio, facts)
        for scene in found[0].scenes
        for results in found
        for ratio, facts in results.scenes[scene].items()
    ]


def _shown(scenes: Sequence[tuple[str, str, str, ReconstructedScene]]) -> list[str]:
    """The ``_COLUMNS`` that could be measured: errors need ground-truth cameras, dense points need CUDA."""
    truth = any(facts.auc1 is not None for *_, facts in scenes)
    dense = any(facts.dense_points is not None for *_, facts in scenes)
    needs = {
        "dense_points": dense,
        "centre_error": truth,
        "rotation_error": truth,
        **{f"auc{t}": truth for t in ANGLES},
    }
    return [key for key in _COLUMNS if needs.get(key, True)]


def _identity(scene: Collection) -> dict[str, Any]:
    truth = {image: [part.tolist() for part in (c.matrix, *c.pose)] for image, c in (scene.truth or {}).items()}
    return {"images": len(scene.images), "names_sha256": digest(list(scene.images)), "truth_sha256": digest(truth)}


def _steps(scene: Collection) -> int:
    """Number of pairs to match and images to map."""
    return len(scene.images) * (len(scene.images) + 1) // 2


def _evaluate(
    scene: Collection, folder: Path, features: Callable[[str], Features], *, name: str, **options: Any
) -> ReconstructedScene:
    """Results of a scene, whose model is drawn as well; for the options see :func:`_reconstruct`."""
    model, facts = _reconstruct(scene, folder, features, **options)
    _show(scene, model, folder, f"{scene.name}, {name}")
    return ReconstructedScene(**facts, **_quality(model, scene.truth))


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
    """The model of a scene, and counts of its features and verified pairs."""
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
    """The benchmark's statistics, and the pose errors."""
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
        return quality
    by_image = {
        image: CameraError(float(centre), float(rotation))
        for image, centre, rotation in zip(estimated, errors.centres, errors.rotations, strict=True)
    }
    medians = {"centre_error": float(np.median(errors.centres)), "rotation_error": float(np.median(errors.rotations))}
    return {**quality, **medians, "errors": dict(sorted(by_image.items()))}


def _show(scene: Collection, model: pycolmap.Reconstruction, folder: Path, title: str) -> None:
    """Write the page and the picture of a model, unless it is empty."""
    if not model.num_reg_images():
        return
    title = f"{title}: {model.num_reg_images()} of {len(scene.images)} images, {model.num_points3D():,} points"
    cameras = {"estimated": posed_cameras(model)}
    if scene.truth is not None:
        shared = [image for image in cameras["estimated"] if image in scene.truth]
        moved = align([scene.truth[i].pose for i in shared], [cameras["estimated"][i].pose for i in shared])
        if moved is not None:
            cameras["true"] = {i: scene.truth[i]._replace(pose=pose) for i, pose in zip(shared, moved, strict=True)}
    view = SceneView(title, *points_and_colors(model), cameras)
    write_view(folder / "view.html", view)
    write_preview(folder / "view.png", view)
