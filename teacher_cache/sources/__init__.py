"""Image sources: one file per kind of source, and one line for each in ``SOURCES``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from samfeat.teacher_cache.registry import accepted, check_options, load_member

if TYPE_CHECKING:
    from upath import UPath

    from samfeat.teacher_cache.sources.protocol import ImageSource

SOURCES = {
    "megadepth": "samfeat.teacher_cache.sources.megadepth:MegaDepthSource",
    "mtldesc": "samfeat.teacher_cache.sources.mtldesc:MtldescSource",
    "colmap": "samfeat.teacher_cache.sources.colmap:ColmapSource",
    "aligned": "samfeat.teacher_cache.sources.aligned:AlignedSource",
    "folder": "samfeat.teacher_cache.sources.folder:FolderSource",
}
"""``module:Class`` of every source, by name. ``auto`` takes the first one whose layout a folder has."""


def open_source(
    data: str | Path | UPath,
    *,
    kind: str = "auto",
    crop_size: int | None = None,
    pairs_per_scene: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Open the image source in a folder.

    Args:
        data: the folder.
        kind: one of ``SOURCES``, an entry point of the group ``samfeat.sources``, ``module:Class``, or ``auto``, which
            goes by the layout of the folder.
        crop_size: side of the square crops in pixels; 400 if None. MTLDesc's crops have their own size.
        pairs_per_scene: pairs per MegaDepth scene, COLMAP model or fixed camera; 100 if None.
        seed: seed of crops and pairs.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: an unknown kind, an option that does not apply to it, or a layout that is recognised but damaged.
    """
    from upath import UPath

    folder = UPath(data)
    if not folder.exists():
        raise FileNotFoundError(f"{data}: no such folder. `samfeat-cli sample {data}` would write the embedded sample")
    if not folder.is_dir():
        raise ValueError(f"{data} is a file: give the folder that holds the images")
    if kind == "auto":
        kind = next(name for name in SOURCES if load_member("source", name, SOURCES).recognises(folder))
    member = load_member("source", kind, SOURCES)
    given = {"pairs_per_scene": pairs_per_scene, "crop_size": crop_size and (crop_size, crop_size)}
    given = {name: value for name, value in given.items() if value is not None}
    check_options(member, given, what=f"{data} is read as {kind!r}, which")
    return member(folder, **accepted(member, {"crop_size": (400, 400), "seed": seed}) | given)
