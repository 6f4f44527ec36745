"""What stage one is given by name: images by their folder, teachers by their name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from upath import UPath

from samfeat.pipelines.sources.colmap import find_workspaces
from samfeat.pipelines.sources.pairs import MegaDepthSource
from samfeat.teacher_cache.images import FolderSource, ImageSource, MtldescSource
from samfeat.teacher_cache.schema import Provenance, Teacher


def open_source(
    data: str | Path | UPath, *, crop_size: int | None = None, pairs_per_scene: int | None = None, seed: int = 0
) -> ImageSource:
    """The image source that a folder holds, by its layout.

    ``scene_info/`` is raw MegaDepth, ``image/ keypoint/ despoint/`` MTLDesc's released set, ``sparse/`` or
    ``cameras.bin`` (or ``.txt``), here or in the sub-folders, COLMAP's models, anything else a folder of photographs.

    Args:
        data: the folder.
        crop_size: side of the square crops in pixels; 400 where None. MTLDesc's crops have their own size.
        pairs_per_scene: pairs drawn from each scene of MegaDepth, or model of COLMAP; 100 where None.
        seed: seed of crops and pairs.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: a layout that is recognised but damaged.
    """
    folder = UPath(data)
    if not folder.exists():
        raise FileNotFoundError(f"{data}: no such folder. `samfeat-cli sample {data}` would write the embedded sample")
    if not folder.is_dir():
        raise ValueError(f"{data} is a file: give the folder that holds the images")
    size = (crop_size or 400, crop_size or 400)
    if (folder / "scene_info").is_dir():
        return MegaDepthSource(folder, crop_size=size, pairs_per_scene=pairs_per_scene or 100, seed=seed)
    if all((folder / part).is_dir() for part in ("image", "keypoint", "despoint")):
        if crop_size is not None:
            raise ValueError("--crop-size does not apply to MTLDesc's released set: its crops are used as they are")
        source: ImageSource = MtldescSource(folder, seed=seed)
    elif find_workspaces(folder):
        from samfeat.pipelines.sources.colmap_pairs import ColmapSource

        return ColmapSource(folder, crop_size=size, pairs_per_scene=pairs_per_scene or 100, seed=seed)
    else:
        source = FolderSource(folder, crop_size=size, seed=seed)
    if pairs_per_scene is not None:
        raise ValueError(f"--pairs-per-scene is for raw MegaDepth and COLMAP's models: {data} has no scenes")
    return source


def make_teacher(
    name: str,
    *,
    checkpoint: Path | None = None,
    downloads: Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Teacher:
    """A teacher by its name: ``classical``, or ``sam_vit_h``, ``sam_vit_l``, ``sam_vit_b``.

    Args:
        name: the teacher.
        checkpoint: SAM's weights; fetched from the official address where None.
        downloads: folder for fetched weights.
        device: for SAM, ``auto``, ``cpu`` or ``cuda``.
        progress: called with (bytes done, bytes in all) of a download.

    Raises:
        ValueError: unknown name, wrong checkpoint, no such device.
        OSError: the download failed; calling again goes on.
    """
    if name == "classical":
        from samfeat.teacher_cache.classical import ClassicalTeacher

        if checkpoint is not None:
            raise ValueError("--checkpoint belongs to a SAM teacher: the classical one has no weights")
        return ClassicalTeacher()
    if not name.startswith("sam_"):
        raise ValueError(f"unknown teacher {name!r}: choose classical, sam_vit_h, sam_vit_l or sam_vit_b")
    from samfeat.teacher_cache.checkpoints import fetch_checkpoint
    from samfeat.teacher_cache.teacher import SamTeacher

    model = name.removeprefix("sam_")
    if checkpoint is None:
        checkpoint = fetch_checkpoint(model, downloads or Path("checkpoints"), progress=progress)
    return SamTeacher(model, checkpoint=checkpoint, device=device)


def teacher_of(provenance: Provenance, *, checkpoint: Path | None = None) -> Teacher | None:
    """The teacher that made a store, with the same parameters; None for SAM without a checkpoint.

    Raises:
        ValueError: the checkpoint, or this version of the teacher, is another one.
    """
    described = dict(provenance.teacher)
    if described["name"] == "classical":
        teacher = make_teacher("classical")
    elif checkpoint is None:
        return None
    else:
        from samfeat.teacher_cache.teacher import SamParameters, SamTeacher

        parameters = {entry.name: described[entry.name] for entry in fields(SamParameters)}
        precision = described["precision"]
        teacher = SamTeacher(described["model"], checkpoint=checkpoint, precision=precision, **parameters)
    given = Provenance(teacher.provenance(), provenance.source, provenance.labels, provenance.seed)
    differences = provenance.differences(given)
    if differences:
        raise ValueError(f"the store was made by another teacher ({'; '.join(differences)})")
    return teacher
