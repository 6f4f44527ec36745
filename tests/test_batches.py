"""Training batches: what is read is what was stored, and synthetic views agree with their geometry."""

from __future__ import annotations

import dataclasses
import types

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from toys import SIZE, toy_store

import samfeat.pipelines.training.batches as batches
from samfeat.pipelines.config import DataConfig
from samfeat.pipelines.homography import ViewConfig
from samfeat.pipelines.training.batches import groups_at, make_batch, strongest_nearby
from samfeat.pipelines.training.loader import (
    BatchPart,
    FromDisk,
    InMemory,
    Item,
    RawBatch,
    batch_memory,
    descriptor_points,
    epoch_batches,
    first_items,
    item_generators,
    list_items,
    read_ahead,
    read_batch,
)
from samfeat.teacher_cache.schema import POINTS
from samfeat.teacher_cache.store import TeacherCache

QUIET = DataConfig(photometric_probability=0.0)
REAL, SYNTHETIC = Item(0, "real", 1), Item(0, "synthetic", 2)


@pytest.fixture(scope="module")
def store(toy_cache):
    return TeacherCache.open(toy_cache / "a.zarr")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw_batch(store, *items: Item, data: DataConfig = QUIET, seed: int = 0) -> RawBatch:
    return read_batch(FromDisk([store]), items, data, item_generators(seed, 0, BatchPart(0, len(items), len(items))))


def test_every_pair_is_an_item_of_both_kinds_and_failures_and_held_out_are_none(tmp_path):
    store = toy_store(tmp_path / "a.zarr", 5, broken=(3,))
    items = list_items([store], DataConfig(), held_out={(0, 0)})
    assert items == [Item(0, kind, k) for k in (1, 2, 4) for kind in ("real", "synthetic")]
    assert list_items([store], DataConfig(real_pairs=False), set()) == [Item(0, "synthetic", k) for k in (0, 1, 2, 4)]
    photos = toy_store(tmp_path / "b.zarr", 3, paired=False, shard_images=2)
    assert list_items([store, photos], DataConfig(), {(1, 0)})[-2:] == [
        Item(1, "synthetic", 1),
        Item(1, "synthetic", 2),
    ]


def test_an_epoch_takes_every_item_once_in_an_order_of_its_own():
    items = [Item(0, "real", k) for k in range(10)]
    first, second = (epoch_batches(items, 3, epoch, seed=1) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [3, 3, 3]
    assert len({item.index for batch in first for item in batch}) == 9
    assert first != second
    assert first == epoch_batches(items, 3, 0, seed=1)
    assert first != epoch_batches(items, 3, 0, seed=2)


def test_real_items_are_the_stored_pair(store):
    raw = raw_batch(store, REAL, SYNTHETIC)
    pair = store.pair(1)
    for side in (0, 1):
        targets, row = store[pair.images[side]], raw.sides[side, 0]
        np.testing.assert_array_equal(raw.images[row], targets.image)
        np.testing.assert_array_equal(raw.embedding[row], targets.embedding)
        np.testing.assert_array_equal(raw.embedding_scale[row], targets.embedding_scale)
        np.testing.assert_array_equal(raw.groups[row], targets.groups)
        np.testing.assert_array_equal(raw.edges[row], targets.edges)
        count = len(targets.keypoints)
        np.testing.assert_array_equal(raw.keypoints[row, :count], targets.keypoints)
        assert raw.keypoint_mask[row].sum() == raw.keypoint_mask[row, :count].sum() == count
        np.testing.assert_array_equal(raw.points[side, 0], pair.points[side])
    np.testing.assert_array_equal(raw.valid[0], pair.valid)
    assert raw.synthetic.tolist() == [False, True]
    assert raw.sides.tolist() == [[0, 2], [1, 2]]  # three images: both sides of the synthetic item are the same
    assert len(raw.images) == 3


def test_only_labels_above_the_threshold_are_kept(store):
    scores = store[4].keypoints[:, 2]
    threshold = float(np.median(scores))
    raws = [
        raw_batch(store, SYNTHETIC, data=DataConfig(label_threshold=t), seed=seed)
        for t in (0, threshold)
        for seed in (0, 1)
    ]
    images = [int(4 + np.array_equal(raw.images[0], store[5].image)) for raw in raws]
    for raw, image, least in zip(raws, images, (0, 0, threshold, threshold)):
        kept = store[image].keypoints[store[image].keypoints[:, 2] >= least]
        np.testing.assert_array_equal(raw.keypoints[0][raw.keypoint_mask[0]], kept)


def test_real_pairs_pass_the_warp_unchanged(store):
    raw = raw_batch(store, REAL, SYNTHETIC)
    batch = make_batch(raw, QUIET, generator())
    right = 2 + 0
    torch.testing.assert_close(batch.images[right], raw.images[1].permute(2, 0, 1) / 127.5 - 1)
    embedding = torch.from_numpy(store.record(store.pair(1).images[1]).output.embedding)
    torch.testing.assert_close(batch.embedding[right], embedding)
    torch.testing.assert_close(batch.edges[right], raw.edges[1].float())
    assert batch.supervised[right].all()
    assert batch.label_mask[right].all()
    torch.testing.assert_close(batch.points[1, 0], raw.points[1, 0])


def test_synthetic_views_show_at_the_right_point_what_the_left_point_shows(store):
    raw = raw_batch(store, SYNTHETIC, SYNTHETIC, Item(0, "synthetic", 0))
    batch = make_batch(raw, QUIET, generator(3))
    count = 3
    for row in range(count):
        valid = batch.valid[row].numpy()
        left, right = (batch.points[side, row].numpy()[valid] for side in (0, 1))
        assert valid.sum() > 50
        homography, inliers = cv2.findHomography(left, right, cv2.RANSAC, 0.01)
        assert inliers.all()  # one homography explains every correspondence
        image = (raw.images[row].numpy()).astype(np.float32)
        expected = cv2.warpPerspective(image, homography, SIZE[::-1], flags=cv2.INTER_LINEAR)
        got = ((batch.images[count + row] + 1) * 127.5).permute(1, 2, 0).numpy()
        inside = cv2.erode(batch.label_mask[count + row].numpy(), np.ones((5, 5))) > 0
        assert np.abs(expected - got)[inside].mean() < 2  # cv2 rounds positions to 1/32 pixel
        groups = cv2.warpPerspective(
            raw.groups[row].numpy().astype(np.float32), homography, SIZE[::-1], flags=cv2.INTER_NEAREST
        )
        x, y = right.round().astype(int).T
        agree = batch.groups[count + row].numpy()[valid] == groups[y, x]
        assert agree.mean() > 0.97  # pixels on a border may fall on either side
        assert (batch.groups[count + row].numpy()[~valid] == -1).all()


def test_released_treatment_takes_the_targets_of_warped_views_away(store):
    data = dataclasses.replace(QUIET, warp_targets=False)
    raw = raw_batch(store, REAL, SYNTHETIC)
    batch = make_batch(raw, data, generator())
    assert batch.supervised[:2].all()
    assert batch.supervised[2].all()  # the real right view keeps its targets
    assert not batch.supervised[3].any()
    assert (batch.groups[3] == -1).all()
    copies = make_batch(raw, dataclasses.replace(data, identity_probability=1.0), generator())
    assert copies.supervised.all()  # exact copies keep them, too
    torch.testing.assert_close(copies.images[3], copies.images[1])
    torch.testing.assert_close(copies.points[1, 1], copies.points[0, 1])


def test_batches_repeat_by_seed_and_noise_stays_in_range(store):
    raw = raw_batch(store, REAL, SYNTHETIC)
    data = DataConfig(photometric_probability=1.0)
    first, second, other = (make_batch(raw, data, generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first.images, other.images)
    assert first.images.abs().max() <= 1
    assert not torch.equal(first.images[:2], make_batch(raw, QUIET, generator(5)).images[:2])


def test_descriptor_points_mix_labels_and_the_whole_image(store):
    targets = store[0]
    points = descriptor_points(targets.keypoints, SIZE, DataConfig(), np.random.default_rng(0))
    assert points.shape == (POINTS, 2)
    assert points.min() >= 0
    assert points.max() <= SIZE[0] - 1
    labels = {tuple(point) for point in targets.keypoints[:, :2]}
    assert sum(tuple(point) in labels for point in points) == min(len(labels), POINTS // 2)
    occupied = np.histogram2d(*points.T, bins=8, range=[[0, 63]] * 2)[0] > 0
    assert occupied.all()
    strict = descriptor_points(targets.keypoints, SIZE, DataConfig(label_threshold=2.0), np.random.default_rng(0))
    assert sum(tuple(point) in labels for point in strict) == 0


ITEMS = (REAL, SYNTHETIC, Item(0, "synthetic", 0), Item(0, "real", 3), Item(0, "synthetic", 5))


WINDOWS = dataclasses.replace(QUIET, views=ViewConfig(size=48, scale=2.0, mild=0.0))
EXTENT = np.array(SIZE[::-1]) - 1


def coordinates_as_content(raw: RawBatch) -> RawBatch:
    """The batch with images, groups and embeddings that say of every place which place of the crop it is."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    colours = np.stack([4 * x, 4 * y, 0 * x], axis=2).astype(np.uint8)
    cells = (8 * (y // 8) + x // 8 + 1).astype(np.int16)
    return raw._replace(
        images=torch.from_numpy(colours).expand(raw.images.shape).clone(),
        groups=torch.from_numpy(cells).expand(raw.groups.shape).clone(),
        edges=torch.from_numpy(colours[..., 0]).expand(raw.edges.shape).clone(),
    )


def shown_at(image: torch.Tensor, points: np.ndarray) -> np.ndarray:
    """(x, y) of the crop that a window [3, H, W] shows at points (x, y), by SciPy."""
    content = ((image[:2] + 1) * 127.5 / 4).numpy()
    return np.stack([map_coordinates(channel, points.T[::-1], order=1) for channel in content], axis=1)


@pytest.fixture
def windows(store, monkeypatch):
    """A batch of windows of a real, an aligned and two synthetic items, whose content says where it comes from."""
    monkeypatch.setattr(batches, "relight", lambda images, **_: images)
    items = (REAL, Item(0, "aligned", 3), SYNTHETIC, Item(0, "synthetic", 0))
    raw = coordinates_as_content(raw_batch(store, *items, data=WINDOWS))
    return raw, make_batch(raw, WINDOWS, generator(3))


def inner(places: np.ndarray) -> np.ndarray:
    """Whether places of the crop are so far inside that no blur has mixed in what is mirrored at its borders."""
    return ((places > 6) & (places < EXTENT - 6)).all(axis=-1)


def test_corresponding_points_of_two_windows_show_the_same_place(windows):
    raw, batch = windows
    assert raw.planar.tolist() == [False, True, True, True]
    for item in range(4):
        valid = batch.valid[item].numpy()
        left, right = (batch.points[side, item].numpy()[valid] for side in (0, 1))
        assert valid.sum() > 30
        assert min(left.min(), right.min()) >= 0
        assert max(left.max(), right.max()) <= 47
        shown = [shown_at(batch.images[side * 4 + item], points) for side, points in ((0, left), (1, right))]
        clear = inner(shown[0]) & inner(shown[1])
        assert clear.sum() > 10
        if item == 0:  # a stored pair: each window shows at the point what the store says
            for side in (0, 1):
                stored = raw.points[side, item].numpy()[valid]
                assert np.abs(shown[side] - stored)[clear].max() < 0.6
        else:
            assert np.abs(shown[0] - shown[1])[clear].max() < 0.6


def test_targets_of_windows_move_with_the_images(windows):
    raw, batch = windows
    rows = raw.sides.flatten()
    found = 0
    for view in range(8):
        points = batch.points.flatten(0, 1)[view].numpy()
        taken = batch.groups[view].numpy() >= 0
        shown = shown_at(batch.images[view], points.round())  # groups are read at the nearest pixel
        clear = taken & inner(shown) & (np.abs((shown + 0.5) % 8 - 4) < 3).all(axis=1)  # not on a border of two cells
        cells = 8 * (shown[:, 1].round() // 8) + shown[:, 0].round() // 8 + 1
        assert (batch.groups[view].numpy() == cells)[clear].all()
        assert (batch.groups[view].numpy()[~batch.valid.repeat(2, 1)[view].numpy()] == -1).all()

        on_image = ((batch.keypoints[view, :, :2] >= 0) & (batch.keypoints[view, :, :2] <= 47)).all(dim=1)
        kept = ((batch.keypoints[view, :, 2] > 0) & on_image).numpy()
        labels = batch.keypoints[view].numpy()[kept]
        origin = raw.keypoints[rows[view]].numpy()[kept]
        shown = shown_at(batch.images[view], labels[:, :2])
        assert np.abs(shown - origin[:, :2])[inner(origin[:, :2])].max(initial=0) < 0.6
        np.testing.assert_array_equal(labels[:, 2], origin[:, 2])
        pixels = labels[:, :2].round().astype(int)
        assert (batch.labels[view].numpy()[pixels[:, 1], pixels[:, 0]] == 1).all()
        found += kept.sum()

        seen = batch.supervised[view].numpy()
        red = ((batch.images[view, 0] + 1) * 127.5).numpy()
        deep = cv2.erode(seen.astype(np.uint8), np.ones((13, 13))) > 0
        assert np.abs(batch.edges[view].numpy() - red)[deep].max(initial=0) < 3
    assert found > 20


@pytest.mark.parametrize("data", [WINDOWS, QUIET], ids=["windows", "crops"])
def test_the_teacher_is_looked_up_where_points_lie_in_the_stored_crop(store, data):
    """An embedding that says where it is."""
    raw = raw_batch(store, REAL, SYNTHETIC, Item(0, "synthetic", 0), data=data)
    rows, columns = raw.embedding.shape[2:]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    embedding = torch.zeros_like(raw.embedding)
    embedding[:, 0], embedding[:, 1] = x, y
    batch = make_batch(
        raw._replace(embedding=embedding, embedding_scale=torch.ones(len(embedding), rows, columns)), data, generator(3)
    )
    side = raw.images.shape[1]
    for item in range(3):
        valid = batch.valid[item]
        assert valid.sum() > 20
        left, right = ((batch.taught[k * 3 + item, valid, :2] + 0.5) * side / rows - 0.5 for k in (0, 1))
        inner = ((left > 4) & (left < side - 5)).all(dim=1)  # towards its border an interpolated map is constant
        if item == 0:
            for k, places in enumerate((left, right)):
                inside = ((places > 4) & (places < side - 5)).all(dim=1)
                torch.testing.assert_close(places[inside], raw.points[k, 0][valid][inside], rtol=0, atol=1e-2)
        else:
            torch.testing.assert_close(left[inner], right[inner], rtol=0, atol=1e-2)


def test_images_of_one_fixed_camera_are_aligned_items_where_windows_are_used(store, monkeypatch):
    monkeypatch.setitem(store.provenance.source, "kind", "aligned")
    kinds = [item.kind for item in list_items([store], WINDOWS, set())]
    assert kinds == ["aligned", "synthetic"] * 6
    assert [item.kind for item in list_items([store], QUIET, set())] == ["real", "synthetic"] * 6


def test_the_strongest_of_crowded_keypoints_is_kept():
    rng = np.random.default_rng(0)
    keypoints = np.concatenate([rng.uniform(-3, 40, (2, 60, 2)), rng.uniform(0.1, 1, (2, 60, 1))], axis=2)
    got = strongest_nearby(torch.from_numpy(keypoints).float(), (30, 36), radius=2)
    for points, mine in zip(keypoints.astype(np.float32), got.numpy()):
        pixels = np.round(points[:, :2])
        inside = ((pixels >= 0) & (pixels < [36, 30])).all(axis=1)
        for k, (x, y, score) in enumerate(points):
            near = inside & (np.abs(pixels - np.round([x, y])) <= 2).all(axis=1)
            best = inside[k] and score >= points[near, 2].max()
            assert mine[k].tolist() == pytest.approx([x, y, score if best else 0])


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_several_processes_make_the_windows_of_one(store, processes):
    items = (*ITEMS[:4], Item(0, "aligned", 2))
    whole = make_batch(raw_batch(store, *items, data=WINDOWS), WINDOWS, generator(4), progress=0.1)
    for rank in range(processes):
        part = BatchPart.of(len(items), rank, processes)
        raw = read_batch(FromDisk([store]), items[part.start : part.stop], WINDOWS, item_generators(0, 0, part))
        batch = make_batch(raw, WINDOWS, generator(4), part, progress=0.1)
        own = torch.arange(part.start, part.stop)
        views = torch.cat([own, len(items) + own])
        for name, mine, other in zip(batch._fields, batch, whole):
            expected = other[:, own] if name == "points" else other[own if name == "valid" else views]
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_several_processes_make_the_batch_of_one(store, processes):
    data = DataConfig(photometric_probability=0.7)
    whole = make_batch(raw_batch(store, *ITEMS, data=data), data, generator(4))
    parts = [BatchPart.of(len(ITEMS), rank, processes) for rank in range(processes)]
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(len(ITEMS)))
    for part in parts:
        rngs = item_generators(0, 0, part)
        raw = read_batch(FromDisk([store]), ITEMS[part.start : part.stop], data, rngs)
        batch = make_batch(raw, data, generator(4), part)
        items = torch.arange(part.start, part.stop)
        views = torch.cat([items, len(ITEMS) + items])
        for name, own, other in zip(batch._fields, batch, whole):
            expected = other[:, items] if name == "points" else other[items if name == "valid" else views]
            torch.testing.assert_close(own, expected, rtol=0, atol=0, msg=name)


def test_a_copy_in_memory_gives_the_same_batches(store, tmp_path):
    photos = toy_store(tmp_path / "b.zarr", 3, paired=False, shard_images=2)
    seen = []
    source = InMemory([store, photos], torch.device("cpu"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(len(store) + 3, len(store) + 3)]
    items = [*ITEMS, Item(1, "synthetic", 2)]
    rngs = [item_generators(0, 0, BatchPart(0, len(items), len(items))) for _ in range(2)]
    expected = read_batch(FromDisk([store, photos]), items, QUIET, rngs[0])
    copied = read_batch(source, items, QUIET, rngs[1])
    for name, own, other in zip(expected._fields, copied, expected):
        kept = expected.keypoint_mask if name == "keypoints" else ...
        assert torch.equal(own[kept], other[kept]), name


def test_a_copy_that_does_not_fit_is_refused(store, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=100_000))
    with pytest.raises(ValueError, match=r"a copy of the stores takes .* leave it at none"):
        InMemory([store], torch.device("cpu"))


def test_memory_comes_round_again(store):
    memory = batch_memory(store, 4, 2)
    first, second, third = (next(memory) for _ in range(3))
    assert first.image is third.image
    assert first.image is not second.image
    assert len(first.image) == 4


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_first_items_are_a_batch_of_their_own(store, count):
    whole = raw_batch(store, *ITEMS)
    for name, own, other in zip(whole._fields, first_items(whole, count), raw_batch(store, *ITEMS[:count])):
        kept = first_items(whole, count).keypoint_mask if name == "keypoints" else ...
        assert torch.equal(own[kept], other[kept]), name


def test_groups_at_reads_the_nearest_pixel():
    groups = torch.arange(12).view(1, 3, 4)
    points = torch.tensor([[[0.0, 0.0], [2.6, 1.4], [3.4, 2.2], [-5.0, 9.0]]])
    assert groups_at(groups, points).tolist() == [[0, 7, 11, 8]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_read_ahead_keeps_the_order(workers):
    requests = [lambda k=k: k for k in range(20)]
    assert list(read_ahead(requests, workers)) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_read_ahead_hands_errors_on(workers):
    def broken():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(read_ahead([lambda: 1, broken, lambda: 2], workers))
