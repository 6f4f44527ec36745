"""The kernels against autograd of equation 8 in float64, and against what compilers say of them.

They run where there is a CUDA device, and everywhere in Triton's interpreter, which is chosen before Triton is imported
and thus in a process of its own: ``test_the_kernels_interpreted`` runs this very file. It knows no bfloat16 products.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_relation import LargestTensor, attention_map, features, naive
from torch import Tensor

from samfeat.student import relation
from samfeat.student.relation import relation_loss
from samfeat.teacher_cache.store.rows import dequantize, quantize

pytest.importorskip("triton", reason="Triton is not made for this platform")

from samfeat.student import relation_triton as fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="no CUDA device; the interpreter runs it"
)
compiles_kernels = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
half_precision = [
    pytest.param(torch.float16, id="float16"),
    pytest.param(
        torch.bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter takes bfloat16 for integers"),
    ),
]


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation, "_fused_gap", lambda *_: fused.gap_of_images)


def random(seed: int, *shape: int, smooth: int = 1) -> Tensor:
    return features(seed, *shape, smooth=smooth).float().to(DEVICE)


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0].double().cpu()


SOME = "(equals_autograd and True-True-True) or the_same_bits"


@pytest.mark.parametrize("which", [SOME, pytest.param("", marks=pytest.mark.slow)])
def test_the_kernels_interpreted(which: str) -> None:
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "", "-k", which, __file__],
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@runs_kernels
@pytest.mark.parametrize(
    ("weighted", "masked", "stored"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
)
def test_fused_pass_equals_autograd_of_the_whole(weighted: bool, masked: bool, stored: bool) -> None:
    """143 positions, no multiple of any tile; 20 and 35 channels; a teacher as stored is larger than the student."""
    student, seeds = random(50, 3, 20, 11, 13).requires_grad_(), torch.Generator().manual_seed(51)
    if stored:
        images = [quantize(maps) for maps in features(52, 3, 35, 14, 15).numpy()]
        teacher = torch.from_numpy(np.stack([image.values for image in images])).to(DEVICE)
        scale = torch.from_numpy(np.stack([image.scale for image in images])).to(DEVICE)
        target = torch.from_numpy(np.stack([dequantize(*image) for image in images]))
        target = F.interpolate(target.double(), (11, 13), mode="bilinear")
    else:
        teacher, scale = random(52, 3, 35, 11, 13), None
        target = teacher.double().cpu()
    attention = attention_map(53, 3, 1, 11, 13) if weighted else None
    valid = None
    if masked:
        valid = torch.rand(3, 11, 13, generator=seeds) < 0.6
        valid[1] = False
    exact = student.detach().double().cpu().requires_grad_()
    expected = naive(exact, target, attention, valid)
    loss = relation_loss(
        student,
        teacher,
        scale=scale,
        attention=None if attention is None else attention.float().to(DEVICE),
        valid=None if valid is None else valid.to(DEVICE),
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = gradient_of(expected, exact)
    assert (gradient_of(loss, student) - reference).norm() <= 1e-5 * reference.norm()


@runs_kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", half_precision)
def test_half_precision_products_keep_the_gradient(weighted: bool, dtype: torch.dtype) -> None:
    student = random(54, 2, 64, 12, 12, smooth=4).to(dtype).requires_grad_()
    teacher = random(55, 2, 64, 12, 12, smooth=6)
    attention = attention_map(56, 2, 1, 12, 12).float().to(DEVICE) if weighted else None
    exact = student.detach().double().cpu().requires_grad_()
    expected = naive(exact, teacher.double().cpu(), None if attention is None else attention.double().cpu())
    with torch.autocast(DEVICE.type, dtype):
        loss = relation_loss(student, teacher, attention=attention)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    gradients = gradient_of(loss, student), gradient_of(expected, exact)
    assert F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) >= 0.999


@runs_kernels
def test_the_same_bits_every_time() -> None:
    student, teacher = random(57, 2, 40, 12, 13).requires_grad_(), random(58, 2, 40, 9, 9)
    attention = attention_map(59, 2, 1, 12, 13).float().to(DEVICE)
    first, second = (gradient_of(relation_loss(student, teacher, attention=attention), student) for _ in range(2))
    assert torch.equal(first, second)


@runs_kernels
@pytest.mark.parametrize("size", [(10, 12), (7, 12), (17, 30)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unit_rows_equal_interpolation(size: tuple[int, int], layout: torch.memory_format) -> None:
    maps = random(60, 2, 19, *size).contiguous(memory_format=layout)
    mask = (torch.rand(2, 10, 12, generator=torch.Generator().manual_seed(61)) < 0.7).to(DEVICE)
    unit, length = fused.unit_rows(maps, None, mask, torch.float32)
    resized = F.interpolate(maps, (10, 12), mode="bilinear")
    expected = (F.normalize(resized, dim=1) * mask[:, None]).flatten(2).mT
    assert unit.shape == (2, 128, 32)
    torch.testing.assert_close(unit[:, :120, :19], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(length[:, :120], resized.flatten(2).norm(dim=1), rtol=1e-5, atol=1e-6)
    assert not unit[:, 120:].any()
    assert not unit[:, :, 19:].any()


@runs_kernels
@pytest.mark.parametrize("case", ["nothing valid", "one position", "zero features", "large attention"])
def test_degenerate_cases_are_finite(case: str) -> None:
    size = (1, 1) if case == "one position" else (4, 4)
    student = random(62, 2, 6, *size) * (case != "zero features")
    attention = attention_map(63, 2, 1, *size).float().to(DEVICE) + 20 * (case == "large attention")
    student.requires_grad_()
    teacher, used = random(64, 2, 6, *size), case != "nothing valid"
    loss = relation_loss(student, teacher, attention=attention, valid=torch.full((2, 4, 4), used, device=DEVICE))
    gradient = gradient_of(loss, student)
    expected = naive(student.detach().double().cpu(), teacher.double().cpu(), attention.double().cpu()).item()
    assert loss.item() == pytest.approx(expected if used else 0, rel=1e-3, abs=1e-6)
    assert torch.isfinite(gradient).all()
    assert used or not gradient.any()


@runs_kernels
def test_no_relation_matrix_is_ever_whole() -> None:
    student, teacher = random(65, 1, 16, 24, 26).requires_grad_(), random(66, 1, 16, 30, 30)
    attention = attention_map(67, 1, 1, 24, 26).float().to(DEVICE)
    with LargestTensor() as largest:
        relation_loss(student, teacher, attention=attention).backward()
    assert 624 < largest.elements <= 624**2 / 4


DEVICES = {
    "8.6": fused.Limits(8, 99 * 1024),
    "9.0": fused.Limits(9, 227 * 1024),
    "10.0": fused.Limits(10, 227 * 1024),
}


@pytest.mark.slow
@compiles_kernels
@pytest.mark.parametrize("capability", DEVICES)
def test_the_tile_of_every_device_fits_into_it(capability: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's assembler needs no device: shared memory within its limit."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    limits = DEVICES[capability]
    tile = fused.fused_tile(256, 256, torch.bfloat16, limits)
    assert tile is not None
    kernel = fused._gap_kernel
    types = dict.fromkeys(("unit", "target", "gradient"), "*bf16") | dict.fromkeys(("channels", "padded"), "i32")
    types |= dict.fromkeys(("length", "attention", "peak", "gaps", "weights"), "*fp32") | {"mask": "*i1"}
    constants = {"positions": 2500, "BLOCK": 256, "TARGET_BLOCK": 256, "WEIGHTED": True, "PRECISION": "ieee"}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "peak"}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})
    assert compiled.metadata.shared <= limits.shared_memory
    assert compiled.asm["cubin"]


def test_what_no_tile_takes() -> None:
    hopper = DEVICES["9.0"]
    assert fused.fused_tile(256, 256, torch.float32, hopper) is not None
    assert fused.fused_tile(256, 256, torch.float64, hopper) is None
    assert fused.fused_tile(256, 8192, torch.bfloat16, hopper) is None
