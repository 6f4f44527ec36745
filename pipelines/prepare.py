"""A folder of photographs -> COLMAP's workspaces: SIFT, matching, incremental mapping, undistortion, all by pycolmap.

``<out>/database.db`` holds features and matches, ``<out>/models/<k>/`` the reconstructed models, and ``<out>/<k>/`` an
undistorted copy of each model with its images, as input for COLMAP's dense stereo. Each is made once; after an
interruption the same call resumes, even within the database. ``<out>/photos/`` only has links.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycolmap

from samfeat.files import write_json
from samfeat.images import list_images
from samfeat.pipelines.colmap_database import database_errors

_log = logging.getLogger(__name__)

MIN_IMAGES = 3  # per model; two photographs cannot confirm each other
SEED = 0
_JPEG_QUALITY = 95
NEIGHBOURS = frozenset({*range(1, 11), 16, 32, 64, 128, 256})  # of sequential matching, as COLMAP's own defaults
_BATCH = os.cpu_count() or 1  # photographs between checks for an interruption
_PAIRS = 16  # pairs between checks for an interruption

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PreparedPhotos:
    """The result of a reconstruction.

    Attributes:
        photos: number of photographs.
        models: number of models; unconnected photographs give more than one.
        registered: photographs in them.
        points: 3-D points in them.
        error: mean reprojection error in pixels of the photographs.
        left_out: names of photographs that are in no model.
    """

    photos: int
    models: int
    registered: int
    points: int
    error: float
    left_out: tuple[str, ...]


def prepare_photos(
    photos: str | Path,
    out: str | Path,
    *,
    matching: str = "exhaustive",
    max_size: int = 1600,
    progress: Progress | None = None,
) -> PreparedPhotos:
    """Reconstruct the scene in a folder of photographs.

    Args:
        photos: folder of photographs, including sub-folders.
        out: output folder, see the module docstring.
        matching: ``exhaustive``: every photograph with every other; ``sequential``: with its neighbours in the order
            of names, as for the frames of a video.
        max_size: longer side, in pixels, at which features are detected and undistorted images are written.
        progress: called with (step, done, total).

    Raises:
        ValueError: too few photographs, or too few with common content; ``out`` is something else, or was started with
            other photographs or settings.
        OSError: the disk is full or not writable.
    """
    if matching not in ("exhaustive", "sequential"):
        raise ValueError(f"unknown matching {matching!r}: choose exhaustive or sequential")
    photos, out = Path(photos), Path(out)
    names = _photographs(photos, out)
    _claim(out, {"photos": names, "matching": matching, "max_size": max_size})
    tell = progress or (lambda step, done, total: None)
    database = out / "database.db"
    with _quiet():
        pycolmap.set_random_seed(SEED)
        linked = _link(photos, names, out / "photos")
        _extract(out / "photos", database, linked, max_size=max_size, tell=tell)
        _match(database, matching, tell)
        folders = _map(out / "photos", database, out / "models", tell)
        for k, folder in enumerate(folders):
            _undistort(out / "photos", folder, out / folder.name, max_size)
            tell("undistorting", k + 1, len(folders))
        shutil.rmtree(out / "partial", ignore_errors=True)
        models = [pycolmap.Reconstruction(folder) for folder in folders]
    registered = {image.name for model in models for image in model.images.values() if image.has_pose}
    observations = [model.compute_num_observations() for model in models]
    errors = [model.compute_mean_reprojection_error() for model in models]
    return PreparedPhotos(
        photos=len(names),
        models=len(models),
        registered=len(registered),
        points=sum(model.num_points3D() for model in models),
        error=sum(n * error for n, error in zip(observations, errors)) / sum(observations),
        left_out=tuple(name for name, link in zip(names, linked) if link not in registered),
    )


def _photographs(photos: Path, out: Path) -> list[str]:
    if not photos.is_dir():
        raise ValueError(f"{photos} is not a folder; give the folder that holds the photographs")
    if out.resolve().is_relative_to(photos.resolve()):
        raise ValueError(f"{out} lies inside {photos}; write the reconstruction next to the photographs")
    names, left_out, unnamed = list_images(photos)
    for line in [*left_out, *(f"left out {each!r}: its name is not UTF-8, rename it" for each in unnamed)]:
        _log.warning("%s: %s", photos, line)
    if len(names) < MIN_IMAGES:
        raise ValueError(f"{photos} holds {len(names)} photographs; a reconstruction needs {MIN_IMAGES} or, better, 20")
    return names


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Create ``out``, or resume it if it was started with the same settings."""
    marker = out / "prepare.json"
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and holds something else; choose another folder or remove it")
        write_json(marker, settings)
        return
    there = json.loads(marker.read_text())
    different = sorted(key for key in settings if there.get(key) != settings[key])
    if different:
        raise ValueError(f"{out} was begun with other {' and '.join(different)}; repeat them or choose another folder")


def _link(photos: Path, names: Sequence[str], folder: Path) -> list[str]:
    """Link the photographs under names without spaces, which COLMAP's pair lists do not allow; return these names."""
    linked = ["_".join(name.split()) for name in names]
    if len(set(linked)) < len(linked):
        twice = next(name for name in linked if linked.count(name) > 1)
        raise ValueError(f"two photographs are called {twice} once blanks are underscores; rename one")
    for name, link in zip(names, (folder / name for name in linked)):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((photos / name).resolve())
    return linked


def _extract(photos: Path, database: Path, names: Sequence[str], *, max_size: int, tell: Progress) -> None:
    options = pycolmap.FeatureExtractionOptions(max_image_size=max_size)
    with database_errors(database), pycolmap.Database.open(database) as opened:
        there = {image.name for image in opened.read_all_images() if opened.exists_descriptors(image.image_id)}
    missing = [name for name in names if name not in there]
    for start in range(0, len(missing), _BATCH):
        tell("SIFT", len(there) + start, len(names))
        batch = missing[start : start + _BATCH]
        with database_errors(database):
            pycolmap.extract_features(database, photos, image_names=batch, extraction_options=options)
    tell("SIFT", len(names), len(names))


def _match(database: Path, matching: str, tell: Progress) -> None:
    with database_errors(database), pycolmap.Database.open(database) as opened:
        images = sorted((image.name, image.image_id) for image in opened.read_all_images())
        pairs = [
            (i, j) for j in range(len(images)) for i in range(j) if matching == "exhaustive" or j - i in NEIGHBOURS
        ]
        missing = [(i, j) for i, j in pairs if not opened.exists_two_view_geometry(images[i][1], images[j][1])]
    listed = database.with_name("pairs.txt")
    for start in range(0, len(missing), _PAIRS):
        tell("matching", len(pairs) - len(missing) + start, len(pairs))
        listed.write_text("".join(f"{images[i][0]} {images[j][0]}\n" for i, j in missing[start : start + _PAIRS]))
        with database_errors(database):
            pycolmap.match_image_pairs(
                database, pairing_options=pycolmap.ImportedPairingOptions(match_list_path=listed)
            )
    listed.unlink(missing_ok=True)
    tell("matching", len(pairs), len(pairs))


def _map(photos: Path, database: Path, folder: Path, tell: Progress) -> list[Path]:
    """The folders of the models with at least ``MIN_IMAGES`` photographs, created if missing."""
    with database_errors(database), pycolmap.Database.open(database) as opened:
        number = opened.num_images()
    if not folder.exists():
        partial = _emptied(folder.parent / "partial" / folder.name)
        done = 0

        def registered() -> None:
            nonlocal done
            done = min(done + 1, number)
            tell("mapping", done, number)

        options = pycolmap.IncrementalPipelineOptions(random_seed=SEED, min_model_size=MIN_IMAGES)
        pycolmap.incremental_mapping(database, photos, partial, options=options, next_image_callback=registered)
        partial.replace(folder)
    found = {path: len(pycolmap.Reconstruction(path).reg_image_ids()) for path in sorted(folder.iterdir())}
    kept = [path for path, images in found.items() if images >= MIN_IMAGES]
    if not kept:
        raise ValueError(
            f"{max(found.values(), default=0)} of {number} photographs could be registered, {MIN_IMAGES} are needed: "
            "take more photographs of the same things, from places a few steps apart"
        )
    tell("mapping", number, number)
    return kept


def _undistort(photos: Path, model: Path, folder: Path, max_size: int) -> None:
    if folder.exists():
        return
    partial = _emptied(folder.parent / "partial" / folder.name)
    options = pycolmap.UndistortCameraOptions(max_image_size=max_size)
    pycolmap.undistort_images(partial, model, photos, undistort_options=options, jpeg_quality=_JPEG_QUALITY)
    partial.replace(folder)


def _emptied(folder: Path) -> Path:
    """Recreate a staging ``folder``, whose contents are moved into place once complete."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence COLMAP's output, and turn its errors into those our command line expects."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"COLMAP stopped ({error}); is the disk full?") from error
    finally:
        pycolmap.logging.minloglevel = before
