"""From a grid of prompts to the masks that survive, part by part; the whole is compared in test_sam_reference.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score
from segment_anything.utils.transforms import ResizeLongestSide

from samfeat.teacher_cache.teachers import sam_masks
from samfeat.teacher_cache.teachers.sam_decoder import ImageSide, LowResMasks
from samfeat.teacher_cache.teachers.sam_masks import (
    Frame,
    Resampling,
    find_edge_masks,
    find_masks,
    mask_boxes,
    stability_score,
)

CPU = torch.device("cpu")


def frame_of(size: tuple[int, int], side: int) -> Frame:
    return Frame(size, ResizeLongestSide.get_preprocess_shape(*size, side), side)


@pytest.mark.parametrize("size", [(400, 400), (300, 400), (97, 53), (1500, 1000), (64, 64), (1, 40), (40, 1)])
@pytest.mark.parametrize("side", [1024, 256])
def test_resampling_is_the_two_steps_of_the_original(size: tuple[int, int], side: int) -> None:
    frame = frame_of(size, side)
    logits = torch.randn(2, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    padded = F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
    cropped = padded[..., : frame.scaled[0], : frame.scaled[1]]
    expected = F.interpolate(cropped, size, mode="bilinear", align_corners=False)[:, 0]
    found = Resampling((side // 4, side // 4), frame, CPU)(logits)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5


def test_scores_and_boxes_are_those_of_the_original() -> None:
    coarse = torch.randn(40, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    logits = F.interpolate(3 * coarse, (31, 47), mode="bicubic")[:, 0] - torch.linspace(0, 12, 40)[:, None, None]
    logits[0] = 9
    logits[1] = -9
    masks = logits > 0.5
    assert masks.flatten(1).any(1).sum() > 20
    expected = calculate_stability_score(logits, 0.5, 0.75)
    np.testing.assert_array_equal(stability_score(logits, 0.5, 0.75), expected)
    assert expected[1].isnan()
    assert torch.equal(mask_boxes(masks), batched_mask_to_box(masks))
    assert mask_boxes(masks)[:2].tolist() == [[0, 0, 46, 30], [0, 0, 0, 0]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


class Drawn:
    """A decoder that knows its masks: prompt k gives the drawn masks k."""

    mask_threshold = 0.0

    def __init__(self, logits: torch.Tensor, predicted_iou: torch.Tensor) -> None:
        self.logits, self.predicted_iou = logits, predicted_iou  # [images, prompts, masks, h, w], [..., masks]
        self.mask_size = tuple(logits.shape[-2:])
        self.images = ImageSide(*[torch.zeros(len(logits), 1, 1)] * 4)
        self.points = torch.empty(0)

    def tokens(self, points: torch.Tensor) -> torch.Tensor:
        self.points = points
        return torch.arange(len(points))

    def decode(self, images: ImageSide, prompts: torch.Tensor, *, iou_above: float | None = None) -> LowResMasks:
        predicted_iou = self.predicted_iou[:, prompts]
        kept = predicted_iou > (-1 if iou_above is None else iou_above)
        return LowResMasks(self.logits[:, prompts][kept], predicted_iou[kept], kept.nonzero()[:, 0])


def squares(*lefts: int, size: int = 50) -> torch.Tensor:
    """A sharp square of 21 x 21 pixels for each left side: logits [len(lefts), size, size]."""
    logits = torch.full((len(lefts), size, size), -9.0)
    for mask, left in zip(logits, lefts):
        mask[10:31, left : left + 21] = 9
    return logits


@pytest.mark.parametrize("size", [(50, 80), (400, 300)])
def test_prompts_are_the_points_of_the_original(size: tuple[int, int]) -> None:
    drawn = Drawn(torch.zeros(1, 9, 1, 64, 64), torch.ones(1, 9, 1))
    list(
        find_edge_masks(
            drawn, drawn.images, frame_of(size, 256), points_per_side=3, points_per_batch=4, box_nms_thresh=0.7
        )
    )
    expected = ResizeLongestSide(256).apply_coords(build_point_grid(3) * np.array(size)[::-1], size)
    np.testing.assert_allclose(drawn.points, expected, rtol=1e-12)
    assert drawn.points.dtype == torch.float64


@pytest.mark.parametrize(("threshold", "expected"), [(0.6, [10]), (0.9, [10, 14, 18])])
def test_edges_duplicates_go_within_batches_before_they_go_between_them(threshold: float, expected: list[int]) -> None:
    # The best box comes last. It suppresses the second, the second the third; the first would leave the third alone.
    lefts = squares(14, 18, 10, 10)
    drawn = Drawn(lefts[None, :, None], torch.tensor([0.8, 0.7, 0.9, 0.1])[None, :, None])
    (found,) = find_edge_masks(
        drawn, drawn.images, Frame((50, 50), (50, 50), 50), points_per_side=2, points_per_batch=2,
        box_nms_thresh=threshold,
    )  # fmt: skip
    assert [int(mask.amax(0).argmax()) for mask in found] == expected


FILTERS = {
    "points_per_side": 2,
    "pred_iou_thresh": 0.5,
    "stability_score_thresh": 0.5,
    "stability_score_offset": 1.0,
    "box_nms_thresh": 0.7,
}


def test_masks_pass_the_filters_of_the_original() -> None:
    logits = squares(0, 25, 25, 2)
    logits[1, 10:31, 25:29] = 0.5  # 17 of 21 columns are stable
    shaky = squares(3)
    shaky[0, :, 3:14] = shaky[0, :, 3:14].clamp(max=0.5)  # 10 of 21
    drawn = Drawn(
        torch.cat([logits, shaky])[None, [0, 1, 4, 3], None], torch.tensor([0.6, 0.7, 0.95, 0.5])[None, :, None]
    )
    frame = Frame((50, 50), (50, 50), 50)

    def lefts(**changes: float) -> list[int]:
        (found,) = find_masks(drawn, drawn.images, frame, **{**FILTERS, **changes})
        assert len(found.masks) == len(found.predicted_iou) == len(found.stability_score)
        return [int(mask.any(0).int().argmax()) for mask in found.masks]

    assert lefts() == [25, 0]  # the shaky one goes before it suppresses, 0.5 is not above 0.5
    assert lefts(pred_iou_thresh=0.4) == [25, 0]  # now the fourth is a duplicate of the first
    assert lefts(pred_iou_thresh=0.4, box_nms_thresh=1.0) == [25, 0, 2]
    assert lefts(stability_score_thresh=17 / 21) == [25, 0]  # as stable as the threshold is stable enough
    assert lefts(stability_score_thresh=0.82) == [0]
    assert lefts(stability_score_thresh=0.0) == [3, 25]  # the shaky one stays and suppresses the first
    assert lefts(pred_iou_thresh=0.99) == []


def test_images_do_not_suppress_each_other() -> None:
    logits = torch.stack([squares(0, 1, 25, 25), squares(1, 25, 0, 4)])[:, :, None]
    drawn = Drawn(logits, torch.tensor([[0.6, 0.7, 0.8, 0.9], [0.9, 0.8, 0.7, 0.6]])[:, :, None])
    frame = Frame((50, 50), (50, 50), 50)
    found = find_masks(drawn, drawn.images, frame, **FILTERS)
    assert [[int(mask.any(0).int().argmax()) for mask in each.masks] for each in found] == [[25, 1], [1, 25]]
    np.testing.assert_allclose(found[0].predicted_iou, [0.9, 0.7])


@pytest.mark.parametrize("many", [1, 1 << 30])
def test_how_many_are_handled_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    coarse = torch.randn(2 * 16 * 3, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    logits = F.interpolate(8 * coarse, (64, 64), mode="bicubic").view(2, 16, 3, 64, 64)
    drawn = Drawn(logits, torch.rand(2, 16, 3, generator=torch.Generator().manual_seed(5)))
    frame, ask = frame_of((40, 60), 256), {**FILTERS, "points_per_side": 4, "box_nms_thresh": 1.0}
    expected = find_masks(drawn, drawn.images, frame, **ask)
    monkeypatch.setitem(sam_masks.PROMPTS_AT_ONCE, "cpu", many)
    monkeypatch.setitem(sam_masks.PIXELS_AT_ONCE, "cpu", many)
    for one, other in zip(find_masks(drawn, drawn.images, frame, **ask), expected, strict=True):
        assert len(one.masks) > 5
        assert all(torch.equal(field, same) for field, same in zip(one, other))
