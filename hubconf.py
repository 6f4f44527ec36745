"""Entry points for torch.hub: ``torch.hub.load("path/to/samfeat", "samfeat", source="local")``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

dependencies = ["PIL", "cv2", "jaxtyping", "numpy", "safetensors", "torch"]


def samfeat(preset: str = "default", weights: str | None = None, **options: Any) -> Any:
    """The feature extractor ``samfeat.SAMFeat``.

    Args:
        preset: ``"default"``, ``"paper"`` or ``"released"``.
        weights: a weights file that belongs to the preset; untrained without one.
        **options: extraction options that differ from the preset's, such as ``max_keypoints=2048``.
    """
    if importlib.util.find_spec("samfeat") is None:
        _import_from_here()
    from samfeat.student.extractor import SAMFeat

    return SAMFeat(preset, weights=weights, **options)


def _import_from_here() -> None:
    """Make this folder, which is the package, importable without an installation."""
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "samfeat", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the samfeat package from {root}")
    sys.modules["samfeat"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
