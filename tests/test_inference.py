"""The folded network and the extractor on top of it against the plain network and the plain extraction."""

import warnings

import cv2
import numpy as np
import pytest
import torch
from reference_network import plain_extract, plain_maps
from torch.nn import functional as F

from samfeat.student import inference
from samfeat.student.extractor import EXTRACTION_PRESETS, SAMFeat
from samfeat.student.inference import InferenceNetwork
from samfeat.student.network import PRESETS, NetworkConfig, SAMFeatNetwork, network_preset


def build(preset="released", seed=0, **changes):
    config = NetworkConfig(**(vars(network_preset(preset)) | changes))
    network = SAMFeatNetwork(config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():  # lively edges and heat-map, so that what they do shows
        network.conv_edg.weight.mul_(0.1 if config.initialisation == "released" else 30)
    return network


def photo(height=64, width=96, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 12, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def batch(count=1, **size):
    return torch.from_numpy(np.stack([photo(seed=seed, **size) for seed in range(count)]))


def seen(pixels):
    return (pixels.float() / 255 * 2 - 1).permute(0, 3, 1, 2).contiguous()


CONFIGS = [*({"preset": name} for name in PRESETS), {"preset": "default", "edge_attention": "row"}]
CONFIGS += [{"preset": "default", "attention_source": "backbone"}, {"preset": "slim", "edge_attention": "row"}]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_folded_maps_equal_the_plain_ones(config):
    network, pixels = build(**config), batch(2)
    with torch.no_grad():
        plain = plain_maps(network, seen(pixels))
        folded = InferenceNetwork(network, edge_gain=0.7)
        maps = folded(pixels)
        descriptors = folded.conv_des(maps.features)
    edges = F.interpolate(plain.edges, scale_factor=4, mode="bilinear", align_corners=False)
    assert plain.edges.std() > 0.01
    tolerance = 1e-5 * float(plain.heatmap.abs().max())
    np.testing.assert_allclose(maps.logits, (plain.heatmap + 0.7 * edges)[:, 0], atol=tolerance)
    np.testing.assert_allclose(maps.attention, plain.attention, atol=1e-5)
    np.testing.assert_allclose(descriptors, plain.descriptors, atol=1e-4)


@pytest.mark.parametrize("strip_bytes", [1, 64 * 96 * 4 * 24])
def test_strips_leave_no_seams(monkeypatch, strip_bytes):
    network, pixels = build(), batch()
    monkeypatch.setattr(inference, "STRIP_BYTES", 1 << 40)
    whole = InferenceNetwork(network)(pixels)
    monkeypatch.setattr(inference, "STRIP_BYTES", strip_bytes)
    strips = InferenceNetwork(network)(pixels)
    for one, other in zip(whole, strips):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convention", ["exact", "released"])
def test_descriptors_at_points_are_samples_of_the_dense_map(monkeypatch, convention):
    network, pixels = build(), batch(2, height=48, width=64)
    points = torch.rand((60, 2), generator=torch.Generator().manual_seed(0)) * torch.tensor([63.0, 47.0])
    corners = torch.tensor([[0.0, 0.0], [63.0, 47.0], [0.0, 47.0], [63.0, 0.2]])
    asked = [torch.cat((corners, points)), points[:0]]
    folded = InferenceNetwork(network)
    maps = folded(pixels)
    found = folded.descriptors(maps, asked, (48, 64), convention=convention)
    assert [tuple(values.shape) for values in found] == [(64, 128), (0, 128)]
    scale = torch.tensor([64.0, 48.0])
    grid = (2 * asked[0] + 1) / scale - 1 if convention == "exact" else 2 * asked[0] / (scale - 1) - 1
    dense = folded.conv_des(maps.features)[:1]
    expected = F.grid_sample(dense, grid[None, None], padding_mode="border", align_corners=False)[0, :, 0].T
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    monkeypatch.setattr(inference, "DENSE_SHARE", 0.0)
    again = folded.descriptors(maps, asked, (48, 64), convention=convention)
    np.testing.assert_allclose(again[0], found[0], atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_extraction_equals_the_plain_one(preset, size):
    network, image = build(preset), photo(*size, seed=3)
    with torch.no_grad():  # maps with peaks above the threshold and below
        heat = plain_maps(network, seen(torch.from_numpy(image[None, : size[0] // 8 * 8, : size[1] // 8 * 8]))).heatmap
        for k in (1, 2, 3, 4):
            head = network.get_submodule(f"heatmap{k}")
            head.weight.mul_(1.5 / heat.std())
            head.bias.copy_((head.bias - heat.mean()) * 1.5 / heat.std())
    model = SAMFeat(preset, network=network, subpixel=False, detection_threshold=0.6)
    found, expected = model.extract(image), plain_extract(network, image, model.extraction)
    assert len(expected["keypoints"]) > 10
    np.testing.assert_allclose(found["keypoints"], expected["keypoints"], atol=1e-4)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5)
    np.testing.assert_allclose(found["descriptors"], expected["descriptors"], atol=1e-5)


def test_half_precisions_stay_close_and_keep_logits_in_float32():
    network, pixels = build("default"), batch()
    exact = InferenceNetwork(network)(pixels)
    for dtype in (torch.bfloat16, torch.float16):
        rough = InferenceNetwork(network, dtype=dtype)(pixels)
        assert rough.logits.dtype == rough.attention.dtype == torch.float32
        assert rough.features.dtype == dtype
        np.testing.assert_allclose(rough.logits, exact.logits, atol=0.02)
        np.testing.assert_allclose(rough.attention, exact.attention, atol=0.02)
        similarity = F.cosine_similarity(rough.features.float(), exact.features, dim=1)
        assert similarity.min() > 0.999


def test_pixels_are_exact_in_half_precision():
    values = torch.arange(256).float() - 127.5
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(dtype).float(), values)


def test_precision_is_an_option_and_leaves_the_weights_alone(tmp_path):
    network, image = build("default"), photo()
    model = SAMFeat(network=network, detection_threshold=0.0, precision="bf16")
    rough = model.extract(image)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert all(rough[name].dtype == torch.float32 for name in ("keypoints", "scores", "descriptors"))
    exact = SAMFeat(network=network, detection_threshold=0.0).extract(image)
    assert not torch.equal(rough["scores"], exact["scores"])
    model.save(tmp_path / "w.safetensors")
    assert SAMFeat.from_pretrained(tmp_path / "w.safetensors").extraction.precision == "bf16"
    with pytest.raises(ValueError, match=r"precision must be one of .*got 'int8'"):
        SAMFeat(precision="int8")


def test_changed_weights_are_folded_anew():
    model, image = SAMFeat(network=build("default"), detection_threshold=0.0), photo()
    before = model.extract(image)
    folded = model._folded
    model.extract(image)
    assert model._folded is folded
    with torch.no_grad():
        model.network.heatmap1.bias.add_(1.0)
    after = model.extract(image)
    assert after["scores"][0] > before["scores"][0]
    model.load_state_dict(SAMFeat(network=build("default", seed=1)).state_dict())
    expected = SAMFeat(network=build("default", seed=1), detection_threshold=0.0).extract(image)
    assert torch.equal(model.extract(image)["descriptors"], expected["descriptors"])
    assert model.double().extract(image)["keypoints"].shape == expected["keypoints"].shape


@pytest.mark.parametrize("multiscale", [False, True])
def test_a_list_gives_what_its_images_give(monkeypatch, multiscale):
    images = [photo(seed=0), photo(70, 90, seed=1), photo(seed=2), torch.from_numpy(photo(seed=3)).permute(2, 0, 1)]
    model = SAMFeat(network=build("default"), detection_threshold=0.3, max_keypoints=40, multiscale=multiscale)
    alone = [model.extract(image) for image in images]
    equal = model._extract_equal([np.asarray(images[0]), np.asarray(images[2])])  # one batch, as on a GPU
    for found, expected in [*zip(model.extract(images), alone, strict=True), *zip(equal, alone[::2], strict=True)]:
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)
    assert model.extract([]) == []


def test_a_compiler_that_fails_is_a_warning(monkeypatch):
    def broken(network, **options):
        assert options == {"mode": "default"}

        def run(pixels):
            raise RuntimeError("no compiler found\nand more")

        return run

    model, image = SAMFeat(network=build("default"), detection_threshold=0.3), photo()
    expected = model.extract(image)
    monkeypatch.setattr(torch, "compile", broken)
    model.compile(mode="default")
    with pytest.warns(UserWarning, match=r"torch.compile failed \(no compiler found\)"):
        found = model.extract(image)
    assert torch.equal(found["descriptors"], expected["descriptors"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.extract(image)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_maps_are_the_same(backend):
    model, pixels = SAMFeat(network=build("slim")), batch()
    expected = model._fold().network(pixels)
    model.compile(backend=backend)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.compile failed")
        found = model._fold().run(pixels)
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 96, 3), (1, 3, 64, 96), (1, 60, 96, 3), (1, 0, 96, 3)])
def test_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        InferenceNetwork(build())(torch.zeros(shape, dtype=torch.uint8))


def test_presets_share_their_names():
    assert PRESETS.keys() == EXTRACTION_PRESETS.keys()
