"""The ONNX model, run by onnxruntime, against the extractor."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from samfeat.student import onnx as exporter
from samfeat.student.export import FORMAT
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork, network_preset
from samfeat.student.onnx import OUTPUTS, compare, export_onnx

K = 40
SIZES = [(64, 96), (70, 90), (88, 72), (120, 161), (39, 57)]  # 88 and 72 lie half-way between multiples: to even


def photo(height, width):
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand((1, 3, height // 6 + 2, width // 6 + 2), generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def lively(preset, **options):
    """An extractor whose heat-map has peaks around its threshold and below."""
    network = SAMFeatNetwork(network_preset(preset), generator=torch.Generator().manual_seed(5)).eval()
    with torch.no_grad():
        heat = network(photo(64, 96)[None] * 2 - 1).heatmap
        for k in (1, 2, 3, 4):
            head = network.get_submodule(f"heatmap{k}")
            head.weight.mul_(1.5 / heat.std())
            head.bias.copy_((head.bias - heat.mean()) * 1.5 / heat.std() + 0.5)
    return SAMFeat(preset, network=network, max_keypoints=K, **options)


@pytest.fixture(scope="module", params=["default", pytest.param("released", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """An extractor and its ONNX file: subpixel keypoints in one, the edges' share of the logits in the other."""
    extractor = lively(request.param)
    extractor.provenance = {"data": "noise"}
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_onnx(path, extractor)
    return extractor, path


def run(path, image):
    """Outputs for one image, of the four that have a row a keypoint without the axis of the batch."""
    found = run_batch(path, image[None])
    return {key: values[0] if key in OUTPUTS[:4] else values for key, values in found.items()}


def run_batch(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"image": images.numpy()})))


def same_features(found, wanted):
    """Whether the valid features are those of the extractor; where scores are equal up to rounding, in any order."""
    count = len(wanted["scores"])
    assert found["valid"].tolist() == [True] * count + [False] * (K - count)
    order = np.linalg.norm(wanted["keypoints"][:, None] - found["keypoints"][:count], axis=2).argmin(1)
    assert sorted(order) == list(range(count))
    np.testing.assert_allclose(found["scores"][:count], wanted["scores"], atol=1e-4)
    np.testing.assert_allclose(found["keypoints"][order], wanted["keypoints"], atol=5e-3)  # a Newton step amplifies
    np.testing.assert_allclose(found["descriptors"][order], wanted["descriptors"], atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_extractor_at_any_size(exported, size):
    extractor, path = exported
    wanted, found = extractor.extract(photo(*size)), run(path, photo(*size))
    count = len(wanted["scores"])
    assert count > 3
    same_features(found, wanted)
    for key in ("keypoints", "scores", "descriptors"):
        assert not found[key][count:].any()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("size", [(70, 90), (120, 161)])
def test_a_batch_is_its_images_one_by_one(exported, size, count):
    extractor, path = exported
    photos = [photo(*size), photo(*size).flip(2), torch.zeros(3, *size), photo(*size).flip(1), 1 - photo(*size)]
    found = run_batch(path, torch.stack(photos[:count]))
    assert found["keypoints"].shape == (count, K, 2)
    for number, image in enumerate(photos[:count]):
        for key, values in run_batch(path, image[None]).items():
            np.testing.assert_allclose(found[key][number], values[0], atol=1e-5, err_msg=f"{key} of {number}")
        if image.any():  # a black image is full of ties
            wanted = {key: values.numpy() for key, values in extractor.extract(image).items()}
            same_features({key: found[key][number] for key in OUTPUTS[:4]}, wanted)
    assert not np.array_equal(found["keypoints"][0], found["keypoints"][1])


@pytest.mark.parametrize("size", SIZES)
def test_the_maps_are_the_networks(exported, size):
    extractor, path = exported
    multiple = [int(np.round(length / 16) * 16) for length in size]  # NumPy, too, rounds half to even
    found = run(path, photo(*size))
    assert found["heatmap"].shape == (1, 1, *multiple)
    assert found["descriptor_map"].shape == (1, 128, multiple[0] // 4, multiple[1] // 4)
    resized = torch.nn.functional.interpolate(photo(*size)[None], multiple, mode="bilinear", align_corners=False)
    with torch.no_grad():
        dense = extractor.network(resized * 2 - 1)
    for key, values in zip(OUTPUTS[5:], (dense.descriptors, dense.attention, dense.edges)):
        np.testing.assert_allclose(found[key], values, atol=1e-4 * max(1, float(values.abs().max())))
    agreement = compare(path, extractor, photo(*size))
    assert agreement.maps < 1e-4
    assert agreement.found == agreement.keypoints
    assert agreement.features < 1e-4


def test_nothing_to_see_is_all_padding(exported):
    extractor, path = exported
    found = run(path, torch.zeros(3, 48, 64))
    assert found["valid"].sum() == len(extractor.extract(torch.zeros(3, 48, 64))["scores"])


def test_the_file_says_what_it_is_and_nothing_of_this_machine(exported):
    extractor, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    values = json.loads({entry.key: entry.value for entry in model.metadata_props}[FORMAT])
    assert values["keypoints"] == values["extraction"]["max_keypoints"] == K
    assert values["provenance"] == {"data": "noise"}
    assert values["network"]["edge_attention"] == extractor.network.config.edge_attention
    assert values["network"]["widths"] == list(extractor.network.config.widths)
    assert b".py" not in path.read_bytes()
    assert [entry.name for entry in model.graph.output] == list(OUTPUTS)
    sides = [dimension.dim_param for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", "", "height", "width"]


def test_a_foreign_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not an ONNX model of SAMFeat") as caught:
        compare(tmp_path / "m.onnx", lively("default"), photo(32, 32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extractor", "keypoints", "message"),
    [
        (lambda: SAMFeat("default", max_keypoints=None), None, "fixed number of keypoints"),
        (lambda: SAMFeat("default"), 0, "fixed number of keypoints"),
        (lambda: SAMFeat("default", multiscale=True), None, "at one scale"),
    ],
)
def test_what_cannot_be_exported(tmp_path, extractor, keypoints, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(tmp_path / "m.onnx", extractor(), keypoints=keypoints)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime, not installed here: pip install 'samfeat\[onnx\]'"):
        export_onnx(tmp_path / "m.onnx", SAMFeat("default"))
