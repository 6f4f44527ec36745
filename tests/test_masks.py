"""Masks: painting, order, table and packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import regionprops

from samfeat.teacher_cache.schema import MASK_COLUMNS, MAX_MASKS
from samfeat.teacher_cache.store.rows import pack, unpack
from samfeat.teacher_cache.teachers.masks import describe, paint, sort_masks

AREA, IOU = MASK_COLUMNS.index("area"), MASK_COLUMNS.index("predicted_iou")

stacks = st.tuples(st.integers(0, 6), st.integers(1, 7), st.integers(1, 19)).flatmap(lambda shape: arrays(bool, shape))


def table_of(stack: np.ndarray, predicted_iou: np.ndarray | None = None) -> np.ndarray:
    ones = np.ones(len(stack))
    return describe(stack, predicted_iou=ones if predicted_iou is None else predicted_iou, stability_score=ones)


def paint_by_pixel(stack: np.ndarray) -> np.ndarray:
    areas = [int(mask.sum()) for mask in stack]
    labels = np.zeros(stack.shape[1:], int)
    for y in range(stack.shape[1]):
        for x in range(stack.shape[2]):
            covering = [(areas[k], k) for k in range(len(stack)) if stack[k, y, x]]
            labels[y, x] = min(covering)[1] + 1 if covering else 0
    return labels


def test_paint_by_hand() -> None:
    whole = np.ones((2, 3), bool)
    part = np.array([[1, 1, 0], [0, 0, 0]], bool)
    twin = np.array([[0, 1, 1], [0, 0, 0]], bool)
    labels = paint(np.stack([whole, part, twin]))
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[2, 2, 3], [1, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_paint_is_the_smallest_mask_of_every_pixel(stack: np.ndarray) -> None:
    np.testing.assert_array_equal(paint(stack), paint_by_pixel(stack))


@settings(max_examples=60, deadline=None)
@given(stacks, st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_the_teacher(stack: np.ndarray, random) -> None:
    scores = np.linspace(0.5, 1, len(stack))  # all different, so that no tie is left to the order
    order = np.array(random.sample(range(len(stack)), len(stack)), int)
    masks = sort_masks(stack, table_of(stack, scores))
    shuffled = sort_masks(stack[order], table_of(stack, scores)[order])
    np.testing.assert_array_equal(masks.stack, shuffled.stack)
    np.testing.assert_array_equal(masks.table, shuffled.table)


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_sorted_masks_are_the_same_masks_largest_first(stack: np.ndarray) -> None:
    masks = sort_masks(stack, table_of(stack))
    areas = masks.stack.sum((1, 2))
    assert (np.diff(areas) <= 0).all()
    np.testing.assert_array_equal(masks.table[:, AREA], areas)
    assert sorted(mask.tobytes() for mask in masks.stack) == sorted(mask.tobytes() for mask in stack if mask.any())


def test_equal_areas_stand_by_predicted_iou_then_as_given() -> None:
    stack = np.eye(4, dtype=bool)[:, None]
    masks = sort_masks(stack, table_of(stack, np.array([0.5, 0.9, 0.5, 0.7])))
    assert masks.stack[:, 0].argmax(1).tolist() == [1, 3, 0, 2]


def test_too_many_masks_keep_those_with_the_highest_predicted_iou() -> None:
    count = MAX_MASKS + 30
    stack = np.zeros((count, 1, count), bool)
    for k in range(count):
        stack[k, 0, : k + 1] = True  # the largest masks are the worst
    scores = np.linspace(0.99, 0.01, count)
    masks = sort_masks(stack, table_of(stack, scores))
    assert masks.stack.shape == (MAX_MASKS, 1, count)
    assert masks.table[:, AREA].max() == MAX_MASKS
    assert masks.table[:, IOU].min() == np.float32(scores[MAX_MASKS - 1])


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_table_agrees_with_scikit_image(stack: np.ndarray) -> None:
    scores = np.linspace(0, 1, len(stack))
    table = describe(stack, predicted_iou=scores, stability_score=1 - scores)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[:, 1], scores)
    np.testing.assert_allclose(table[:, 2], 1 - scores, atol=1e-7)
    for mask, row in zip(stack, table):
        if not mask.any():
            assert not row[[0, 3, 4, 5, 6]].any()
            continue
        (region,) = regionprops(mask.astype(np.uint8))
        top, left, bottom, right = region.bbox
        assert row[[0, 3, 4, 5, 6]].tolist() == [region.area, left, top, right - left, bottom - top]


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_packing_is_lossless(stack: np.ndarray) -> None:
    packed = pack(stack)
    assert packed.shape == (*stack.shape[:2], (stack.shape[2] + 7) // 8)
    np.testing.assert_array_equal(unpack(packed, stack.shape[2]), stack)


def test_the_first_pixel_is_the_highest_bit() -> None:
    row = np.zeros((1, 1, 10), bool)
    row[0, 0, [0, 7, 9]] = True
    assert pack(row).tolist() == [[[0b10000001, 0b01000000]]]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        paint(np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="65535"):
        paint(np.zeros((65536, 1, 1), bool))
    with pytest.raises(ValueError, match="table of shape"):
        sort_masks(np.ones((2, 3, 3), bool), np.zeros((3, 7), np.float32))
    with pytest.raises(ValueError, match="rows of 17 pixels"):
        unpack(np.zeros((1, 1, 2), np.uint8), 17)
