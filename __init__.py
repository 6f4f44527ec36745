"""SAMFeat: local features taught by the Segment Anything Model, from cached teacher targets."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samfeat.images import load_image
    from samfeat.pipelines.pictures.show import show_keypoints, show_matches
    from samfeat.student.extractor import SAMFeat
    from samfeat.student.lightglue import LightGlue
    from samfeat.student.matching import match
    from samfeat.student.opencv import to_opencv, to_opencv_matches
    from samfeat.teacher_cache.store import TeacherCache

__version__ = "0.1.0"
__all__ = [
    "LightGlue",
    "SAMFeat",
    "TeacherCache",
    "__version__",
    "load_image",
    "match",
    "show_keypoints",
    "show_matches",
    "to_opencv",
    "to_opencv_matches",
]

_HOMES = {
    "LightGlue": "samfeat.student.lightglue",
    "SAMFeat": "samfeat.student.extractor",
    "load_image": "samfeat.images",
    "match": "samfeat.student.matching",
    "show_keypoints": "samfeat.pipelines.pictures.show",
    "show_matches": "samfeat.pipelines.pictures.show",
    "to_opencv": "samfeat.student.opencv",
    "to_opencv_matches": "samfeat.student.opencv",
    "TeacherCache": "samfeat.teacher_cache.store",
}


def __getattr__(name: str) -> Any:  # PEP 562: torch is imported when a public name is first used, never by --help
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
