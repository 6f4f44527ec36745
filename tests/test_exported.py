"""Quantised and float ONNX models as extractors, run by OpenVINO, against torch and onnxruntime."""

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
import torch
from typer.testing import CliRunner

from samfeat.cli import app
from samfeat.pipelines.speed import benchmark_speed
from samfeat.student import exported as exported_module
from samfeat.student.extractor import SAMFeat
from samfeat.student.onnx import export_onnx

MATCHING = ("keypoints", "scores", "descriptors")


def photograph(size, image=skimage.data.astronaut):
    return cv2.resize(image(), size[::-1], interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def student():
    return SAMFeat.from_pretrained("samfeat-slim", max_keypoints=200)


@pytest.fixture
def loaded(exported):
    pytest.importorskip("openvino")
    return lambda name, **options: SAMFeat.from_pretrained(exported / f"{name}.onnx", **options)


def repeated(first, second):
    """Shares of the keypoints of each that the other has within a pixel, averaged."""
    distances = torch.cdist(first["keypoints"], second["keypoints"])
    return float((distances.amin(1) <= 1).float().mean() + (distances.amin(0) <= 1).float().mean()) / 2


def test_int8_convolutions_but_float_heads(exported):
    model = onnx.load(exported / "int8.onnx")
    onnx.checker.check_model(model)
    weights = {i.name: i for i in model.graph.initializer}
    dequantised = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    kinds = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            source = dequantised.get(node.input[1], node.input[1])
            name = source.removeprefix("network.").partition(".weight")[0]
            kinds[name] = weights[source].data_type
    floats = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert floats == {"conv1a", "heatmap1", "heatmap2", "heatmap3", "heatmap4", "conv_edg", "scalemap"}
    assert {kinds[name] for name in kinds.keys() - floats} == {onnx.TensorProto.INT8}
    assert {"conv1b", "conv4b", "conv_bottleneck", "conv_des"} < kinds.keys()
    assert all(len(weights[w.replace("_quantized", "_scale")].dims) for w in weights if w.endswith("weight_quantized"))
    assert (exported / "int8.onnx").stat().st_size < (exported / "fp32.onnx").stat().st_size


def test_onnxruntime_runs_the_quantised_model(exported, student):
    image = photograph((240, 320))
    session = onnxruntime.InferenceSession(exported / "int8.onnx", providers=["CPUExecutionProvider"])
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32) / 255
    names = [*MATCHING, "valid"]
    found = dict(zip(names, session.run(names, {"image": pixels})))
    kept = {key: torch.from_numpy(found[key][0][found["valid"][0]]) for key in MATCHING}
    assert repeated(kept, student.extract(image)) > 0.85


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.98), ("int8", 0.85)])
@pytest.mark.parametrize("size", [(240, 320), (155, 203)])
def test_openvino_finds_the_keypoints_of_torch(loaded, student, precision, least, size):
    image = photograph(size)
    wanted, found = student.extract(image), loaded(precision).extract(image)
    assert found["image_size"].tolist() == [size[1], size[0]]
    assert repeated(wanted, found) > least
    distances = torch.cdist(wanted["keypoints"], found["keypoints"])
    near = distances.amin(1) < 1
    partners = found["descriptors"][distances.argmin(1)[near]]
    assert torch.cosine_similarity(wanted["descriptors"][near], partners).mean() > 0.97
    assert (found["scores"].diff() <= 0).all()


def test_several_images_and_scales_are_those_one_by_one(loaded):
    model = loaded("int8", multiscale=True, max_keypoints=50)
    images = [photograph((96, 128)), photograph((96, 128), skimage.data.coffee)]
    for image, found in zip(images, model.extract(images)):
        alone = model.extract(image)
        assert all(torch.equal(alone[key], found[key]) for key in MATCHING)
    assert set(model.maps(images[0])) == {"heatmap", "attention", "edges"}


def test_what_an_exported_model_refuses(loaded, exported, tmp_path):
    model = loaded("int8")
    with pytest.raises(ValueError, match="holds no weights to save"):
        model.save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="cannot be exported again"):
        export_onnx(tmp_path / "again.onnx", model)
    for option in ({"precision": "bf16"}, {"edge_gain": 2.0}):
        with pytest.raises(ValueError, match="is fixed in an ONNX model"):
            loaded("int8", **option)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not an ONNX model of SAMFeat") as caught:
        SAMFeat.from_pretrained(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    foreign = onnx.load(exported / "fp32.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="is not an ONNX model of SAMFeat"):
        SAMFeat.from_pretrained(tmp_path / "foreign.onnx")


def test_a_missing_package_is_one_line(exported, monkeypatch):
    monkeypatch.setattr(exported_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'samfeat\[openvino\]'"):
        SAMFeat.from_pretrained(exported / "int8.onnx")


def test_the_benchmark_has_its_rows(loaded, tmp_path):
    found = benchmark_speed(
        tmp_path / "speed.md",
        models={"q": loaded("int8")},
        methods=[],
        size=(64, 96),
        threads=1,
        compiled=True,
        repeats=1,
    )
    assert [timing.name for timing in found] == ["q int8, network", "q int8, features"]


def test_command(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("coffee", "chelsea"):
        cv2.imwrite(str(photographs / f"{name}.png"), photograph((400, 700), getattr(skimage.data, name)))
    made = tmp_path / "made.onnx"
    options = ["--int8", "--calibration", str(photographs), "--max-keypoints", "50"]
    done = CliRunner().invoke(app, ["export", "samfeat-slim", str(made), *options])
    assert done.exit_code == 0, done.output
    assert "quantised with 2 photographs" in done.output
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(made).graph.node)


@pytest.mark.parametrize(
    "options", [["out.onnx", "--int8"], ["out.pt", "--int8", "--calibration", "."], ["out.onnx", "--calibration", "."]]
)
def test_command_needs_photographs_and_onnx(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", "samfeat-slim", *options])
    assert done.exit_code == 2
    assert "needs --calibration FOLDER" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
