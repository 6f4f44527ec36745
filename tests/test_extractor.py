"""SAMFeat against a plain re-statement of the released extraction, and with every kind of image."""

import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from reference_network import plain_maps

from samfeat import load_image
from samfeat.student import extractor
from samfeat.student.extractor import EXTRACTION_PRESETS, SAMFeat
from samfeat.student.inference import InferenceNetwork, Maps
from samfeat.student.matching import match
from samfeat.student.network import PRESETS, SAMFeatNetwork, network_preset
from samfeat.student.pixels import as_rgb

ROOT = Path(__file__).resolve().parents[1]


def photo(height=70, width=90, seed=0):
    """Smooth colours with some texture, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 12, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def lively():
    """A released network whose heat-map has peaks around the threshold of 0.9 and below."""
    network = SAMFeatNetwork(network_preset("released"), generator=torch.Generator().manual_seed(5)).eval()
    with torch.no_grad():
        heat = network(torch.from_numpy(photo()).permute(2, 0, 1)[None] / 127.5 - 1).heatmap
        for k in (1, 2, 3, 4):
            head = network.get_submodule(f"heatmap{k}")
            head.weight.mul_(1.5 / heat.std())
            head.bias.copy_((head.bias - heat.mean()) * 1.5 / heat.std() + 0.5)
    return network


# --------------------------------------------------------------------- the released extraction, plainly written again


def plain_released(network, image, threshold=0.9):
    height, width = image.shape[:2]
    h, w = (int(np.round(n / 16) * 16) for n in (height, width))
    resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    with torch.no_grad():
        dense = network((torch.from_numpy(resized).float() / 255 * 2 - 1).permute(2, 0, 1)[None])
    heat, edges = dense.heatmap[0, 0].numpy(), cv2.resize(dense.edges[0, 0].numpy(), (w, h))
    probability = 1 / (1 + np.exp(-(heat + edges).astype(np.float64)))

    candidates = [(probability[y, x], x, y) for y in range(h) for x in range(w) if probability[y, x] >= threshold]
    taken = []
    for score, x, y in sorted(candidates, reverse=True):
        if all(max(abs(x - u), abs(y - v)) > 4 for _, u, v in taken):
            taken.append((score, x, y))
    taken = [(score, x, y) for score, x, y in taken if 4 <= x < w - 4 and 4 <= y < h - 4]

    keypoints, scores, descriptors = [], [], []
    for score, x, y in taken:
        feature = bilinear(dense.descriptors[0].numpy(), x / (w - 1), y / (h - 1))
        attention = bilinear(dense.attention[0].numpy(), x / (w - 1), y / (h - 1))
        keypoints.append((x * width / w, y * height / h))
        scores.append(score)
        descriptors.append(attention * feature / np.sqrt((feature**2).sum()))
    return np.array(keypoints), np.array(scores), np.array(descriptors)


def bilinear(maps, u, v):
    """Value at (u, v) in [0, 1], whose ends are the outer edges of the first and the last cell."""
    _, rows, columns = maps.shape
    x, y = u * columns - 0.5, v * rows - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - x0, y - y0
    top = (1 - fx) * maps[:, y0, x0] + fx * maps[:, y0, x0 + 1]
    bottom = (1 - fx) * maps[:, y0 + 1, x0] + fx * maps[:, y0 + 1, x0 + 1]
    return (1 - fy) * top + fy * bottom


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (88, 72), (104, 57)])  # 88 and 72 are half-way: to even
def test_released_preset_equals_the_plain_restatement(lively, size):
    image = photo(*size, seed=sum(size))
    keypoints, scores, descriptors = plain_released(lively, image)
    found = SAMFeat("released", network=lively).extract(image)
    assert len(keypoints) > 5
    np.testing.assert_allclose(found["keypoints"], keypoints, atol=1e-4)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-6)
    np.testing.assert_allclose(found["descriptors"], descriptors, atol=1e-5)
    assert found["image_size"].tolist() == [size[1], size[0]]


def test_result_types(lively):
    found = SAMFeat("released", network=lively).extract(photo())
    count = len(found["keypoints"])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
        "keypoints": (torch.float32, (count, 2)),
        "scores": (torch.float32, (count,)),
        "descriptors": (torch.float32, (count, 128)),
        "image_size": (torch.int64, (2,)),
    }
    assert (found["scores"].diff() <= 0).all()
    assert not found["descriptors"].requires_grad


@pytest.mark.parametrize("size", [(70, 90), (64, 96)])
def test_maps_are_those_that_keypoints_come_from(lively, size):
    image = photo(*size)
    student = SAMFeat("released", network=lively, edge_gain=0.7)
    maps = student.maps(image)
    pixels = torch.from_numpy(cv2.resize(image, (96, 64))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        dense = plain_maps(lively, pixels)
    gain = torch.nn.functional.interpolate(dense.edges, (64, 96), mode="bilinear")
    torch.testing.assert_close(maps["heatmap"], (dense.heatmap + 0.7 * gain).sigmoid()[0, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(maps["attention"], dense.attention[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps["edges"], dense.edges[0, 0], atol=1e-5, rtol=0)
    best = student.extract(photo(64, 96))
    x, y = best["keypoints"][0].round().long().tolist()
    assert student.maps(photo(64, 96))["heatmap"][y, x] == pytest.approx(best["scores"][0].item(), abs=1e-5)


def test_maps_of_tiny_images_are_refused(lively):
    with pytest.raises(ValueError, match="the image is too small: 7 x 90, minimum 16 x 16 pixels"):
        SAMFeat("released", network=lively).maps(photo(7, 90))


def test_a_small_image_is_scaled_up_and_its_keypoints_back(lively):
    found = SAMFeat("released", network=lively, detection_threshold=0.0, border=0).extract(photo(12, 30))
    assert len(found["keypoints"]) > 0
    assert (found["keypoints"].amax(dim=0) <= torch.tensor([29, 11])).all()
    assert found["image_size"].tolist() == [30, 12]


# ------------------------------------------------------------------------------------------------------------ options


def test_max_keypoints_keeps_the_best(lively):
    everything, few = (SAMFeat("released", network=lively, max_keypoints=n).extract(photo()) for n in (None, 5))
    assert len(everything["scores"]) > 5
    for name in ("keypoints", "scores", "descriptors"):
        np.testing.assert_allclose(few[name], everything[name][:5], atol=1e-6)  # sums of another order


def test_unit_descriptors_are_the_weighted_ones_without_their_length(lively):
    weighted, unit = (
        SAMFeat("released", network=lively, weighted_descriptors=w).extract(photo())["descriptors"]
        for w in (True, False)
    )
    np.testing.assert_allclose(unit.norm(dim=1), 1, atol=1e-5)
    np.testing.assert_allclose(weighted / weighted.norm(dim=1, keepdim=True), unit, atol=1e-5)
    assert weighted.norm(dim=1).std() > 1e-3


class Crafted(InferenceNetwork):
    """Says what it is told: a logit as a function of (x, y), edges of probability 0.5, positions as descriptors."""

    logit = None

    def forward(self, pixels):
        height, width = pixels.shape[1:3]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells = torch.stack(torch.meshgrid(torch.arange(height // 4), torch.arange(width // 4), indexing="ij"))
        features = torch.ones(1, self.conv_des.in_channels, height // 4, width // 4)
        features[0, :2] = cells.flip(0) * 4 + 1.5
        logits = self.logit(x.float(), y.float())[None] + 0.5 * self.edge_gain
        return Maps(logits, features, *torch.ones(2, 1, 1, height // 4, width // 4))


@pytest.fixture
def crafted(monkeypatch):
    """An extractor whose folded network is crafted, with descriptors that are its first 128 features."""

    def build(logit, **options):
        monkeypatch.setattr(extractor, "InferenceNetwork", type("", (Crafted,), {"logit": staticmethod(logit)}))
        network = SAMFeatNetwork(network_preset("default"))
        with torch.no_grad():
            torch.nn.init.dirac_(network.conv_des.weight)
            network.conv_des.bias.zero_()
        return SAMFeat(network=network, **options)

    return build


def peak(x, y):
    return 3 - 0.2 * ((x - 40.3) ** 2 + (y - 29.6) ** 2)


def test_subpixel_keypoint_lies_on_the_peak_and_takes_its_descriptor_from_there(crafted):
    found = crafted(peak, nms_radius=4, detection_threshold=0.5).extract(photo(64, 96))
    np.testing.assert_allclose(found["keypoints"], [[40.3, 29.6]], atol=1e-3)
    descriptor = found["descriptors"][0]
    np.testing.assert_allclose(descriptor[:2] / descriptor[2], [40.3, 29.6], atol=1e-3)
    coarse = crafted(peak, nms_radius=4, detection_threshold=0.5, subpixel=False).extract(photo(64, 96))
    assert coarse["keypoints"].tolist() == [[40.0, 30.0]]


def test_keypoints_are_mapped_back_by_pixel_centres(crafted):
    found = crafted(peak, nms_radius=4, detection_threshold=0.5).extract(photo(68, 100))  # seen as 64 x 96
    expected = [(40.3 + 0.5) * 100 / 96 - 0.5, (29.6 + 0.5) * 68 / 64 - 0.5]
    np.testing.assert_allclose(found["keypoints"], [expected], atol=1e-3)


def test_edge_gain_reaches_the_network(crafted):
    for gain in (0.0, 1.0, 3.0):
        model = crafted(peak, edge_gain=gain, detection_threshold=0.5, subpixel=False)
        expected = torch.sigmoid(peak(torch.tensor([40.0]), torch.tensor([30.0])) + 0.5 * gain)
        np.testing.assert_allclose(model.extract(photo(64, 96))["scores"][:1], expected, rtol=1e-6)


def test_multiscale_joins_the_levels_of_a_pyramid(lively):
    single = SAMFeat("released", network=lively, max_keypoints=None)
    image = level = photo(80, 104)
    keypoints, scores = [], []
    for k in range(7):  # 2^(-6/4) = 0.35, 2^(-7/4) = 0.297 < 0.3
        if k:
            size = round(104 * 2 ** (-k / 4)), round(80 * 2 ** (-k / 4))
            level = cv2.resize(level, size, interpolation=cv2.INTER_LINEAR)
        found = single.extract(level)
        keypoints.append(found["keypoints"].numpy() * (104 / level.shape[1], 80 / level.shape[0]))
        scores.append(found["scores"].numpy())
    best = np.argsort(-np.concatenate(scores), kind="stable")[:50]
    found = SAMFeat("released", network=lively, multiscale=True, max_keypoints=50).extract(image)
    assert sum(len(s) > 0 for s in scores) > 3
    np.testing.assert_allclose(found["scores"], np.concatenate(scores)[best], atol=1e-6)
    np.testing.assert_allclose(found["keypoints"], np.concatenate(keypoints)[best], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- images


def same(first, second, tolerance=0.0):
    return all(torch.allclose(first[name].float(), second[name].float(), rtol=0, atol=tolerance) for name in first)


@pytest.fixture(scope="module")
def model(lively):
    return SAMFeat("released", network=lively, detection_threshold=0.5)


def test_numpy_pil_and_torch_agree(model):
    image = photo()
    expected = model.extract(image)
    assert len(expected["keypoints"]) > 5
    planes = torch.from_numpy(image).permute(2, 0, 1)
    read_only = image.copy()
    read_only.flags.writeable = False
    exact = {
        "PIL": Image.fromarray(image),
        "torch uint8": planes,
        "opaque": np.dstack((image, np.full(image.shape[:2], 255, np.uint8))),
        "batch of one": planes[None],
        "strided": np.ascontiguousarray(image[:, ::-1])[:, ::-1],
        "read-only": read_only,
    }
    for name, other in exact.items():
        assert same(model.extract(other), expected), name
    np.testing.assert_array_equal(as_rgb(image), image)
    np.testing.assert_allclose(as_rgb(planes / 255), image, atol=1e-4)
    np.testing.assert_allclose(as_rgb(planes.half() / 255), image, atol=0.1)


def test_files_and_pictures_of_phones_are_read_alike(model, tmp_path):
    """EXIF orientation and transparency: the extractor sees what :func:`samfeat.load_image`, and a viewer, show."""
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored lying on its side, by 90 degrees anticlockwise
    Image.fromarray(np.rot90(image)).save(tmp_path / "phone.png", exif=exif)
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[:, 40:] = 0
    Image.fromarray(np.dstack((image, alpha))).save(tmp_path / "cut.png")
    cut = image.copy()
    cut[:, 40:] = 255
    for path, expected in ((tmp_path / "phone.png", image), (tmp_path / "cut.png", cut)):
        np.testing.assert_array_equal(load_image(path), expected)
        wanted = model.extract(expected)
        assert len(wanted["keypoints"]) > 3
        for form in (path, str(path), Image.open(path)):
            assert same(model.extract(form), wanted), path
    assert same(model.extract(np.dstack((image, alpha))), model.extract(cut))
    with pytest.raises(FileNotFoundError):
        model.extract(tmp_path / "absent.png")


def test_float_arrays_and_deep_pictures_are_scaled(model):
    grey = photo()[..., 0]
    np.testing.assert_allclose(as_rgb(grey / 255), np.dstack([grey] * 3), atol=1e-4)
    np.testing.assert_allclose(as_rgb(photo().astype(np.float32) / 255), photo(), atol=1e-4)
    half = as_rgb(np.dstack((photo() / 255, np.full(grey.shape, 0.5))))
    np.testing.assert_allclose(half, photo() / 2 + 127.5, atol=1e-3)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(grey.astype(np.uint16) * 257)), np.dstack([grey] * 3))


def test_a_batch_counts_as_a_list(model):
    planes = torch.stack([torch.from_numpy(photo(seed=k)).permute(2, 0, 1) for k in (1, 2)])
    for found, image in zip(model.extract(planes), planes, strict=True):
        assert same(found, model.extract(image))


def test_float_tensor_needing_no_resize_gives_the_same_features(model):
    image = photo(64, 96)
    assert same(model.extract(torch.from_numpy(image).permute(2, 0, 1) / 255), model.extract(image), 1e-3)


def test_grey_is_rgb_of_equal_channels(model):
    grey = photo()[..., 0]
    expected = model.extract(np.dstack([grey] * 3))
    assert len(expected["keypoints"]) > 0
    for other in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey)[None]):
        assert same(model.extract(other), expected)


def test_extraction_is_deterministic_and_leaves_the_image_alone(model):
    image = photo()
    copy = image.copy()
    assert same(model.extract(image), model(image))
    np.testing.assert_array_equal(image, copy)


def test_no_keypoints_is_a_normal_result(crafted):
    found = crafted(peak, detection_threshold=1.0).extract(photo())
    assert [tuple(found[name].shape) for name in ("keypoints", "scores", "descriptors")] == [(0, 2), (0,), (0, 128)]
    assert match(found, found)["matches"].shape == (0, 2)


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (300, 3)])
@pytest.mark.parametrize("multiscale", [False, True])
def test_tiny_images_have_no_keypoints(size, multiscale):
    found = SAMFeat("released", multiscale=multiscale).extract(np.zeros((*size, 3), np.uint8))
    assert found["keypoints"].shape == (0, 2)
    assert found["descriptors"].shape == (0, 128)
    assert found["image_size"].tolist() == [size[1], size[0]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "got int"),
        (np.full((20, 20, 3), 255.0), "divide 8-bit values by 255"),
        (np.full((20, 20, 3), np.nan), "must be finite"),
        (np.zeros((20, 20, 3), bool), "got numpy bool"),
        (np.zeros((20, 20, 3), np.uint16), "got numpy uint16"),
        (np.zeros((20, 20, 2), np.uint8), r"got \[20, 20, 2\]"),
        (np.zeros((1, 20, 20, 3), np.uint8), r"got \[1, 20, 20, 3\]"),
        (np.zeros((0, 20, 3), np.uint8), "empty: 0 x 20"),
        (torch.zeros(3, 20, 0), "empty: 20 x 0"),
        (torch.zeros(1, 4, 20, 20), r"one image.*got \[4, 20, 20\]"),
        (torch.zeros(0, 3, 20, 20), r"one image.*got \[0, 3, 20, 20\]"),
        (torch.zeros(20, 20, 3), r"one image.*got \[20, 20, 3\]"),
        (torch.zeros(3, 20, 20, dtype=torch.int64), "got torch.int64"),
        (torch.full((3, 20, 20), torch.nan), "must be finite"),
        (torch.full((3, 20, 20), 255.0), "divide 8-bit values by 255"),
        (torch.full((3, 20, 20), -0.1), r"lie in \[0, 1\]"),
        (Image.new("F", (20, 20)), "floating-point values"),
        (Image.new("RGB", (20, 0)), "empty: 0 x 20"),
    ],
)
def test_rejects_what_is_no_image(model, image, message):
    with pytest.raises(ValueError, match=message):
        model.extract(image)


# --------------------------------------------------------------------------------------- construction, weights, devices


def test_presets_of_network_and_extraction_go_together():
    assert PRESETS.keys() == EXTRACTION_PRESETS.keys()
    released = EXTRACTION_PRESETS["released"]
    assert (released.max_keypoints, released.detection_threshold, released.nms_radius) == (10_000, 0.9, 4)
    assert (released.border, released.edge_gain, released.weighted_descriptors) == (4, 1.0, True)
    assert not released.subpixel
    assert EXTRACTION_PRESETS["paper"].edge_gain == 0


def test_untrained_extractors_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second = SAMFeat(), SAMFeat()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert not first.training
    assert torch.equal(torch.rand(1), expected)


def test_an_extractor_without_weights_warns(lively):
    with pytest.warns(UserWarning, match="without weights is untrained"):
        SAMFeat()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAMFeat("released", network=lively)


@pytest.mark.parametrize(("name", "short"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32")])
def test_torch_names_of_precisions_are_accepted(lively, name, short):
    assert SAMFeat("released", network=lively, precision=name).extraction.precision == short


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "no preset 'best'"),
        ({"radius": 3}, "no option radius; the options are max_keypoints, detection_threshold"),
        ({"max_keypoints": 0}, "max_keypoints must be"),
        ({"detection_threshold": 1.5}, "detection_threshold must lie"),
        ({"max_keypoints": 10**12}, "max_keypoints must be"),
        ({"nms_radius": -1}, "nms_radius must be a whole number from 0"),
        ({"nms_radius": 1_000_000}, "nms_radius must be a whole number from 0"),
        ({"nms_radius": True}, "nms_radius must be a whole number"),
        ({"border": -1}, "border must be a whole number from 0"),
        ({"border": "4"}, "border must be a whole number"),
        ({"edge_gain": float("nan")}, "edge_gain must be a finite number"),
        ({"edge_gain": [1]}, "edge_gain must be a finite number"),
        ({"detection_threshold": None}, "detection_threshold must be a finite number"),
        ({"subpixel": 1}, "subpixel must be True or False"),
        ({"precision": ["fp32"]}, "precision must be one of"),
        ({"weights": "a", "network": SAMFeatNetwork(network_preset("default"))}, "not both"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        SAMFeat(**options)


def test_save_and_from_pretrained_keep_weights_options_and_provenance(tmp_path, lively):
    model = SAMFeat("released", network=lively, detection_threshold=0.7, max_keypoints=None)
    model.provenance = {"trained": "here"}
    model.save(tmp_path / "w.safetensors")
    again = SAMFeat.from_pretrained(tmp_path / "w.safetensors")
    assert again.extraction == model.extraction
    assert again.provenance == {"trained": "here"}
    assert same(again.extract(photo()), model.extract(photo()))
    assert SAMFeat.from_pretrained(tmp_path / "w.safetensors", border=9).extraction.border == 9
    with pytest.raises(ValueError, match="no option colour"):
        SAMFeat.from_pretrained(tmp_path / "w.safetensors", colour=1)


def test_weights_keep_the_options_of_the_preset(tmp_path, lively):
    SAMFeat("released", network=lively, detection_threshold=0.7).save(tmp_path / "w.safetensors")
    model = SAMFeat("released", weights=tmp_path / "w.safetensors", border=6)
    assert (model.extraction.detection_threshold, model.extraction.border) == (0.9, 6)
    assert torch.equal(model.network.conv_des.weight, lively.conv_des.weight)
    with pytest.raises(ValueError, match="another network than preset 'default'"):
        SAMFeat("default", weights=tmp_path / "w.safetensors")


def test_released_checkpoint_loads(tmp_path, lively):
    torch.save(lively.state_dict(), tmp_path / "model_29.pt")
    model = SAMFeat.from_pretrained(tmp_path / "model_29.pt")
    assert model.extraction == EXTRACTION_PRESETS["released"]
    assert same(model.extract(photo()), SAMFeat("released", network=lively).extract(photo()))


def test_half_precision_networks_extract(lively):
    image = photo(64, 96)
    exact = SAMFeat("released", network=lively, detection_threshold=0.5, weighted_descriptors=False).extract(image)
    network = SAMFeatNetwork(network_preset("released"))
    network.load_state_dict(lively.state_dict())
    model = SAMFeat("released", network=network, detection_threshold=0.5, weighted_descriptors=False).to(torch.bfloat16)
    rough = model.extract(image)
    assert rough["descriptors"].dtype == rough["keypoints"].dtype == rough["scores"].dtype == torch.float32
    distance = torch.cdist(rough["keypoints"], exact["keypoints"])
    common = distance.amin(dim=1) == 0
    assert common.float().mean() > 0.5
    cosine = (rough["descriptors"] * exact["descriptors"][distance.argmin(dim=1)]).sum(dim=1)
    assert cosine[common].min() > 0.99


# ---------------------------------------------------------------------------------------------------------- torch.hub


def test_torch_hub(tmp_path, lively):
    SAMFeat("released", network=lively).save(tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    model = torch.hub.load(str(ROOT), "samfeat", source="local", preset="released", weights=weights, max_keypoints=7)
    assert isinstance(model, SAMFeat)
    assert len(model.extract(photo())["keypoints"]) == 7


def test_hub_imports_the_package_from_its_own_folder_where_none_is_installed():
    program = (
        "import hubconf, sys; hubconf._import_from_here(); import samfeat.student; "
        "print(sys.modules['samfeat'].__file__); print(samfeat.student.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == [str(ROOT / "__init__.py"), str(ROOT / "student" / "__init__.py")]
