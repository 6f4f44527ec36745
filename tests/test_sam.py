"""SAM as a teacher, against segment_anything itself (real classes, toy size)."""

import copy
import hashlib
import inspect
import pickle
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torchvision.ops import box_iou

from samfeat.teacher_cache.schema import TeacherOutput
from samfeat.teacher_cache.teachers import sam as teacher_module
from samfeat.teacher_cache.teachers.checkpoints import CHECKPOINTS
from samfeat.teacher_cache.teachers.sam import SamParameters, SamTeacher, load_sam

SIZES = [(96, 96), (120, 90), (70, 110)]
GRID = {"points_per_side": 7, "pred_iou_thresh": 0.8, "stability_score_thresh": 0.15, "box_nms_thresh": 0.8}
DIGEST = "0" * 64


def image_of(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def toy_teacher(sam: Sam, **parameters) -> SamTeacher:
    return SamTeacher.from_sam(sam, model="toy", checkpoint_sha256=DIGEST, **{**GRID, **parameters})


@pytest.fixture(scope="module", params=SIZES, ids=str)
def taught(request: pytest.FixtureRequest, toy_sam: Sam) -> tuple[np.ndarray, TeacherOutput, int]:
    """An image, its targets, and the number of passes of the encoder that they took."""
    image = image_of(request.param)
    passes: list[int] = []
    hook = toy_sam.image_encoder.neck[1].register_forward_hook(lambda *_: passes.append(1))
    (output,) = toy_teacher(toy_sam, edge_points_per_side=6, points_per_batch=20, edge_border=0)(image[None])
    hook.remove()
    return image, output, len(passes)


def test_one_pass_of_the_encoder_serves_all(taught) -> None:
    assert taught[2] == 1


def test_embedding_is_that_of_the_predictor_without_padding(taught, toy_sam: Sam) -> None:
    image, output, _ = taught
    predictor = SamPredictor(toy_sam)
    predictor.set_image(image)
    whole = predictor.get_image_embedding()[0].numpy()
    rows, columns = output.embedding.shape[1:]
    assert output.embedding.dtype == np.float32
    assert np.abs(output.embedding - whole[:, :rows, :columns]).max() <= 1e-5 * np.abs(whole).max()
    # a cell is kept where at least half of it shows the image
    shown = [np.clip(side / 16 - np.arange(16), 0, 1) for side in predictor.input_size]
    assert (rows, columns) == tuple(int((part >= 0.5).sum()) for part in shown)


@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((400, 400), (16, 16)),
        ((400, 300), (16, 12)),
        ((300, 400), (12, 16)),
        ((1, 5000), (1, 16)),
        ((480, 640), (12, 16)),
    ],
)
def test_embedding_shape(toy_sam: Sam, size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert toy_teacher(toy_sam).embedding_shape(size) == (32, *cells)


def test_embedding_shape_is_that_of_the_output(taught, toy_sam: Sam) -> None:
    image, output, _ = taught
    assert toy_teacher(toy_sam).embedding_shape(image.shape[:2]) == output.embedding.shape


def test_masks_and_groups_are_those_of_the_automatic_generator(taught, toy_sam: Sam) -> None:
    image, output, _ = taught
    records = SamAutomaticMaskGenerator(toy_sam, **GRID, points_per_batch=20).generate(image)
    assert len(records) >= 3
    assert len({mask.tobytes() for mask in output.masks.stack}) == len(records) == len(output.masks.stack)
    by_iou = sorted(records, key=lambda record: min(record["predicted_iou"], 1))
    for k, record in zip(np.argsort(output.masks.table[:, 1], kind="stable"), by_iou):
        mask, row = output.masks.stack[k], output.masks.table[k]
        assert (mask != record["segmentation"]).mean() <= 1e-3
        left, top, width, height = record["bbox"]  # whose last pixel counts as the end of the box
        scores = [mask.sum(), min(record["predicted_iou"], 1), record["stability_score"]]
        np.testing.assert_allclose(row[:3], scores, rtol=1e-3)
        np.testing.assert_allclose(row[3:], [left, top, width + 1, height + 1], atol=1)
    painted = np.zeros(image.shape[:2])
    for k in np.argsort([-mask.sum() for mask in output.masks.stack], kind="stable"):
        painted[output.masks.stack[k]] = k + 1
    assert len(np.unique(painted)) > 2
    np.testing.assert_array_equal(output.groups, painted)


def greedy_nms(masks: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Indices that stay, best first; one box after the other."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks):
        if mask.any():
            y, x = torch.nonzero(mask, as_tuple=True)
            box[:] = torch.stack([x.min(), y.min(), x.max(), y.max()])
    kept: list[int] = []
    for k in torch.argsort(scores, descending=True, stable=True).tolist():
        overlaps = box_iou(boxes[[k]], boxes[kept])[0] if kept else torch.zeros(0)
        if not (overlaps > threshold).any():
            kept.append(k)
    return kept


def test_edges_are_those_of_the_recipe(taught, toy_sam: Sam) -> None:
    image, output, _ = taught
    height, width = image.shape[:2]
    predictor = SamPredictor(toy_sam)
    predictor.set_image(image)
    logits, scores = [], []
    batch: list[tuple[torch.Tensor, torch.Tensor]] = []
    points = [((i + 0.5) / 6 * width, (j + 0.5) / 6 * height) for j in range(6) for i in range(6)]
    for number, point in enumerate(points, start=1):  # one prompt at a time, against batches of 20
        found, quality, _ = predictor.predict(np.array([point]), np.array([1]), return_logits=True)
        batch.append((torch.from_numpy(found), torch.from_numpy(quality)))
        if number % 20 == 0 or number == len(points):
            values, qualities = torch.cat([b[0] for b in batch]), torch.cat([b[1] for b in batch])
            kept = greedy_nms(values > 0, qualities, GRID["box_nms_thresh"])
            logits.append(values[kept])
            scores.append(qualities[kept])
            batch = []
    values, qualities = torch.cat(logits), torch.cat(scores)
    values = values[greedy_nms(values > 0, qualities, GRID["box_nms_thresh"])].double().numpy()
    assert len(values) >= 3

    strength = np.zeros((height, width))
    for value in values:
        probability, mask = 1 / (1 + np.exp(-value)), (value > 0).astype(float)
        gradient = np.hypot(*(ndimage.sobel(probability, axis, mode="constant") for axis in (0, 1)))
        ring = np.hypot(*(ndimage.sobel(mask, axis, mode="constant") for axis in (0, 1))) > 0
        strength = np.maximum(strength, gradient * ring)
    strength = (strength - strength.min()) / (strength.max() - strength.min())
    expected = cv2.GaussianBlur(strength, (3, 3), 0) * 255
    assert output.edges.dtype == np.uint8
    assert output.edges.max() > 60
    assert np.abs(output.edges - expected).max() < 0.51  # rounding


def test_the_finish_of_the_edges_is_a_parameter(toy_sam: Sam) -> None:
    parameters = {"points_per_side": 1, "edge_points_per_side": 3, "edge_style": "binary"}
    edges = toy_teacher(toy_sam, **parameters)(image_of((60, 60))[None])[0].edges
    assert np.unique(edges).tolist() == [0, 255]


def test_a_batch_is_its_images_one_by_one(toy_sam: Sam) -> None:
    images = np.stack([image_of((64, 48), seed) for seed in range(3)])
    teacher = toy_teacher(toy_sam, points_per_side=3, edge_points_per_side=3)
    for image, output in zip(images, teacher(images)):
        (alone,) = toy_teacher(toy_sam, points_per_side=3, edge_points_per_side=3)(image[None])
        assert_same(output, alone)
    assert teacher(images[:0]) == []


def assert_same(one: TeacherOutput, other: TeacherOutput) -> None:
    np.testing.assert_array_equal(one.embedding, other.embedding)
    np.testing.assert_array_equal(one.groups, other.groups)
    np.testing.assert_array_equal(one.edges, other.edges)
    np.testing.assert_array_equal(one.masks.table, other.masks.table)


def test_threads_do_not_see_each_other(toy_sam: Sam) -> None:
    images = np.stack([image_of((48, 64), seed) for seed in range(4)])
    teacher = toy_teacher(toy_sam, points_per_side=2, edge_points_per_side=2)
    expected = teacher(images)
    results: dict[int, TeacherOutput] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.__setitem__(k, teacher(images[k : k + 1])[0])) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert_same(results[k], expected[k])


def test_a_copy_in_another_process_teaches_the_same(toy_sam: Sam) -> None:
    teacher = toy_teacher(toy_sam, points_per_side=2, edge_points_per_side=2, precision="bfloat16")
    copied = pickle.loads(pickle.dumps(teacher))
    image = image_of((48, 64))[None]
    assert copied.provenance() == teacher.provenance()
    assert_same(copied(image)[0], teacher(image)[0])


def test_half_precision_is_that_of_the_encoder_alone(toy_sam: Sam) -> None:
    image, parameters = image_of((60, 60))[None], {"points_per_side": 3, "edge_points_per_side": 2}
    (exact,) = toy_teacher(toy_sam, **parameters)(image)
    (half,) = toy_teacher(toy_sam, precision="bfloat16", **parameters)(image)
    difference = np.abs(half.embedding - exact.embedding).max() / np.abs(exact.embedding).max()
    assert 1e-4 < difference < 0.05
    assert half.embedding.dtype == np.float32
    assert (half.groups == exact.groups).mean() > 0.9


def test_without_masks_all_is_empty_but_the_embedding(toy_sam: Sam) -> None:
    (output,) = toy_teacher(toy_sam, stability_score_thresh=1.0, points_per_side=2, edge_points_per_side=1)(
        image_of((40, 60))[None]
    )
    assert output.masks.stack.shape == (0, 40, 60)
    assert output.masks.table.shape == (0, 7)
    assert output.groups.max() == 0
    assert np.isfinite(output.embedding).all()


@pytest.mark.parametrize(
    "images", [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1), np.uint8), np.zeros((1, 4, 4, 3), np.float32)]
)
def test_only_batches_of_rgb_bytes_are_images(toy_sam: Sam, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        toy_teacher(toy_sam)(images)


def test_provenance_names_every_parameter(toy_sam: Sam) -> None:
    provenance = toy_teacher(toy_sam, edge_style="thinned").provenance()
    assert provenance["name"] == "sam"
    assert provenance["model"] == "toy"
    assert provenance["checkpoint_sha256"] == DIGEST
    assert provenance["precision"] == "float32"
    assert provenance["edge_style"] == "thinned"
    assert SamParameters.__dataclass_fields__.keys() <= provenance.keys()


def test_defaults_are_those_of_the_generator() -> None:
    theirs = inspect.signature(SamAutomaticMaskGenerator).parameters
    ours = SamParameters()
    for name in SamParameters.__dataclass_fields__.keys() & theirs.keys():
        assert getattr(ours, name) == theirs[name].default
    assert (ours.edge_points_per_side, ours.points_per_batch, ours.edge_blur) == (16, 64, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"points_per_side": 0}, {"box_nms_thresh": 1.5}, {"edge_blur": 2}, {"edge_style": "canny"}, {"edge_border": -1}],
    ids=str,
)
def test_parameters_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"got '?\S+'?$"):
        SamParameters(**wrong)


@pytest.fixture
def toy_as_vit_b(toy_sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy network under an official name: what loads is then small."""
    monkeypatch.setitem(sam_model_registry, "vit_b", lambda: copy.deepcopy(toy_sam))
    monkeypatch.setattr(teacher_module, "_model_of", lambda state: "vit_b")


def test_loading_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"https://.*vit_l_0b3195\.pth.*--checkpoint"):
        SamTeacher("vit_l", checkpoint=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="vit_h, vit_l, vit_b"):
        SamTeacher("vit_x", checkpoint=tmp_path / "absent.pth")


def test_a_damaged_official_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINTS["vit_b"].name
    path.write_bytes(b"half of it")
    with pytest.raises(ValueError, match="is damaged: its sha256"):
        load_sam(path, model="vit_b")


class Payload:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"image_encoder.patch_embed.proj.weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="weights alone"):
            load_sam(tmp_path / name, model="vit_b")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"nested": torch.zeros(1)}}, "no state dict"),
        ([torch.zeros(1)], "no state dict"),
        ({"image_encoder.layers.0.weight": torch.zeros(3)}, "no SAM of a known size, not vit_b"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(1280, 3, 16, 16)}, "holds vit_h, not vit_b"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}, "holds vit_l, not vit_b"),
    ],
    ids=["nested", "list", "foreign", "vit_h", "vit_l"],
)
def test_other_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_sam(tmp_path / "other.pth", model="vit_b")
    assert "\n" not in str(error.value)


def test_rubbish_is_no_checkpoint(tmp_path: Path) -> None:
    for content in (b"", b"rubbish", b"PK\x03\x04 half a zip"):
        (tmp_path / "rubbish.pth").write_bytes(content)
        with pytest.raises(ValueError, match="weights alone"):
            load_sam(tmp_path / "rubbish.pth", model="vit_b")


@pytest.mark.usefixtures("toy_as_vit_b")
def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path, toy_sam: Sam) -> None:
    state = dict(toy_sam.state_dict())
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"does not fit vit_b: .*iou_token") as error:
        load_sam(tmp_path / "partial.pth", model="vit_b")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("toy_as_vit_b")
def test_a_loaded_teacher_travels_as_the_way_to_load_it(tmp_path: Path, toy_sam: Sam) -> None:
    path = tmp_path / "toy.pth"
    torch.save(toy_sam.state_dict(), path)
    parameters = {**GRID, "points_per_side": 2, "edge_points_per_side": 2}
    loaded = SamTeacher("vit_b", checkpoint=path, device="cpu", **parameters)
    packed = pickle.dumps(loaded)
    assert len(packed) < 2000
    image = image_of((50, 60))[None]
    arrived = pickle.loads(packed)
    assert arrived.provenance() == loaded.provenance()
    assert_same(arrived(image)[0], loaded(image)[0])
    state = dict(toy_sam.state_dict())
    state["mask_decoder.iou_token.weight"] = state["mask_decoder.iou_token.weight"] + 1
    torch.save(state, path)
    with pytest.raises(ValueError, match="makes another teacher here"):
        pickle.loads(packed)


@pytest.mark.usefixtures("toy_as_vit_b")
def test_a_loaded_teacher_is_the_built_one(tmp_path: Path, toy_sam: Sam) -> None:
    path = tmp_path / "toy.pth"
    torch.save(toy_sam.state_dict(), path)
    parameters = {**GRID, "points_per_side": 2, "edge_points_per_side": 2}
    loaded = SamTeacher("vit_b", checkpoint=path, device="cpu", **parameters)
    image = image_of((50, 60))[None]
    assert_same(loaded(image)[0], toy_teacher(toy_sam, **parameters)(image)[0])
    assert loaded.provenance()["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.provenance()["model"] == "vit_b"


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for device, message in [(f"cuda:{torch.cuda.device_count()}", "no device"), ("tpu", "auto, cpu, cuda")]:
        with pytest.raises(ValueError, match=message):
            SamTeacher("vit_b", checkpoint=tmp_path / "absent.pth", device=device)


@pytest.mark.slow
def test_the_real_vit_b_loads_and_is_not_taken_for_another(tmp_path: Path) -> None:
    sam = sam_model_registry["vit_b"]()
    path = tmp_path / "random_vit_b.pth"
    torch.save(sam.state_dict(), path)
    loaded, digest = load_sam(path, model="vit_b")
    assert loaded.state_dict().keys() == sam.state_dict().keys()
    assert all(torch.equal(value, sam.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="holds vit_b, not vit_l"):
        load_sam(path, model="vit_l")
    teacher = SamTeacher.from_sam(loaded, model="vit_b", checkpoint_sha256=digest)
    assert teacher.embedding_shape((400, 400)) == (256, 64, 64)
    assert teacher.embedding_shape((400, 300)) == (256, 64, 48)
    assert teacher.embedding_shape((400, 301)) == (256, 64, 48)
    assert teacher.embedding_shape((375, 500)) == (256, 48, 64)
