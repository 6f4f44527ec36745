"""Entry points for torch.hub: ``torch.hub.load("path/to/samfeat", "samfeat", source="local")``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

dependencies = ["PIL", "cv2", "jaxtyping", "numpy", "safetensors", "torch"]


def samfeat(preset: str | None = None, weights: str | None = None, **options: Any) -> Any:
    """The feature extractor ``samfeat.SAMFeat``; its ``extract`` documents the keys of features.

    Args:
        preset: ``"default"``, ``"slim"``, ``"paper"`` or ``"released"``. Without one, the network and the options are
            those of the weights file, or ``"default"``.
        weights: a weights file (of the preset, where one is given); untrained without one.
        **options: extraction options that differ, such as ``max_keypoints=2048``.

    Raises:
        ValueError: an unknown preset or option, or a file that does not hold weights of the network.
        FileNotFoundError: there is no such file.
    """
    if importlib.util.find_spec("samfeat") is None:
        _import_from_here()
    from samfeat.student.extractor import SAMFeat

    if preset is None and weights is not None:
        return SAMFeat.from_pretrained(weights, **options)
    return SAMFeat(preset or "default", weights=weights, **options)


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
