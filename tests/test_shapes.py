"""The shapes and dtypes that annotations name are those that the tests' calls give and get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import check_arrays
from torch import Tensor

TESTS = Path(__file__).parent
CHECKED = (
    "samfeat.student",
    "samfeat.pipelines.homography",
    "samfeat.teacher_cache.teachers.sam_encoder",
    "samfeat.teacher_cache.teachers.sam_decoder",
)
CALLERS = ("detection", "losses", "matching", "relation", "network", "homography", "sam_encoder", "sam_decoder")
REFUSALS = "refuse or reject or names or compile"  # tests that give wrong shapes on purpose; tracing has no shapes
SOME = "by_hand or nms or subpixel or brute_force or sampling or autocast or agrees_with_opencv or of_the_original"


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (2, 3, 1)])
def test_wrong_shapes_do_not_pass_the_check(shape):
    @jaxtyped(typechecker=check_arrays)
    def transposed(matrix: Float[Tensor, "2 3"], other: Float[Tensor, "a b"] | None = None) -> Float[Tensor, "3 2"]:
        return matrix if other is None else other

    with pytest.raises(TypeCheckError):
        transposed(torch.zeros(shape))
    with pytest.raises(TypeCheckError):  # a wrong result
        transposed(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError):
        transposed(torch.zeros(2, 3), torch.zeros(shape[::-1]).int())
    assert transposed(torch.zeros(2, 3), torch.zeros(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("which", [SOME, pytest.param("", marks=pytest.mark.slow)])
def test_arrays_are_what_their_annotations_say(which):
    packages = ",".join((*CHECKED, "shape_checks.check_arrays"))
    files = [str(TESTS / f"test_{name}.py") for name in CALLERS]
    chosen = f"({which or 'test'}) and not ({REFUSALS})"
    options = ["-p", "no:cacheprovider", f"--jaxtyping-packages={packages}", "-m", "", "-k", chosen]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
