"""Teachers: one file per teacher, and one line per name in ``TEACHERS``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samfeat.teacher_cache.registry import accepted, check_options, load_member

if TYPE_CHECKING:
    from samfeat.teacher_cache.schema import Provenance
    from samfeat.teacher_cache.teachers.protocol import Teacher

TEACHERS = {
    "classical": "samfeat.teacher_cache.teachers.classical:ClassicalTeacher",
    "hed": "samfeat.teacher_cache.teachers.hed:HedTeacher",
    "aliked": "samfeat.teacher_cache.teachers.aliked:AlikedTeacher",
    "dinov2": "samfeat.teacher_cache.teachers.dinov2:DinoV2Teacher",
    "mobile_sam": "samfeat.teacher_cache.teachers.mobile_sam:MobileSamTeacher",
    "sam_vit_h": "samfeat.teacher_cache.teachers.sam:SamVitH",
    "sam_vit_l": "samfeat.teacher_cache.teachers.sam:SamVitL",
    "sam_vit_b": "samfeat.teacher_cache.teachers.sam:SamVitB",
    "sam2": "samfeat.teacher_cache.teachers.sam2:Sam2Teacher",
}
"""``module:Class`` of every teacher, by name. Packages add their own in the entry-point group ``samfeat.teachers``."""


def make_teacher(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    downloads: Path | None = None,
    device: str = "auto",
    embedding_stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Teacher:
    """Make a teacher by name.

    Args:
        name: one of ``TEACHERS``, an entry point of the group ``samfeat.teachers``, or ``module:Class``. Several of
            them can be combined with ``+``: see :mod:`samfeat.teacher_cache.teachers.combined`.
        options: parameters of the teacher, by name.
        checkpoint: its weights; downloaded from their official address if None.
        downloads: folder for downloaded weights; nothing is downloaded if None.
        device: ``auto``, ``cpu`` or ``cuda``; ignored by teachers that only run on the CPU.
        embedding_stride: pixels per cell of the embedding, see
            :class:`samfeat.teacher_cache.teachers.resampled.ResampledTeacher`; None keeps the teacher's own grid.
        progress: called with (bytes done, total bytes) of a download.

    Raises:
        ValueError: unknown name or option, wrong checkpoint, no such device.
        OSError: the download failed; calling again resumes it.
    """
    if embedding_stride is not None:
        from samfeat.teacher_cache.teachers.resampled import ResampledTeacher

        made = make_teacher(
            name, options=options, checkpoint=checkpoint, downloads=downloads, device=device, progress=progress
        )
        return ResampledTeacher(made, embedding_stride)
    if "+" in name:
        from samfeat.teacher_cache.teachers.combined import CombinedTeacher, split

        if options or checkpoint:
            raise ValueError(f"teacher {name!r}: weights belong to a part, as in aliked=FILE+hed, and options to none")
        parts: dict[tuple[str, Path | None], Teacher] = {}
        for part in split(name):
            if part not in parts:
                parts[part] = make_teacher(
                    part[0], checkpoint=part[1], downloads=downloads, device=device, progress=progress
                )
        return CombinedTeacher.of([parts[part] for part in split(name)])
    member = load_member("teacher", name, TEACHERS)
    build = getattr(member, "build", member)
    given = {**(options or {}), **({} if checkpoint is None else {"checkpoint": checkpoint})}
    check_options(build, given, what=f"teacher {name!r}")
    offered = accepted(build, {"device": device, "downloads": downloads, "progress": progress})
    try:
        return build(**offered | given)
    except TypeError as error:  # an option is missing, or of another type
        raise ValueError(f"teacher {name!r} cannot be made of {given}: {error}") from error


def unfetched(name: str, *, checkpoint: Path | None, downloads: Path) -> str:
    """Description of what :func:`make_teacher` would download; empty if nothing."""
    if "+" in name:
        from samfeat.teacher_cache.teachers.combined import split

        parts = [unfetched(part, checkpoint=file, downloads=downloads) for part, file in split(name)]
        return ", ".join(dict.fromkeys(part for part in parts if part))
    build = load_member("teacher", name, TEACHERS)
    missing = getattr(build, "unfetched", None)
    return missing(downloads) if missing and checkpoint is None else ""


def teacher_of(provenance: Provenance, *, checkpoint: Path | None = None) -> Teacher | None:
    """Rebuild the teacher that made a store, with the same parameters; None if the arguments are not sufficient.

    Args:
        provenance: of the store.
        checkpoint: weights of the teacher, or of the one part of a combined teacher that needs them.

    Raises:
        ValueError: the checkpoint, or the version of the teacher, is different.
    """
    teacher = _rebuild(provenance.teacher, checkpoint)
    if teacher is not None and (differences := provenance.differences(provenance.taught_by(teacher.provenance()))):
        raise ValueError(f"the store was made by another teacher ({'; '.join(differences)})")
    return teacher


def _rebuild(described: Mapping[str, Any], checkpoint: Path | None) -> Teacher | None:
    if "embedding_stride" in described:
        from samfeat.teacher_cache.teachers.resampled import ResampledTeacher

        inner = {key: value for key, value in described.items() if key != "embedding_stride"}
        resampled = _rebuild(inner, checkpoint)
        return resampled and ResampledTeacher(resampled, described["embedding_stride"])
    if "+" in str(described.get("name")):
        from samfeat.teacher_cache.teachers.combined import OUTPUTS, CombinedTeacher

        made: list[tuple[Mapping[str, Any], Teacher]] = []  # equal parts are one teacher, which runs once
        parts: list[Teacher] = []
        for part in (described[what] for what in OUTPUTS):
            known = next((teacher for other, teacher in made if other == part), None)
            teacher = known or _rebuild(part, None) or _rebuild(part, checkpoint)
            if teacher is None:
                return None
            made.append((part, teacher))
            parts.append(teacher)
        return CombinedTeacher((parts[0], parts[1], parts[2]))
    members = (load_member("teacher", name, TEACHERS) for name in TEACHERS)
    member = next((member for member in members if member.name == described.get("name")), None)
    return member.rebuild(described, checkpoint=checkpoint) if member else None


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` words; values are JSON if possible (``0.5``, ``true``, ``[1, 2]``), else text.

    Raises:
        ValueError: a word is malformed, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--teacher-option {word!r}: give key=value, such as min_area=0.001")
        if key in options:
            raise ValueError(f"--teacher-option {key} is given twice: leave one out")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
