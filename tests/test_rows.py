"""Rows of a store: eight bits are enough for what the student learns, and nothing about them is left to chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import skimage.data
import torch
from hand_written_stores import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cosine_similarity, interpolate
from toys import toy_record

from samfeat.student.relation import relation_loss
from samfeat.teacher_cache.store.rows import dequantize, digest, quantize, record_of, stored_values
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher

GRID = (32, 32)  # positions of the student in these tests


def relations(embedding: np.ndarray) -> torch.Tensor:
    features = interpolate(torch.from_numpy(embedding)[None], GRID, mode="bilinear")[0].flatten(1).T.double()
    features = features / features.norm(dim=1, keepdim=True)
    return features @ features.T


def pull(embedding: np.ndarray, student: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_()
    relation_loss(student, torch.from_numpy(embedding)[None], attention=attention).backward()
    return student.grad.flatten().double()


def fidelity(embedding: np.ndarray) -> tuple[float, float]:
    """Mean change of the relation matrix, cosine of the gradients of an untrained student, before and after."""
    stored = dequantize(*quantize(embedding))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 128, 9, 9, generator=generator)
    student = interpolate(coarse, GRID, mode="bicubic") + 0.2 * torch.randn(1, 128, *GRID, generator=generator)
    attention = 2 * torch.rand(1, 1, *GRID, generator=generator)
    gap = (relations(stored) - relations(embedding)).abs().mean().item()
    pulls = (pull(values, student, attention) for values in (embedding, stored))
    return gap, cosine_similarity(*pulls, dim=0).item()


def smooth(seed: int, channels: int = 256) -> np.ndarray:
    """Smooth fields and noise with the statistics of a layer norm, as SAM's neck ends in one."""
    generator = torch.Generator().manual_seed(seed)
    fields = interpolate(torch.randn(1, channels, 12, 12, generator=generator), (64, 64), mode="bicubic")[0]
    fields = fields + 0.3 * torch.randn(channels, 64, 64, generator=generator)
    return ((fields - fields.mean(0)) / fields.std(0)).numpy()


HEAVY = {  # and the least cosine of the gradients
    "layer norm": (lambda x, rng: x, 0.999),
    "channels of very unequal scale": (lambda x, rng: x * np.exp(rng.standard_normal((256, 1, 1))), 0.999),
    "outliers in one cell of a thousand": (lambda x, rng: x * (1 + 20 * (rng.random(x.shape) < 1e-3)), 0.999),
    "heavy tails everywhere": (lambda x, rng: x + rng.standard_t(3, x.shape), 0.998),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_relations_survive_heavy_tails(kind):
    spoil, least = HEAVY[kind]
    gap, cosine = fidelity(spoil(smooth(0), np.random.default_rng(1)).astype(np.float32))
    assert gap <= 1e-3
    assert cosine >= least


def test_relations_of_a_photograph_survive():
    gap, cosine = fidelity(ClassicalTeacher()(skimage.data.astronaut()[None, :200, 100:300])[0].embedding)
    assert gap <= 5e-4
    assert cosine >= 0.999


def test_relations_of_a_sam_encoder_survive(toy_sam):
    image = torch.from_numpy(skimage.data.astronaut()[:256, 100:356].copy()).permute(2, 0, 1)
    with torch.no_grad():
        embedding = toy_sam.image_encoder(toy_sam.preprocess(image.float())[None])[0].numpy()
    gap, cosine = fidelity(embedding)
    assert gap <= 1e-3
    assert cosine >= 0.999


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float32, (3, 2, 4), elements=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=True)),
    st.booleans(),
)
def test_any_finite_embedding_is_kept_within_half_a_scale(embedding, flush):
    torch.set_flush_denormal(flush)  # as libraries that are compiled with -ffast-math do, torch.compile's among them
    try:
        values, scale = quantize(embedding)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(quantize(embedding).values, values)
    np.testing.assert_array_equal(quantize(embedding).scale, scale)
    again = dequantize(values, scale)
    assert (values.dtype, scale.dtype, again.dtype) == (np.int8, np.float32, np.float32)
    assert values.min() >= -127
    assert np.isfinite(again).all()
    # the product is exact, so that no device rounds it differently
    np.testing.assert_array_equal(again, values.astype(np.float64) * scale)
    tiny = np.finfo(np.float32).tiny
    assert (np.abs(again.astype(np.float64) - embedding) <= np.maximum(0.5001 * scale, 255 * tiny)).all()
    peak = np.abs(embedding).max(axis=0).astype(np.float64)
    assert (scale <= np.maximum(1.0001 * peak / 127, tiny)).all()
    # what was quantized once comes back as it was
    np.testing.assert_array_equal(quantize(again).values, values)
    np.testing.assert_array_equal(quantize(again).scale, scale)


def test_positions_do_not_share_their_precision():
    embedding = smooth(0, 8)
    loud = embedding.copy()
    loud[3, 10, 20] = 1e6
    before, after = quantize(embedding), quantize(loud)
    same = np.ones((64, 64), bool)
    same[10, 20] = False
    np.testing.assert_array_equal(before.values[:, same], after.values[:, same])
    assert after.values[3, 10, 20] == 127


def test_a_position_of_zeros_stays_zero():
    embedding = smooth(0, 8)
    embedding[:, 0, 0] = 0
    values, scale = quantize(embedding)
    assert scale[0, 0] == 0
    assert not dequantize(values, scale)[:, 0, 0].any()
    assert scale[1:].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, 3e38])
def test_what_is_not_finite_in_single_precision_is_refused(bad):
    embedding = smooth(0, 8).astype(np.float64)
    embedding[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN, infinity or values beyond single precision"):
        quantize(embedding)


def test_a_record_comes_back_and_its_digest_covers_every_value():
    record = toy_record(3)
    values = stored_values(record, SPEC)
    again = stored_values(record_of(values), SPEC)
    assert digest(again) == digest(values)
    for name, array in values.items():
        changed = {key: value.copy() for key, value in values.items()}
        if array.dtype == object:
            changed[name] = np.array("another", object)
        else:
            flat = changed[name].reshape(-1)
            flat[-1] = flat[-1] + 1
        assert digest(changed) != digest(values), name
    shorter = dataclasses.replace(record, keypoints=record.keypoints[:-1])
    assert digest(stored_values(shorter, SPEC)) != digest(values)
