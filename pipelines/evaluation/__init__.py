"""The evaluations of the paper, one file each: matching, pose, reconstruction, localisation, edges.

Evaluations outside the package are named ``module:Class``, see
:class:`samfeat.pipelines.evaluation.protocol.Evaluation`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samfeat.pipelines.evaluation.protocol import Evaluation

EVALUATIONS = {
    "hpatches": "samfeat.pipelines.evaluation.hpatches:HPatches",
    "pose": "samfeat.pipelines.evaluation.pose:RelativePose",
    "reconstruct": "samfeat.pipelines.evaluation.reconstruct:Reconstruct",
    "localize": "samfeat.pipelines.evaluation.localize:Localize",
    "edges": "samfeat.pipelines.evaluation.edges:Edges",
}


def find_evaluation(name: str, **options: Any) -> Evaluation[Any, Any]:
    """Make an evaluation, by its name in ``EVALUATIONS`` or as ``module:Class``.

    Args:
        name: which one.
        **options: fields of the evaluation to set.

    Raises:
        ValueError: unknown name or option.
    """
    path = EVALUATIONS.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ValueError(f"unknown evaluation {name!r}: choose one of {', '.join(EVALUATIONS)}, or give module:Class")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"evaluation {name!r} cannot be imported ({error}): give module:Class of an Evaluation"
        ) from None
    try:
        return kind(**options)
    except TypeError:
        raise ValueError(f"evaluation {name} has no option {', '.join(options)}: leave it out") from None
