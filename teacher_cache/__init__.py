"""Stage one's artifacts: images -> teacher -> cache -> targets.

Re-exports the schema and the store, but no teacher: training imports this package and must not import SAM. Names are
imported lazily, so that the command line can list teachers and sources without loading zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samfeat.teacher_cache.schema import Masks, Pair, Provenance, Record, StoreSpec, Targets, TeacherOutput
    from samfeat.teacher_cache.store import TeacherCache, open_stores
    from samfeat.teacher_cache.teachers.protocol import Teacher

__all__ = [
    "Masks",
    "Pair",
    "Provenance",
    "Record",
    "StoreSpec",
    "Targets",
    "Teacher",
    "TeacherCache",
    "TeacherOutput",
    "open_stores",
]

_HOMES = {"Teacher": "teachers.protocol", "TeacherCache": "store", "open_stores": "store"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'schema')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
