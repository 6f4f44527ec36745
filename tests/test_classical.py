"""The teacher without weights: masks, groups, edges and embedding of known images, and of human segmentations."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import loadmat
from scipy.stats import rankdata
from segment_anything.utils.transforms import ResizeLongestSide

from samfeat.teacher_cache.schema import MASK_COLUMNS, TeacherOutput
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher
from samfeat.teacher_cache.teachers.regions import RegionParameters, RegionTree, boundary_strength, measure, region_tree

BSDS = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data")) / "edges/bsds500_val50"
PREDICTED_IOU, STABILITY = MASK_COLUMNS.index("predicted_iou"), MASK_COLUMNS.index("stability_score")


def scene(height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """A red disc and a blue box on a grey ground, with a little noise; and the label of every pixel."""
    labels = np.zeros((height, width), np.uint8)
    cv2.circle(labels, (width // 4, height // 2), height // 5, 1, -1)
    cv2.rectangle(labels, (width // 2, height // 4), (width * 7 // 8, height * 3 // 4), 2, -1)
    colours = np.array([[120, 120, 120], [200, 60, 50], [40, 60, 190]])
    noise = np.random.default_rng(0).normal(0, 3, (height, width, 3))
    return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels


def teach(image: np.ndarray) -> TeacherOutput:
    return ClassicalTeacher()(image[None])[0]


def cosines(embedding: np.ndarray) -> np.ndarray:
    cells = embedding.reshape(len(embedding), -1).T.astype(np.float64)
    cells /= np.linalg.norm(cells, axis=1, keepdims=True)
    return cells @ cells.T


def label_of_cells(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Label at the centre of each cell, as ``TeacherOutput`` defines the centre."""
    y = np.rint((np.arange(shape[0]) + 0.5) * labels.shape[0] / shape[0] - 0.5).astype(int)
    x = np.rint((np.arange(shape[1]) + 0.5) * labels.shape[1] / shape[1] - 0.5).astype(int)
    return labels[y[:, None], x].ravel()


def away_from_borders(labels: np.ndarray, distance: int) -> np.ndarray:
    box = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    return cv2.dilate(labels, box) == cv2.erode(labels, box)


def test_each_object_is_a_mask_and_a_group() -> None:
    image, labels = scene()
    output = teach(image)
    inner = away_from_borders(labels, 4)
    found = []
    for label in (1, 2):
        truth = labels == label
        overlap = (output.masks.stack & truth).sum((1, 2)) / (output.masks.stack | truth).sum((1, 2))
        assert overlap.max() > 0.9
        groups = np.unique(output.groups[truth & inner])
        assert len(groups) == 1
        assert groups[0] > 0
        found.append(groups[0])
    assert len({*found, *np.unique(output.groups[(labels == 0) & inner])}) >= 3


def test_edges_lie_on_the_outlines() -> None:
    image, labels = scene()
    edges = teach(image).edges
    outline = (cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0).astype(np.uint8)
    nearest = cv2.dilate(edges, np.ones((3, 3), np.uint8))
    assert np.percentile(nearest[outline > 0], 5) > 150
    assert edges[away_from_borders(labels, 6)].mean() < 10
    assert np.percentile(edges[away_from_borders(labels, 6)], 95) < 40


def test_cells_of_one_object_are_alike() -> None:
    image, labels = scene()
    embedding = teach(image).embedding
    cosine, label = cosines(embedding), label_of_cells(labels, embedding.shape[1:])
    same = label[:, None] == label[None]
    assert cosine[same].mean() > cosine[~same].mean() + 0.8


def test_masks_overlap_at_several_scales() -> None:
    """A box of two halves on a ground: the halves and the box are all masks."""
    image = np.full((120, 160, 3), 230, np.uint8)
    image[30:90, 40:80], image[30:90, 80:120] = (30, 30, 120), (30, 90, 150)
    stack = teach(image).masks.stack
    for x0, x1 in ((40, 80), (80, 120), (40, 120)):
        truth = np.zeros((120, 160), bool)
        truth[30:90, x0:x1] = True
        assert ((stack & truth).sum((1, 2)) / (stack | truth).sum((1, 2))).max() > 0.9


def test_the_mask_table_agrees_with_the_masks() -> None:
    masks = teach(scene()[0]).masks
    assert len(masks.stack) == len(masks.table) >= 3
    assert np.array_equal(masks.table[:, 0], masks.stack.sum((1, 2)))
    assert (np.diff(masks.table[:, 0]) <= 0).all()
    assert (masks.table[:, [PREDICTED_IOU, STABILITY]] >= 0).all()
    assert (masks.table[:, [PREDICTED_IOU, STABILITY]] <= 1).all()
    flat = masks.stack.reshape(len(masks.stack), -1).astype(float)
    shared = flat @ flat.T
    overlap = shared / (flat.sum(1)[:, None] + flat.sum(1)[None] - shared)
    assert (overlap[~np.eye(len(flat), dtype=bool)] <= ClassicalTeacher().max_iou).all()


@pytest.mark.parametrize("size", [(400, 400), (300, 400), (401, 233), (10, 640), (683, 1024), (3, 2), (1, 1)])
def test_embedding_shape_is_sams_without_padding(size: tuple[int, int]) -> None:
    height, width = ResizeLongestSide.get_preprocess_shape(*size, 1024)
    expected = (256, max(1, int(height / 16 + 0.5)), max(1, int(width / 16 + 0.5)))
    assert ClassicalTeacher().embedding_shape(size) == expected


@pytest.mark.parametrize("size", [(90, 120), (121, 67), (5, 40), (2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize("flat", [True, False])
def test_any_size_gives_finite_targets_of_the_promised_shapes(size: tuple[int, int], flat: bool) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*size, 3))
    output = teach(np.full((*size, 3), 77, np.uint8) if flat else noise.astype(np.uint8))
    assert output.embedding.shape == ClassicalTeacher().embedding_shape(size)
    assert output.embedding.dtype == np.float32
    assert np.isfinite(cosines(output.embedding)).all()
    assert output.masks.stack.shape[1:] == output.groups.shape == output.edges.shape == size
    assert (output.groups.dtype, output.edges.dtype) == (np.uint16, np.uint8)
    if flat:
        assert not len(output.masks.stack)
        assert not output.edges.any()
        assert not output.groups.any()


def test_threads_and_repeats_agree_to_the_bit() -> None:
    images = np.stack([scene()[0], scene()[0][::-1]])
    teacher = ClassicalTeacher()
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(teacher, [images] * 4))
    for output in runs[1:]:
        for one, other in zip(runs[0], output):
            for name in ("embedding", "groups", "edges"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
            assert np.array_equal(one.masks.stack, other.masks.stack)
            assert np.array_equal(one.masks.table, other.masks.table)


@pytest.mark.parametrize(
    "images", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 0, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        ClassicalTeacher()(images)


def test_provenance_is_json_and_tells_every_parameter() -> None:
    described = ClassicalTeacher(max_iou=0.5, regions=RegionParameters(bins=7)).provenance()
    assert json.loads(json.dumps(described))["parameters"]["regions"]["bins"] == 7
    assert described["name"] == "classical"
    assert "no learned weights" in described["kind"]
    assert described["version"] >= 1
    assert described["parameters"]["max_iou"] == 0.5


def tree_of(image: np.ndarray) -> RegionTree:
    parameters = RegionParameters()
    cues = measure(image, parameters)
    return region_tree(boundary_strength(cues, parameters), cues.lab, np.ones(3), parameters)


def test_a_tree_is_a_tree() -> None:
    tree = tree_of(scene()[0])
    count = len(tree.parent)
    assert count == 2 * tree.leaves - 1 == 2 * (tree.labels.max() + 1) - 1
    assert (tree.parent[:-1] > np.arange(count - 1)).all()
    assert tree.parent[-1] == count - 1
    assert np.array_equal(np.bincount(tree.parent[:-1], minlength=count)[tree.leaves :], np.full(tree.leaves - 1, 2))
    assert (tree.height[tree.parent] >= tree.height).all()
    assert not tree.height[: tree.leaves].any()
    areas = np.bincount(tree.labels.ravel(), minlength=count)
    for region in range(count - 1):
        areas[tree.parent[region]] += areas[region]
    assert np.array_equal(areas, tree.area)
    assert areas[-1] == tree.labels.size


def test_the_strongest_boundary_is_the_last_to_go() -> None:
    """Three bands; the step between the first two is far weaker, so they are joined first."""
    image = np.zeros((60, 150, 3), np.uint8)
    image[:, :50], image[:, 50:100], image[:, 100:] = 100, 125, 240
    tree = tree_of(image)
    left, right = np.flatnonzero(tree.parent[:-1] == len(tree.parent) - 1)
    assert min(tree.area[left], tree.area[right]) == pytest.approx(50 * 60, rel=0.1)


@pytest.mark.real
@pytest.mark.skipif(not BSDS.is_dir(), reason=f"no human segmentations at {BSDS}: set SAMFEAT_DATA")
def test_cells_of_one_human_segment_are_alike() -> None:
    """Margin and ranking of the cosines over photographs that took no part in choosing the parameters."""
    margins, rankings = [], []
    for path in sorted((BSDS / "images").glob("*.jpg"))[25::5]:
        embedding = teach(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)).embedding
        chosen = np.random.default_rng(0).choice(embedding[0].size, 500, replace=False)
        pairs = np.triu_indices(len(chosen), 1)
        cosine = cosines(embedding)[np.ix_(chosen, chosen)][pairs]
        ranks = rankdata(cosine)
        for human in loadmat(BSDS / "groundTruth" / f"{path.stem}.mat")["groundTruth"][0]:
            label = label_of_cells(human["Segmentation"][0, 0], embedding.shape[1:])[chosen]
            same = (label[:, None] == label[None])[pairs]
            if same.all():
                continue
            margins.append(cosine[same].mean() - cosine[~same].mean())
            rankings.append((ranks[same].mean() - (same.sum() + 1) / 2) / (~same).sum())  # area under the ROC curve
    assert np.mean(margins) > 0.75
    assert np.mean(rankings) > 0.83
