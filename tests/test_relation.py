"""Relation distillation against literal numpy, autograd through the whole matrices, and hand-computed numbers."""

from __future__ import annotations

import math
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_relation import LargestTensor, attention_map, features, naive
from scipy.special import softmax
from torch import Tensor

from samfeat.student import relation
from samfeat.student.relation import feature_distillation_loss, relation_loss
from samfeat.teacher_cache.store.rows import dequantize, quantize


def gradient_of(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student)[0]


def test_the_memory_format_does_not_show_and_nothing_is_written_to() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 16, 6, 5, generator=generator) for _ in range(2))
    attention = torch.rand(2, 1, 6, 5, generator=generator)
    plain = student.clone().requires_grad_()
    last = student.clone(memory_format=torch.channels_last).requires_grad_()
    targets = teacher.clone(memory_format=torch.channels_last)
    losses = relation_loss(plain, teacher, attention=attention), relation_loss(last, targets, attention=attention)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradient_of(losses[0], plain), gradient_of(losses[1], last))
    assert torch.equal(last, student)
    assert torch.equal(targets, teacher)


def test_relation_loss_by_hand() -> None:
    # Two positions. Student (1, 0) and (1, 1): cosine 1 / sqrt 2. Teacher (2, 0) and (0, 5): cosine 0. The diagonal is
    # exact, so two of four entries err by 0.70711: mean 0.35355.
    student = torch.tensor([[[[1.0, 1.0]], [[0.0, 1.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[2.0, 0.0]], [[0.0, 5.0]]]], dtype=torch.float64)
    assert relation_loss(student, teacher).item() == pytest.approx(1 / math.sqrt(8), rel=1e-6)
    # Attention (1, 2): W = [[1, 2], [2, 4]], so the two entries have the weight 2 e^2 / (e + 2 e^2 + e^4).
    attention = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)
    weight = 2 * math.e**2 / (math.e + 2 * math.e**2 + math.e**4)
    loss = relation_loss(student, teacher, attention=attention)
    assert loss.item() == pytest.approx(weight / math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_relation_loss_equals_equation_8(weighted: bool) -> None:
    """With the sizes of the method: teacher a little larger, attention twice as large, both resized by OpenCV."""
    student, teacher = features(0, 2, 6, 10, 12), features(1, 2, 7, 13, 15)
    attention = attention_map(2, 2, 1, 20, 24)
    losses = []
    for own, other, weight in zip(student.numpy(), teacher.numpy(), attention.numpy()):
        other = np.stack([cv2.resize(channel, (12, 10), interpolation=cv2.INTER_LINEAR) for channel in other])
        own, other = (maps.reshape(len(maps), -1) / np.linalg.norm(maps.reshape(len(maps), -1), axis=0)
                      for maps in (own, other))  # fmt: skip
        a = cv2.resize(weight[0], (12, 10), interpolation=cv2.INTER_LINEAR).ravel() if weighted else np.zeros(120)
        losses.append((softmax(np.outer(a, a)) * np.abs(other.T @ other - own.T @ own)).sum())
    got = relation_loss(student, teacher, attention=attention if weighted else None)
    assert got.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_attention_before_the_cosine_cancels() -> None:
    """The released code multiplies both features by the attention first: the same loss as without attention."""
    student, teacher = features(3, 2, 8, 9, 9), features(4, 2, 8, 9, 9)
    attention = attention_map(5, 2, 1, 9, 9) + 0.1
    plain = relation_loss(student, teacher).item()
    assert relation_loss(student * attention, teacher * attention).item() == pytest.approx(plain, rel=1e-6)
    assert relation_loss(student, teacher, attention=attention).item() != pytest.approx(plain, rel=1e-3)


def test_equal_relations_cost_nothing() -> None:
    student = features(6, 1, 8, 6, 7)
    rotation = torch.linalg.qr(features(7, 1, 8, 8, 1)[0, :, :, 0])[0]
    teacher = 3 * torch.einsum("dc,bchw->bdhw", rotation, student)  # cosines know neither rotation nor scale
    assert relation_loss(student, teacher).item() == pytest.approx(0, abs=1e-6)
    constant = torch.full((1, 1, 6, 7), 2.0)
    other = features(8, 1, 5, 6, 7)
    weighted = relation_loss(student, other, attention=constant).item()
    assert weighted == pytest.approx(relation_loss(student, other).item(), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_tiles_equal_autograd_of_the_whole(weighted: bool, masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    student = features(9, 3, 16, 24, 26).to(dtype).requires_grad_()
    teacher = features(10, 3, 12, 24, 26).to(dtype)
    assert relation._TILE < 24 * 26 / 2
    attention = attention_map(11, 3, 1, 24, 26).to(dtype) if weighted else None
    valid = None
    if masked:
        valid = torch.rand(3, 24, 26, generator=torch.Generator().manual_seed(12)) < 0.6
        valid[1] = False
    exact = student.detach().double().requires_grad_()
    expected = naive(exact, teacher.double(), attention.double() if weighted else None, valid)
    loss = relation_loss(student, teacher, attention=attention, valid=valid)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    reference = gradient_of(expected, exact)
    error = gradient_of(loss, student).double() - reference
    assert error.norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_relation_gradient(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    monkeypatch.setattr(relation, "_TILE", 5)
    student, teacher = features(13, 2, 4, 3, 4).requires_grad_(), features(14, 2, 6, 5, 5)
    attention = attention_map(15, 2, 1, 6, 8) if weighted else None
    valid = torch.ones(2, 12, 16, dtype=torch.bool)
    valid[0, 5, 9] = False
    torch.autograd.gradcheck(lambda s: relation_loss(s, teacher, attention=attention, valid=valid), student)


@pytest.mark.parametrize("weighted", [False, True])
def test_bfloat16_products_keep_the_gradient(weighted: bool) -> None:
    student = features(16, 1, 64, 24, 24, smooth=4).float().requires_grad_()
    teacher = features(17, 1, 64, 30, 30, smooth=6).float()
    attention = attention_map(18, 1, 1, 48, 48).float() if weighted else None
    exact = relation_loss(student, teacher, attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        rough = relation_loss(student, teacher, attention=attention)
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()  # the products did run in bfloat16
    assert rough.item() == pytest.approx(exact.item(), rel=2e-4)
    gradients = [gradient_of(loss, student).flatten() for loss in (exact, rough)]
    assert F.cosine_similarity(*gradients, dim=0) >= 0.999


def test_stored_targets_and_half_features_are_widened() -> None:
    student, teacher = features(19, 1, 8, 5, 5), features(20, 1, 8, 6, 6)
    attention = attention_map(21, 1, 1, 10, 10)
    loss = relation_loss(student.bfloat16(), teacher.half(), attention=attention.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(relation_loss(student, teacher, attention=attention).item(), rel=0.02)
    assert feature_distillation_loss(student.bfloat16(), teacher.half()).dtype == torch.float32


def test_attention_is_not_trained_and_may_be_large() -> None:
    student, teacher = features(22, 1, 8, 6, 6).float().requires_grad_(), features(23, 1, 8, 6, 6).float()
    attention = (20 + 4 * attention_map(24, 1, 1, 6, 6)).float().requires_grad_()  # e^(a a) overflows beyond 9.4
    loss = relation_loss(student, teacher, attention=attention)
    expected = naive(student.double(), teacher.double(), attention.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    by_student, by_attention = torch.autograd.grad(loss, (student, attention), allow_unused=True)
    assert torch.isfinite(by_student).all()
    assert by_student.abs().max() > 0
    assert by_attention is None


def test_attention_where_nothing_is_valid_has_no_say() -> None:
    student, teacher = features(37, 1, 6, 4, 4), features(38, 1, 6, 4, 4)
    attention, valid = attention_map(39, 1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 2, 1] = False
    reference = relation_loss(student, teacher, attention=attention, valid=valid).item()
    attention[0, 0, 2, 1] = 1e3
    loss = relation_loss(student, teacher, attention=attention, valid=valid)
    assert loss.item() == pytest.approx(reference, rel=1e-9)
    assert reference > 0.1


@pytest.mark.parametrize("loss", [relation_loss, feature_distillation_loss])
def test_invalid_images_and_positions_drop_out(loss) -> None:
    student, teacher = features(25, 3, 6, 4, 5), features(26, 3, 6, 4, 5)
    valid = torch.ones(3, 32, 40, dtype=torch.bool)
    valid[1] = False
    valid[2, 9, 31] = False  # one pixel of the position (1, 3)
    valid[2, 24:] = False  # the last row of positions
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[1, 3] = kept[3] = False
    alone = loss(student[:1], teacher[:1])
    partial = loss(student[2:, :, kept][..., None], teacher[2:, :, kept][..., None])
    assert loss(student, teacher, valid=valid).item() == pytest.approx((alone + partial).item() / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [relation_loss, feature_distillation_loss])
@pytest.mark.parametrize("case", ["nothing valid", "one position", "zero features", "equal features"])
def test_degenerate_cases_are_finite(loss, case: str) -> None:
    size = (1, 1) if case == "one position" else (4, 4)
    student = features(27, 2, 6, *size)
    teacher = student.clone() if case == "equal features" else features(28, 2, 6, 4, 4)
    if case == "zero features":
        student = torch.zeros_like(student)
    student.requires_grad_()
    result = loss(student, teacher, valid=torch.full((2, 4, 4), case != "nothing valid"))
    gradient = gradient_of(result, student)
    assert torch.isfinite(result)
    assert torch.isfinite(gradient).all()
    if case == "nothing valid":
        assert result.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_no_relation_matrix_is_ever_whole(weighted: bool, stored: bool) -> None:
    student, teacher = features(29, 2, 8, 50, 50).float().requires_grad_(), features(30, 2, 8, 64, 64).half()
    scale = teacher.float().abs().amax(1) / 127 if stored else None
    if stored:
        teacher = (teacher / scale[:, None]).round().to(torch.int8)
    attention = attention_map(31, 2, 1, 100, 100).float() if weighted else None
    with LargestTensor() as largest:
        relation_loss(student, teacher, scale=scale, attention=attention).backward()
    assert 2500 < largest.elements <= 2500**2 / 4


@pytest.mark.parametrize("size", [(9, 8), (13, 15), (6, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_embedding_as_stored_is_the_one_that_was_quantised(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    """The oracle dequantises first, whole, with the code that reads caches."""
    stored = [quantize(maps) for maps in features(40, 2, 12, *size).numpy()]
    values = torch.from_numpy(np.stack([s.values for s in stored])).contiguous(memory_format=layout)
    scale = torch.from_numpy(np.stack([s.scale for s in stored]))
    teacher = torch.from_numpy(np.stack([dequantize(*s) for s in stored]))
    student, attention = features(41, 2, 6, 9, 8).float().requires_grad_(), attention_map(42, 2, 1, 9, 8).float()
    given = values.clone()
    losses = (
        relation_loss(student, values, scale=scale, attention=attention),
        relation_loss(student, teacher, attention=attention),
    )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(losses[0], student), gradient_of(losses[1], student), rtol=1e-4, atol=1e-7)
    assert torch.equal(values, given)


def test_a_stored_embedding_needs_its_scale_and_no_other_has_one() -> None:
    student, teacher, scale = features(43, 1, 4, 3, 3), features(44, 1, 4, 3, 3), torch.ones(1, 3, 3)
    with pytest.raises(ValueError, match="teacher is int8 without a scale: give int8 with"):
        relation_loss(student, teacher.to(torch.int8))
    with pytest.raises(ValueError, match="teacher is float64 with a scale"):
        relation_loss(student, teacher, scale=scale)


def test_cuda_is_asked_for_triton_and_the_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "samfeat.student.relation_triton"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises
    maps = torch.rand(1, 4, 3, 3, requires_grad=True)
    relation_loss(maps, torch.rand(1, 4, 3, 3)).backward()
    assert maps.grad is not None


def test_relation_losses_compile_to_one_graph() -> None:
    teacher, attention = features(33, 2, 6, 6, 6), attention_map(34, 2, 1, 8, 8)
    valid = torch.ones(2, 32, 40, dtype=torch.bool)

    @torch.compile(backend="eager", fullgraph=True)
    def total(student: Tensor) -> Tensor:
        weighted = relation_loss(student, teacher, attention=attention, valid=valid)
        return weighted + relation_loss(student, teacher) + feature_distillation_loss(student, teacher, valid=valid)

    student = features(32, 2, 6, 4, 5).requires_grad_()
    assert torch.isfinite(gradient_of(total(student), student)).all()


def test_feature_distillation_by_hand() -> None:
    # Student 0; teacher 1 and 3 in two channels of a 2 x 2 map, resized to one cell: |0 - 1| and |0 - 3|, mean 2.
    teacher = torch.tensor([1.0, 3.0])[None, :, None, None].expand(1, 2, 2, 2)
    assert feature_distillation_loss(torch.zeros(1, 2, 1, 1), teacher).item() == 2
    student = features(35, 2, 3, 4, 4).requires_grad_()
    torch.autograd.gradcheck(lambda s: feature_distillation_loss(s, features(36, 2, 3, 5, 5)), student)


def test_feature_distillation_refuses_different_channels() -> None:
    with pytest.raises(ValueError, match="128 channels and the teacher's 256"):
        feature_distillation_loss(torch.zeros(1, 128, 2, 2), torch.zeros(1, 256, 2, 2))
