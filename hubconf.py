"""Entry points for torch.hub: ``torch.hub.load("path/to/samfeat", "samfeat", source="local")``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

dependencies = ["PIL", "cv2", "jaxtyping", "numpy", "safetensors", "torch"]


def samfeat(weights: str = "samfeat", **options: Any) -> Any:
    """The feature extractor ``samfeat.SAMFeat``; its ``extract`` documents the keys of features.

    Args:
        weights: the name of a student shipped with the package, or a weights file.
        **options: extraction options to override, such as ``max_keypoints=2048``.

    Raises:
        ValueError: an unknown option, or a file that does not hold weights.
        FileNotFoundError: there is no such file.
    """
    if importlib.util.find_spec("samfeat") is None:
        _import_from_here()
    from samfeat.student.extractor import SAMFeat

    return SAMFeat.from_pretrained(weights, **options)


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
