"""The losses against hand-computed numbers, literal loops, OpenCV, finite differences and known constants."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_relation import LargestTensor
from scipy.spatial.distance import cosine
from skimage.measure import block_reduce
from torch import Tensor

from samfeat.student.losses import (
    LossConfig,
    descriptor_loss,
    detection_loss,
    distillation_loss,
    edge_loss,
    excluded_negatives,
    peak_detection_loss,
    wsc_loss,
)

WSC_FORMS = ("released", "masked_infonce", "mean_softplus")


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def points_on_circle(*degrees: float) -> Tensor:
    """Unit descriptors of two channels, [1, n, 2]."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], -1)[None]


def assert_zero_with_gradient(loss: Tensor, *inputs: Tensor) -> None:
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def assert_finite_gradients(loss: Tensor, *inputs: Tensor) -> None:
    assert torch.isfinite(loss)
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------------- detection


def grid_labels() -> Tensor:
    labels = torch.zeros(1, 400, 400)
    labels[:, 10::20, 10::20] = 1
    return labels


@pytest.mark.parametrize(("logit", "expected"), [(-5, 2.50), (0, 1.04), (5, 4.98), (20, 9.19)])
def test_released_detection_loss_of_constant_maps(logit: float, expected: float) -> None:
    labels = grid_labels()
    loss = detection_loss(torch.full((1, 1, 400, 400), float(logit)), labels, torch.ones_like(labels), form="released")
    assert loss.item() == pytest.approx(expected, abs=0.005)


def test_released_detection_loss_by_hand() -> None:
    # Image 0: two pixels, logit 0, so s = 1/2; one keypoint. l = -200 ln(0.5001) and -ln(0.5001); sum / (2 + 1).
    # Image 1: the mask leaves half of the keypoint pixel: 0.5 * 200 * -ln(0.5001) / (0.5 + 1). Mean of both.
    labels = torch.tensor([[[1, 0]], [[1, 0]]], dtype=torch.uint8)
    mask = torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]]])
    bit = -math.log(0.5001)
    loss = detection_loss(torch.zeros(2, 1, 1, 2), labels, mask, form="released")
    assert loss.item() == pytest.approx((201 * bit / 3 + 100 * bit / 1.5) / 2, rel=1e-6)


def test_paper_detection_loss_is_weighted_cross_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 100 * torch.randn(3, 1, 8, 9, generator=rng)  # far beyond where sigmoid rounds to 0 or 1
    labels = (torch.rand(3, 8, 9, generator=rng) < 0.2).float()
    mask = torch.rand(3, 8, 9, generator=rng) < 0.7
    mask[1] = False
    loss = detection_loss(logits, labels, mask, positive_weight=50, form="paper")
    expected = [
        F.binary_cross_entropy_with_logits(logits[b, 0][mask[b]], labels[b][mask[b]], pos_weight=torch.tensor(50.0))
        for b in (0, 2)
    ]
    assert loss.item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_detection_loss_without_pixels_is_zero(form: str) -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert_zero_with_gradient(detection_loss(logits, torch.ones(1, 4, 4), torch.zeros(1, 4, 4), form=form), logits)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_detection_loss_survives_saturation(form: str, logit: float) -> None:
    logits = torch.full((1, 1, 4, 4), logit, requires_grad=True)
    labels = torch.eye(4)[None]
    assert_finite_gradients(detection_loss(logits, labels, torch.ones(1, 4, 4), form=form), logits)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_detection_loss_gradient(form: str) -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=rng, requires_grad=True)
    labels, mask = torch.rand(2, 3, 4, generator=rng) < 0.3, torch.rand(2, 3, 4, generator=rng)
    torch.autograd.gradcheck(lambda z: detection_loss(z, labels, mask, form=form), logits)


def literal_peaks(logits, keypoints, mask, positive_weight, radius) -> tuple[float, float]:
    """Both parts of the peak loss with loops over images, labels and pixels."""
    certainties, positions = [], []
    for z, points, seen in zip(logits, keypoints, mask):
        height, width = z.shape
        labels, weights = np.zeros_like(z), np.zeros_like(z)
        surprise = amount = 0.0
        for x, y, score in points:
            left, top = math.floor(x), math.floor(y)
            if score <= 0 or not (0 <= left < width - 1 and 0 <= top < height - 1):
                continue
            for row in (top, top + 1):
                for column in (left, left + 1):
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    labels[row, column] += share
                    weights[row, column] += share * score
            middle_x, middle_y = round(x), round(y)
            rows = range(middle_y - radius, middle_y + radius + 1)
            columns = range(middle_x - radius, middle_x + radius + 1)
            if rows[0] < 0 or columns[0] < 0 or rows[-1] >= height or columns[-1] >= width:
                continue
            normaliser = math.log(sum(math.exp(z[r, c]) for r in rows for c in columns))
            known = score * min(seen[r, c] for r in rows for c in columns)
            for r in rows:
                for c in columns:
                    surprise += known * max(0, 1 - abs(x - c)) * max(0, 1 - abs(y - r)) * (normaliser - z[r, c])
            amount += known
        weights *= seen
        positive = (weights * np.log1p(np.exp(-z))).sum()
        negative = ((1 - np.minimum(labels, 1)) * seen * np.log1p(np.exp(z))).sum() / positive_weight
        certainties.append((positive + negative) / max(weights.sum(), seen.sum() / 1000, 1))
        if amount > 0:
            positions.append(surprise / max(amount, 1))
    return float(np.mean(certainties)), float(np.mean(positions))


def peak_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three maps of 13 x 17 pixels with nine labels each, some of them outside or without a score."""
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate([rng.uniform(-1, (17, 13), (3, 9, 2)), rng.uniform(0.1, 1, (3, 9, 1))], axis=2)
    keypoints[:, 0, :2] = np.round(keypoints[:, 0, :2].clip(3, 9))  # one on a pixel
    keypoints[:, 1, 2] = 0
    mask = np.ones((3, 13, 17))
    mask[1, :, 8:], mask[2, 4] = 0, 0.5
    return rng.normal(0, 2, (3, 13, 17)), keypoints.astype(np.float32), mask


@pytest.mark.parametrize("radius", [1, 2])
def test_peak_loss_equals_a_loop_over_labels_and_pixels(radius: int) -> None:
    logits, keypoints, mask = peak_case()
    expected = literal_peaks(logits, keypoints.astype(float), mask, 7.0, radius)
    got = peak_detection_loss(
        torch.from_numpy(logits)[:, None],
        torch.from_numpy(keypoints),
        torch.from_numpy(mask),
        positive_weight=7.0,
        radius=radius,
    )
    assert [part.item() for part in got] == pytest.approx(expected, rel=1e-5)


def test_peak_loss_of_a_flat_map_in_closed_form() -> None:
    # One label on a pixel of a 10 x 20 map of logit 0: ln 2 for it and for 199 pixels at a tenth; ln 25 in the window.
    label = torch.tensor([[[9.0, 5.0, 1.0]]])
    certainty, position = peak_detection_loss(
        torch.zeros(1, 1, 10, 20), label, torch.ones(1, 10, 20), positive_weight=10
    )
    assert certainty.item() == pytest.approx(math.log(2) * (1 + 199 / 10), rel=1e-6)
    assert position.item() == pytest.approx(math.log(25), rel=1e-6)
    # A label between four pixels: the position is least where these four share the peak, at ln 4.
    label = torch.tensor([[[8.5, 4.5, 1.0]]])
    peak = torch.full((1, 1, 10, 20), -40.0)
    peak[0, 0, 4:6, 8:10] = 40.0
    _, position = peak_detection_loss(peak, label, torch.ones(1, 10, 20), positive_weight=10)
    assert position.item() == pytest.approx(math.log(4), rel=1e-5)


def test_peak_loss_gradient_and_saturation() -> None:
    values, keypoints, mask = (torch.from_numpy(array) for array in peak_case(1))
    logits = values[:, None].requires_grad_()
    torch.autograd.gradcheck(lambda z: peak_detection_loss(z, keypoints, mask, positive_weight=5.0), logits)
    for logit in (-1e4, 1e4):
        flat = torch.full((3, 1, 13, 17), logit, requires_grad=True)
        assert_finite_gradients(sum(peak_detection_loss(flat, keypoints, mask, positive_weight=5.0)), flat)


def test_peak_loss_without_labels_or_pixels() -> None:
    logits = torch.randn(1, 1, 9, 9, requires_grad=True)
    none = torch.zeros(1, 4, 3)
    certainty, position = peak_detection_loss(logits, none, torch.ones(1, 9, 9), positive_weight=10)
    assert certainty.item() == pytest.approx(F.softplus(logits).sum().item() / 10, rel=1e-5)
    assert position.item() == 0
    label = torch.tensor([[[4.0, 4.0, 1.0]]])
    unseen = peak_detection_loss(logits, label, torch.zeros(1, 9, 9), positive_weight=10)
    assert_zero_with_gradient(unseen[0] + unseen[1], logits)


def test_every_weight_zero_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="every weight is 0") as error:
        LossConfig(0, 0, 0, 0, 0)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ descriptors


def test_distillation_loss_is_scipys_cosine_distance() -> None:
    rng = np.random.default_rng(4)
    mine, teacher = unit(rng, 3, 5, 8), 3 * rng.standard_normal((3, 5, 8))
    valid = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    pairs = [list(zip(mine[k][valid[k]], teacher[k][valid[k]])) for k in (0, 1)]  # the third image drops out
    expected = np.mean([np.mean([cosine(a, b) for a, b in image]) for image in pairs])
    got = distillation_loss(torch.from_numpy(mine), torch.from_numpy(teacher), torch.from_numpy(valid))
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_distillation_loss_without_points_or_with_a_teacher_of_another_length() -> None:
    mine = torch.ones(1, 2, 4, requires_grad=True)
    assert_zero_with_gradient(distillation_loss(mine, torch.ones(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool)), mine)
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(mine, torch.ones(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))


def test_excluded_negatives_by_hand() -> None:
    # On a line at x = 0, 16, 32.5 and 100; the last one is invalid. 0-16 is 16 apart (excluded), 16-32.5 is not.
    points = torch.tensor([[[0.0, 0.0], [16.0, 0.0], [32.5, 0.0], [100.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    expected = [
        [True, True, False, True],
        [True, True, False, True],
        [False, False, True, True],
        [False, False, False, True],  # column 3 is invalid, row 3 still has negatives (but no weight)
    ]
    assert excluded_negatives(points, valid).tolist() == [expected]


def test_excluded_negatives_is_exact_for_many_points_far_from_the_origin() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 64, (1, 300, 2)).astype(np.float32) + 4096
    distances = np.linalg.norm(points[:, :, None].astype(np.float64) - points[:, None], axis=-1)
    valid = rng.random((1, 300)) < 0.8
    got = excluded_negatives(torch.from_numpy(points), torch.from_numpy(valid))
    np.testing.assert_array_equal(got.numpy(), (distances <= 16) | ~valid[:, None])


def literal_descriptor_loss(d0, d1, w0, w1, valid, excluded, temperature, margin) -> float:
    total = 0.0
    for b in range(len(d0)):
        y0, y1 = d0[b] * w0[b][:, None], d1[b] * w1[b][:, None]
        distance = lambda i, j: math.sqrt(max(((y0[i] - y1[j]) ** 2).sum(), 1e-5))  # noqa: B023, E731 (used in its own round alone)
        normaliser = sum(math.exp(w / temperature) for w, v in zip(w0[b], valid[b]) if v)
        for i in range(len(y0)):
            if valid[b, i]:
                nearest = min(distance(i, j) + 10 * excluded[b, i, j] for j in range(len(y1)))
                alpha = math.exp(w0[b, i] / temperature) / normaliser
                total += alpha * max(0.0, margin + distance(i, i) - nearest)
    return total / len(d0)


def descriptor_batch(seed: int, *, batch: int = 3, count: int = 12, channels: int = 8) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    valid = rng.random((batch, count)) < 0.7
    points = rng.uniform(0, 60, (batch, count, 2))
    excluded = (np.linalg.norm(points[:, :, None] - points[:, None], axis=-1) <= 16) | ~valid[:, None]
    first = unit(rng, batch, count, channels)
    second = first + 0.5 * rng.standard_normal(first.shape)
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return first, second, rng.uniform(0.3, 3, (batch, count)), rng.uniform(0.3, 3, (batch, count)), valid, excluded


def test_descriptor_loss_equals_a_double_loop() -> None:
    batch = descriptor_batch(0)
    batch[4][1] = False  # an image without any valid point counts as 0 in the mean
    tensors = [torch.from_numpy(values) for values in batch]
    expected = literal_descriptor_loss(*batch, 2.0, 0.8)
    assert expected > 0.1
    assert descriptor_loss(*tensors, temperature=2.0, margin=0.8).item() == pytest.approx(expected, rel=1e-9)
    singles = [values.float() if values.is_floating_point() else values for values in tensors]
    assert descriptor_loss(*singles, temperature=2.0, margin=0.8).item() == pytest.approx(expected, rel=1e-5)


def test_descriptor_loss_by_hand() -> None:
    # Left at 0 and 90 degrees, right at 60 and 180. Positives |0-60| = 1 and |90-180| = sqrt 2; each negative is the
    # other right point: |0-180| = 2 and |90-60| = 2 sin 15. Hinges 1 + 1 - 2 = 0 and 1 + 1.41421 - 0.51764 = 1.89658.
    # All attention is 1: both anchors weigh 1/2.
    excluded = torch.eye(2, dtype=torch.bool)[None]
    ones = torch.ones(1, 2, dtype=torch.float64)
    loss = descriptor_loss(points_on_circle(0, 90), points_on_circle(60, 180), ones, ones, ones.bool(), excluded)
    assert loss.item() == pytest.approx((1 + math.sqrt(2) - 2 * math.sin(math.radians(15))) / 2, rel=1e-9)
    # Attention 2 on the second left anchor makes it (0, 2): positive sqrt(4 + 1), negative sqrt(5 - 4 cos 30); the
    # anchors weigh e^(1/15) : e^(2/15).
    attention = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    loss = descriptor_loss(points_on_circle(0, 90), points_on_circle(60, 180), attention, ones, ones.bool(), excluded)
    hinge = 1 + math.sqrt(5) - math.sqrt(5 - 4 * math.cos(math.radians(30)))
    assert loss.item() == pytest.approx(hinge * math.exp(1 / 15) / (1 + math.exp(1 / 15)), rel=1e-9)


def test_descriptor_loss_vanishes_for_separated_descriptors() -> None:
    one_hot = torch.eye(6)[None]
    ones = torch.ones(1, 6)
    loss = descriptor_loss(one_hot, one_hot, ones, ones, ones.bool(), torch.eye(6, dtype=torch.bool)[None])
    assert loss.item() == 0  # 1 + 0.003 - 1.414 < 0


@pytest.mark.parametrize("case", ["no valid point", "no negative", "one point"])
def test_descriptor_loss_degenerate_cases(case: str) -> None:
    count = 1 if case == "one point" else 4
    d0, d1 = (F.normalize(torch.randn(1, count, 8), dim=-1).requires_grad_() for _ in range(2))
    a0, a1 = (torch.rand(1, count, requires_grad=True) for _ in range(2))
    valid = torch.full((1, count), case != "no valid point")
    excluded = (
        torch.eye(count, dtype=torch.bool)[None] if case == "no valid point" else torch.ones(1, count, count).bool()
    )
    assert_zero_with_gradient(descriptor_loss(d0, d1, a0, a1, valid, excluded), d0, d1, a0, a1)


def test_descriptor_loss_has_finite_gradients_for_equal_descriptors_and_huge_attention() -> None:
    d = F.normalize(torch.ones(1, 4, 8), dim=-1).requires_grad_()
    a = torch.full((1, 4), 1e4, requires_grad=True)  # e^(1e4 / 15) overflows
    loss = descriptor_loss(d, d, a, a, torch.ones(1, 4).bool(), torch.eye(4, dtype=torch.bool)[None])
    assert_finite_gradients(loss, d, a)
    assert loss.item() == pytest.approx(1, abs=0.01)  # positive and negative are the same distance: the margin is left


def test_descriptor_loss_gradient() -> None:
    d0, d1, a0, a1, valid, excluded = (torch.from_numpy(values) for values in descriptor_batch(2, batch=2, count=6))
    inputs = [values.clone().requires_grad_() for values in (d0, d1, a0, a1)]
    torch.autograd.gradcheck(lambda *values: descriptor_loss(*values, valid, excluded, temperature=3.0), inputs)


# -------------------------------------------------------------------------------------------------------------- WSC


def literal_wsc(d, w, groups, excluded, *, form, margin, temperature, background_is_group) -> float:
    losses = []
    for b in range(len(d)):
        n = len(d[b])
        y = d[b] if form == "mean_softplus" else d[b] * w[b][:, None]
        distance = np.array([[math.sqrt(max(((y[i] - y[j]) ** 2).sum(), 1e-5)) for j in range(n)] for i in range(n)])
        positive, negative = np.zeros((n, n), bool), np.zeros((n, n), bool)
        for i in range(n):
            for j in range(n):
                if groups[b, i] == -1 or groups[b, j] == -1:
                    continue
                same = groups[b, i] == groups[b, j]
                background = groups[b, i] == 0 and not background_is_group
                positive[i, j] = same and not background and (i != j or form == "released")
                negative[i, j] = not same
        if form == "mean_softplus":
            if positive.any() and negative.any():
                near, far = max(distance[positive].mean(), margin), distance[negative].mean()
                a, b_ = math.exp(-near / temperature), math.exp(-far / temperature)
                losses.append(-math.log(a / (a + b_)))
            continue
        distance += 10 * excluded[b]
        columns = []
        for j in range(n):
            p, q = positive[:, j], negative[:, j]
            if form == "released":
                a = np.exp(-np.maximum(margin * p, distance[:, j] * p) / temperature).sum()
                c = np.exp(-distance[:, j] * q / temperature).sum()
            elif p.any() and q.any():
                a = np.exp(-np.maximum(margin, distance[p, j]) / temperature).sum()
                c = np.exp(-distance[q, j] / temperature).sum()
            else:
                continue
            columns.append(-math.log(a / (a + c)))
        if columns and (groups[b] != -1).any():
            losses.append(float(np.mean(columns)))
    return float(np.mean(losses)) if losses else 0.0


def wsc_batch(seed: int, *, batch: int = 4, count: int = 14, names: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    d, _, w, _, _, excluded = descriptor_batch(seed, batch=batch, count=count)
    return d, w, rng.integers(-1, names, (batch, count)), excluded


@pytest.mark.parametrize("form", WSC_FORMS)
@pytest.mark.parametrize("background", [False, True])
def test_wsc_loss_equals_a_double_loop(form: str, background: bool) -> None:
    d, w, groups, excluded = wsc_batch(3)
    groups[1] = -1  # a switched-off image
    groups[2, :7], groups[2, 7:] = 0, -1  # nothing but background
    options = {"form": form, "margin": 0.9, "temperature": 1.5, "background_is_group": background}
    expected = literal_wsc(d, w, groups, excluded, **options)
    got = wsc_loss(*(torch.from_numpy(values) for values in (d, w, groups, excluded)), **options)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def measured_wsc_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """400 grid points of 20 groups, a tenth without group (-1), three tenths of the correspondences invalid."""
    rng = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 20, (1, 400), generator=rng)
    groups[:, torch.randperm(400, generator=rng)[:40]] = -1
    valid = torch.ones(1, 400, dtype=torch.bool)
    valid[:, torch.randperm(400, generator=rng)[:120]] = False
    steps = 10 + 20 * torch.arange(20.0)
    excluded = excluded_negatives(torch.cartesian_prod(steps, steps)[None], valid)
    scattered = F.normalize(torch.randn(1, 400, 128, generator=rng), dim=-1)
    centres = F.normalize(torch.randn(21, 128, generator=rng), dim=-1)
    return scattered, centres[groups], groups, excluded


def test_released_wsc_has_the_measured_values() -> None:
    cases = [measured_wsc_case(seed) for seed in range(4)]
    scattered, clustered, groups, excluded = (torch.cat(values) for values in zip(*cases))
    ones, nothing = torch.ones(4, 400), torch.zeros_like(excluded)
    options = {"form": "released", "background_is_group": True}
    got = [
        wsc_loss(scattered, ones, groups, excluded, **options),
        wsc_loss(clustered, ones, groups, excluded, **options),
        wsc_loss(scattered, 0.5 * ones, groups, excluded, **options),
        wsc_loss(scattered, 3 * ones, groups, excluded, **options),
        wsc_loss(scattered, ones, groups, nothing, **options),
        wsc_loss(clustered, ones, groups, nothing, **options),
    ]
    assert [value.item() for value in got] == pytest.approx([0.4976, 0.4944, 0.532, 0.386, 0.599, 0.594], abs=0.002)


def test_released_wsc_mostly_inflates_attention_and_mean_softplus_does_not() -> None:
    scattered, _, groups, excluded = measured_wsc_case(0)
    turning, share, inflation = {}, {}, {}
    for form in ("released", "mean_softplus"):
        d, w = scattered.clone().requires_grad_(), torch.ones(1, 400, requires_grad=True)
        loss = wsc_loss(d, w, groups, excluded, form=form, background_is_group=True) + 0 * w.sum()
        by_d, by_w = torch.autograd.grad(loss, (d, w))
        turning[form] = (by_d - (by_d * scattered).sum(-1, keepdim=True) * scattered).norm().item()
        share[form] = turning[form] / by_d.norm().item()
        inflation[form] = by_w.sum().item()
    assert loss.item() == pytest.approx(math.log(2), abs=0.001)  # P = N for random descriptors: softplus(0)
    assert share["released"] < 0.1 < 0.5 < share["mean_softplus"]
    assert turning["mean_softplus"] > 4 * turning["released"]
    assert inflation["released"] < -0.05
    assert inflation["mean_softplus"] == 0


def test_mean_softplus_by_hand() -> None:
    # Angles 0 and 60 in group 1, 180 in group 2: P = |0-60| = 1, N = (|0-180| + |60-180|) / 2 = (2 + sqrt 3) / 2.
    d, w = points_on_circle(0, 60, 180), torch.ones(1, 3)
    none = torch.zeros(1, 3, 3, dtype=torch.bool)
    loss = wsc_loss(d, w, torch.tensor([[1, 1, 2]]), none, form="mean_softplus", temperature=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp((1 - (2 + math.sqrt(3)) / 2) / 2)), rel=1e-9)
    # A point without a mask is nobody's friend but everybody's foe: only the pair 0-60 attracts here as well.
    same = wsc_loss(
        points_on_circle(0, 60, 180, 180), torch.ones(1, 4), torch.tensor([[1, 1, 0, 0]]),
        torch.zeros(1, 4, 4, dtype=torch.bool), form="mean_softplus", temperature=2.0,
    )  # fmt: skip
    assert same.item() == pytest.approx(loss.item(), rel=1e-9)


def test_every_wsc_form_by_hand_within_the_margin() -> None:
    # Equal descriptors in group 1, the opposite one in group 2; M = 0.07, T = 5. The equal pair is nearer than M and
    # counts as M: p = e^(-0.07 / 5). The others are 2 apart: n = e^(-2 / 5).
    p, n = math.exp(-0.014), math.exp(-0.4)
    # mean_softplus: P = M, N = 2. masked_infonce: points 0 and 1 have one pair of each kind, point 2 no positive one.
    expected = {"mean_softplus": -math.log(p / (p + n)), "masked_infonce": -math.log(p / (p + n))}
    # released: points 0 and 1 have sums p + p + 1 (itself, the other, the wrong kind) and 1 + 1 + n; point 2 has
    # p + 1 + 1 and n + n + 1.
    columns = [(2 * p + 1, 2 + n), (2 * p + 1, 2 + n), (p + 2, 2 * n + 1)]
    expected["released"] = sum(-math.log(near / (near + far)) for near, far in columns) / 3
    for form in WSC_FORMS:
        loss = wsc_loss(
            points_on_circle(30, 30, 210), torch.ones(1, 3), torch.tensor([[1, 1, 2]]), torch.zeros(1, 3, 3).bool(),
            form=form,
        )  # fmt: skip
        assert loss.item() == pytest.approx(expected[form], rel=1e-9)


@pytest.mark.parametrize("form", ["masked_infonce", "mean_softplus"])
def test_repaired_wsc_forms_need_a_pair_of_each_kind(form: str) -> None:
    d, w = F.normalize(torch.randn(1, 5, 8), dim=-1).requires_grad_(), torch.rand(1, 5, requires_grad=True)
    groups = torch.tensor([[1, 2, 3, 0, 0]])  # every mask holds one point, and the background is no group
    loss = wsc_loss(d, w, groups, torch.zeros(1, 5, 5).bool(), form=form) + 0 * w.sum()
    assert_zero_with_gradient(loss, d, w)


@pytest.mark.parametrize(("form", "gain"), [("released", 0.01), ("masked_infonce", 0.2), ("mean_softplus", 0.1)])
def test_only_the_repaired_wsc_forms_reward_clusters(form: str, gain: float) -> None:
    scattered, clustered, groups, excluded = measured_wsc_case(0)
    before, after = (wsc_loss(d, torch.ones(1, 400), groups, excluded, form=form) for d in (scattered, clustered))
    assert after < before
    assert (before - after > gain) == (form != "released")


@pytest.mark.parametrize("form", WSC_FORMS)
def test_wsc_skips_switched_off_images(form: str) -> None:
    d, w, groups, excluded = (torch.from_numpy(values) for values in wsc_batch(5, batch=2))
    alone = wsc_loss(d[:1], w[:1], groups[:1], excluded[:1], form=form)
    groups[1] = -1
    assert wsc_loss(d, w, groups, excluded, form=form).item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("form", WSC_FORMS)
@pytest.mark.parametrize("label", [-1, 0, 3])
def test_wsc_with_one_group_only(form: str, label: int) -> None:
    d, w = F.normalize(torch.randn(2, 5, 8), dim=-1).requires_grad_(), torch.rand(2, 5, requires_grad=True)
    groups = torch.full((2, 5), label)
    loss = wsc_loss(d, w, groups, torch.zeros(2, 5, 5).bool(), form=form) + 0 * w.sum()
    if form == "released" and label != -1:
        assert_finite_gradients(loss, d, w)
    else:
        assert_zero_with_gradient(loss, d, w)


@pytest.mark.parametrize("form", WSC_FORMS)
def test_wsc_has_finite_gradients_for_equal_descriptors_and_huge_attention(form: str) -> None:
    d = F.normalize(torch.ones(1, 6, 8), dim=-1).requires_grad_()
    w = torch.tensor([[0.0, 1, 1e3, 1e4, 1e3, 0]], requires_grad=True)
    loss = wsc_loss(d, w, torch.tensor([[1, 1, 2, 2, 3, 3]]), torch.zeros(1, 6, 6).bool(), form=form) + 0 * w.sum()
    assert_finite_gradients(loss, d, w)


@pytest.mark.parametrize("form", WSC_FORMS)
def test_wsc_gradient(form: str) -> None:
    d, w, groups, excluded = (torch.from_numpy(values) for values in wsc_batch(7, batch=2, count=7, names=3))
    inputs = [d.clone().requires_grad_(), w.clone().requires_grad_()]
    torch.autograd.gradcheck(
        lambda d, w: wsc_loss(d, w, groups, excluded, form=form, margin=0.3, temperature=1.0) + 0 * w.sum(), inputs
    )


def test_pair_losses_make_nothing_larger_than_the_pairs() -> None:
    d, w, groups, excluded = (torch.from_numpy(values) for values in wsc_batch(8, batch=2, count=64))
    d.requires_grad_()
    with LargestTensor() as largest:
        for form in WSC_FORMS:
            wsc_loss(d, w, groups, excluded, form=form).backward()
        descriptor_loss(d, d, w, w, groups >= 0, excluded).backward()
        excluded_negatives(100 * w[:, :, None].repeat(1, 1, 2), groups >= 0)
    assert largest.elements <= 2 * 64 * 64


# ------------------------------------------------------------------------------------------------------------- edges


def edge_case(height: int = 12, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 256, (2, height, width), dtype=np.uint8)
    return rng.random((2, 1, height // 4, width // 4), dtype=np.float32), target


def reduced(target: np.ndarray, pooling: str) -> np.ndarray:
    size = (target.shape[1] // 4, target.shape[0] // 4)
    values = target.astype(np.float64) / 255
    if pooling == "max":
        return block_reduce(values, 4, np.max)
    return cv2.resize(values, size, interpolation={"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}[pooling])


@pytest.mark.parametrize("form", ["mse", "l1"])
@pytest.mark.parametrize("pooling", ["bilinear", "area", "max"])
def test_edge_loss_against_opencv(form: str, pooling: str) -> None:
    predicted, target = edge_case()
    error = predicted[:, 0] - np.stack([reduced(image, pooling) for image in target])
    expected = np.mean(error**2 if form == "mse" else np.abs(error))
    got = edge_loss(torch.from_numpy(predicted), torch.from_numpy(target), form=form, pooling=pooling)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    # Four cells in a row; a white line of one pixel on row r of four; predicted 0: the mean square of the target.
    # bilinear reads rows 1 and 2 at weight 1/2: (0, 1/4, 1/4, 0); area (1/4)^2; max 1.
    [("bilinear", [0, 1 / 4, 1 / 4, 0]), ("area", [1 / 16] * 4), ("max", [1] * 4)],
)
def test_edge_pooling_of_one_pixel_lines(pooling: str, expected: list[float]) -> None:
    losses = []
    for row in range(4):
        target = torch.zeros(1, 4, 16, dtype=torch.uint8)
        target[:, row] = 255
        losses.append(edge_loss(torch.zeros(1, 1, 1, 4), target, pooling=pooling).item())
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pooling", "reads"), [("bilinear", [1, 2]), ("area", [0, 1, 2, 3]), ("max", [0, 1, 2, 3])])
def test_edge_cells_count_where_every_pixel_they_read_is_valid(pooling: str, reads: list[int]) -> None:
    target = torch.zeros(1, 4, 8, dtype=torch.uint8)
    predicted = torch.tensor([[[[1.0, 0.5]]]])  # squares 1 and 0.25
    for y in range(4):
        for x in range(4):
            valid = torch.ones(1, 4, 8, dtype=torch.bool)
            valid[0, y, x] = False
            expected = 0.25 if y in reads and x in reads else 0.625
            assert edge_loss(predicted, target, valid, pooling=pooling).item() == pytest.approx(expected, abs=1e-7)


def test_invalid_images_drop_out_of_the_edge_loss() -> None:
    predicted, target = (torch.from_numpy(values) for values in edge_case())
    valid = torch.tensor([True, False])[:, None, None].expand(target.shape)
    alone = edge_loss(predicted[:1], target[:1])
    assert edge_loss(predicted, target, valid).item() == pytest.approx(alone.item(), rel=1e-6)
    predicted.requires_grad_()
    assert_zero_with_gradient(edge_loss(predicted, target, torch.zeros_like(valid)), predicted)


@pytest.mark.parametrize("form", ["mse", "l1"])
def test_edge_loss_gradient(form: str) -> None:
    predicted, target = (torch.from_numpy(values) for values in edge_case(8, 8))
    valid = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    inputs = predicted.double().requires_grad_()
    torch.autograd.gradcheck(lambda p: edge_loss(p, target, valid, form=form), inputs)


# ---------------------------------------------------------------------------------------------------------- together


def all_losses(scale: Tensor) -> list[Tensor]:
    """Every loss on a small fixed batch, the floating inputs multiplied by ``scale`` and of its dtype."""
    d0, d1, a0, a1, valid, excluded = (torch.from_numpy(values) for values in descriptor_batch(9))
    groups = torch.from_numpy(wsc_batch(9, batch=3, count=12)[2])
    predicted, target = (torch.from_numpy(values) for values in edge_case())
    d0, d1, a0, a1, predicted = (values.to(scale.dtype) * scale for values in (d0, d1, a0, a1, predicted))
    labels = (target > 200).to(torch.uint8)
    logits = F.interpolate(predicted, size=labels.shape[1:])
    return [
        *(detection_loss(logits, labels, torch.ones_like(labels), form=form) for form in ("released", "paper")),
        descriptor_loss(d0, d1, a0, a1, valid, excluded),
        *(wsc_loss(d0, a0, groups, excluded, form=form) for form in WSC_FORMS),
        edge_loss(predicted, target, torch.ones_like(target, dtype=torch.bool)),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_float32_under_autocast(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = all_losses(torch.ones((), dtype=dtype))
    reference = all_losses(torch.ones((), dtype=torch.float64))
    assert {loss.dtype for loss in got} == {torch.float32}
    assert {loss.dtype for loss in reference} == {torch.float64}
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # half inputs themselves are rounded
    assert [loss.item() for loss in got] == pytest.approx([loss.item() for loss in reference], rel=tolerance)


def test_losses_compile_to_one_graph() -> None:
    """A wait for the device, or a shape or branch that depends on values, would break the graph."""
    scale = torch.ones((), dtype=torch.float64)
    d0, d1, a0, a1, valid, excluded = (torch.from_numpy(values) for values in descriptor_batch(9))
    groups = torch.from_numpy(wsc_batch(9, batch=3, count=12)[2])
    predicted, target = (torch.from_numpy(values) for values in edge_case())

    @torch.compile(backend="eager", fullgraph=True)
    def total(scale: Tensor) -> Tensor:
        labels = target > 200
        logits = F.interpolate(predicted, size=target.shape[1:]) * scale
        losses = [detection_loss(logits, labels, labels, form=form) for form in ("released", "paper")]
        losses += [wsc_loss(d0 * scale, a0, groups, excluded, form=form) for form in WSC_FORMS]
        losses += [edge_loss(predicted * scale, target, labels, pooling=p) for p in ("bilinear", "area", "max")]
        losses += [descriptor_loss(d0 * scale, d1, a0, a1, valid, excluded_negatives(d0[:, :, :2], valid))]
        losses += peak_detection_loss(logits, 8 * d0[:2, :, :3].abs().float(), labels, positive_weight=10.0)
        return torch.stack([loss.double() for loss in losses]).sum()

    assert torch.isfinite(total(scale))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: detection_loss(x, x[:, 0], x[:, 0], form="focal"), "detection form 'focal': choose one of released"),
        (lambda x: wsc_loss(x[0], x[0, 0], x[0, 0].long(), x.bool()[0], form="infonce"), "WSC form 'infonce'"),
        (lambda x: edge_loss(x, x[:, 0].byte(), form="l2"), "edge form 'l2': choose one of mse, l1"),
        (lambda x: edge_loss(x, x[:, 0].byte(), pooling="mean"), "edge pooling 'mean': choose one of bilinear"),
    ],
)
def test_unknown_names_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4, 4))
