"""The teacher against segment_anything as its authors run it: SamPredictor and SamAutomaticMaskGenerator."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from benchmarks.bench_teacher import photograph, random_sam
from scipy.optimize import linear_sum_assignment
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid
from torchvision.ops import nms

from samfeat.teacher_cache.schema import Provenance, TeacherOutput
from samfeat.teacher_cache.teachers import make_teacher, teacher_of
from samfeat.teacher_cache.teachers.edges import edge_map
from samfeat.teacher_cache.teachers.sam import SamTeacher

FEW_PROMPTS = {
    "points_per_side": 4,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 0.9,
    "edge_points_per_side": 3,
}
TIE = 1e-5  # a score this close to its threshold may fall on either side


class Plain(NamedTuple):
    """What the original says about an image."""

    embedding: np.ndarray
    records: list[dict]
    edges: np.ndarray


def plain(sam: Sam, image: np.ndarray, *, edge_points_per_side: int, **ask: float) -> Plain:
    """Embedding, masks and edges by the original's own classes, a step at a time."""
    records = SamAutomaticMaskGenerator(sam, **ask).generate(image)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    kept = []
    points = build_point_grid(edge_points_per_side) * np.array(image.shape[1::-1])
    for batch in torch.as_tensor(predictor.transform.apply_coords(points, image.shape[:2])).split(64):
        labels = torch.ones(len(batch), 1)
        logits, quality, _ = predictor.predict_torch(batch[:, None], labels, return_logits=True)
        kept.append(without_duplicates(logits.flatten(0, 1), quality.flatten(), ask["box_nms_thresh"]))
    logits, _ = without_duplicates(*(torch.cat(part) for part in zip(*kept)), ask["box_nms_thresh"])
    return Plain(predictor.get_image_embedding()[0].numpy(), records, edge_map(logits.sigmoid(), logits > 0))


def without_duplicates(logits: torch.Tensor, quality: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...]:
    kept = nms(batched_mask_to_box(logits > 0).float(), quality, threshold)
    return logits[kept], quality[kept]


def compare(sam: Sam, image: np.ndarray, *, at_least: int, edge_points_per_side: int, **ask: float) -> dict[str, float]:
    """Check all targets of an image; the differences that were seen."""
    expected = plain(sam, image, edge_points_per_side=edge_points_per_side, **ask)
    teacher = SamTeacher.from_sam(
        sam, model="any", checkpoint_sha256="0" * 64, edge_points_per_side=edge_points_per_side, **ask
    )
    (output,) = teacher(image[None])
    rows, columns = output.embedding.shape[1:]
    whole = expected.embedding[:, :rows, :columns]
    embedding = float(np.abs(output.embedding - whole).max() / np.abs(whole).max())
    edges = np.abs(output.edges.astype(int) - expected.edges)
    pairs = matched(output, expected.records, **ask)
    assert len(pairs) >= at_least
    groups = agreement(output, expected.records, pairs)
    assert embedding <= 1e-5
    assert (edges > 1).mean() <= 1e-4  # where rounding flips a pixel of a mask, its 3 x 3 neighbours see a boundary
    assert output.edges.max() > 60
    assert groups >= 0.999
    return {"masks": len(pairs), "embedding": embedding, "edges": int(edges.max()), "other group": 1 - groups}


def matched(output: TeacherOutput, records: list[dict], **ask: float) -> dict[int, int]:
    """Index among the masks of the output -> index among the records; all have a partner but those at a threshold."""
    ours = output.masks.table[:, :3].astype(float)
    theirs = np.array([[r["area"], np.clip(r["predicted_iou"], 0, 1), r["stability_score"]] for r in records])
    few = 1e-3 * output.groups.size  # pixels; random masks are flat, so rounding moves a boundary here and there
    gaps = np.abs(ours[:, None] - theirs) / (few, TIE, 0.02)  # each is below 1 for a partner
    pairs = {k: n for k, n in zip(*linear_sum_assignment(gaps.clip(max=100).sum(2))) if gaps[k, n].max() <= 1}
    for k, number in pairs.items():
        assert np.count_nonzero(output.masks.stack[k] != records[number]["segmentation"]) <= few
    for unmatched in (np.delete(ours, list(pairs), 0), np.delete(theirs, list(pairs.values()), 0)):
        assert all(at_threshold(iou, stability, **ask) for _, iou, stability in unmatched)
    return pairs


def at_threshold(iou: float, stability: float, *, pred_iou_thresh: float, stability_score_thresh: float, **_) -> bool:
    return min(abs(iou - pred_iou_thresh), abs(stability - stability_score_thresh)) <= TIE


def agreement(output: TeacherOutput, records: list[dict], pairs: dict[int, int]) -> float:
    """Share of the pixels in the same group, the smallest mask that covers them, or in one of the same size."""
    areas = np.array([0, *(record["area"] for record in records)])
    expected = np.zeros(output.groups.shape, int)
    for number in np.argsort(-areas[1:], kind="stable"):
        expected[records[number]["segmentation"]] = number + 1
    names = np.zeros(len(output.masks.stack) + 1, int)
    names[[k + 1 for k in pairs]] = [number + 1 for number in pairs.values()]
    found = names[output.groups]
    return float(((found == expected) | (np.abs(areas[found] - areas[expected]) <= 2)).mean())


@pytest.mark.parametrize("size", [(96, 96), (120, 90), (70, 110), (300, 200)])
@pytest.mark.parametrize(("box_nms_thresh", "at_least"), [(0.8, 3), (1.0, 200)])
def test_the_toy_sam_teaches_what_the_original_says(
    toy_sam: Sam, size: tuple[int, int], box_nms_thresh: float, at_least: int
) -> None:
    seen = compare(
        toy_sam,
        photograph(1, size),
        at_least=at_least,
        points_per_side=12,
        pred_iou_thresh=0.6,
        stability_score_thresh=0.1,
        box_nms_thresh=box_nms_thresh,
        edge_points_per_side=5,
    )
    print(seen)


def test_mobile_sam_teaches_what_the_original_says(tmp_path: Path) -> None:
    build = pytest.importorskip("mobile_sam.build_sam", reason="pip install 'samfeat[mobile-sam]'").build_sam_vit_t
    torch.manual_seed(3)
    sam = build().eval()
    with torch.no_grad():
        for layer in (sam.mask_decoder.output_upscaling[0], sam.mask_decoder.output_upscaling[3]):
            layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight) * 6)  # smooth masks
    torch.save(sam.state_dict(), tmp_path / "random.pt")
    teacher = make_teacher("mobile_sam", checkpoint=tmp_path / "random.pt", device="cpu", options=FEW_PROMPTS)
    image = cv2.GaussianBlur(photograph(2, (150, 200)), (0, 0), 1)
    expected = plain(sam, image, **FEW_PROMPTS)
    (output,) = teacher(image[None])
    rows, columns = output.embedding.shape[1:]
    assert teacher.embedding_shape((150, 200)) == (256, 48, 64) == output.embedding.shape
    whole = expected.embedding[:, :rows, :columns]
    assert np.abs(output.embedding - whole).max() <= 1e-5 * np.abs(whole).max()
    assert (np.abs(output.edges.astype(int) - expected.edges) > 1).mean() <= 1e-4
    assert len(matched(output, expected.records, **FEW_PROMPTS)) >= 1
    again = teacher_of(Provenance(teacher.provenance(), {}, {}, 0), checkpoint=tmp_path / "random.pt")
    (repeated,) = again(image[None])
    np.testing.assert_array_equal(repeated.embedding, output.embedding)


@pytest.mark.slow
def test_a_random_vit_b_teaches_what_the_original_says() -> None:
    image = cv2.GaussianBlur(photograph(2, (300, 400)), (0, 0), 3)
    seen = compare(
        random_sam("vit_b", image, prompts_per_side=6),
        image,
        at_least=100,
        points_per_side=12,
        pred_iou_thresh=0.8,
        stability_score_thresh=0.5,
        box_nms_thresh=0.98,
        edge_points_per_side=6,
    )
    print(seen)
