"""The C++ example, compiled against the runtime in the package openvino, against the Python extractor."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from samfeat import SAMFeat, match

pytestmark = [
    pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed"),
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="there is no C++ compiler or CMake"),
]
SOURCE = Path(__file__).parents[1] / "integrations" / "cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    import openvino

    build = tmp_path_factory.mktemp("build")
    cmake = Path(openvino.__path__[0]) / "cmake"
    for words in (
        ["-S", SOURCE, "-B", build, f"-DOpenVINO_DIR={cmake}", "-DCMAKE_CXX_FLAGS=-Werror"],
        ["--build", build],
    ):
        subprocess.run(["cmake", *words], check=True, capture_output=True)
    return build / "samfeat"


def write_views(folder, size):
    """Two overlapping windows of a photograph as PPM files, and as arrays."""
    large = cv2.resize(skimage.data.astronaut(), (400, 400), interpolation=cv2.INTER_AREA)
    views = {"a": large[20 : 20 + size[0], 10 : 10 + size[1]], "b": large[8 : 8 + size[0], 30 : 30 + size[1]]}
    for name, view in views.items():
        cv2.imwrite(str(folder / f"{name}.ppm"), view[..., ::-1])
    return [np.ascontiguousarray(view) for view in views.values()]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_features_and_matches_are_those_of_python(program, exported, tmp_path, precision):
    views = write_views(tmp_path, (240, 320))
    model = exported / f"{precision}.onnx"
    done = subprocess.run(
        [program, model, tmp_path / "a.ppm", tmp_path / "b.ppm"], capture_output=True, text=True, check=True
    )
    found = [np.load(tmp_path / f"{name}.npy") for name in "ab"]
    for rows, view in zip(found, views, strict=True):
        wanted = {name: values.numpy() for name, values in SAMFeat.from_pretrained(model).extract(view).items()}
        assert (rows.dtype, rows.shape) == (np.float32, (200, 3 + 128))
        assert (np.diff(rows[:, 2]) <= 0).all()
        distance = np.linalg.norm(rows[:, None, :2] - wanted["keypoints"], axis=2)
        nearest, same = distance.argmin(axis=1), distance.min(axis=1) < 0.05
        assert same.mean() > 0.97  # the maps are bfloat16 inside, where the CPU has it
        np.testing.assert_allclose(rows[same, 2], wanted["scores"][nearest[same]], atol=5e-3)
        np.testing.assert_allclose(rows[same, 3:], wanted["descriptors"][nearest[same]], atol=2e-2)
    matches = match(*({"descriptors": rows[:, 3:]} for rows in found))["matches"]
    np.testing.assert_array_equal(np.load(tmp_path / "matches.npy"), matches)
    assert len(matches) > 80
    assert f"{len(matches)} matches" in done.stdout


def test_sizes_that_are_no_multiple_of_16(program, exported, tmp_path):
    (view, _) = write_views(tmp_path, (250, 330))
    subprocess.run([program, exported / "fp32.onnx", tmp_path / "a.ppm"], check=True, capture_output=True)
    found = np.load(tmp_path / "a.npy")[:, :2]
    wanted = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=200).extract(view)["keypoints"].numpy()
    nearest = np.linalg.norm(found[:, None] - wanted, axis=2).min(axis=1)
    assert found.min() >= 0
    assert (found <= [329, 249]).all()
    assert (nearest < 0.5).mean() > 0.9  # two ways of resizing, and bfloat16 where the CPU has it


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "usage: samfeat MODEL.onnx IMAGE.ppm"),
        (["none.onnx", "a.ppm"], "none.onnx does not exist"),
        (["a.ppm", "a.ppm"], "a.ppm is not an .onnx file"),
        (["text.onnx", "a.ppm"], "text.onnx is not a model that samfeat-cli export wrote"),
        (["fp32.onnx", "none.ppm"], "none.ppm cannot be opened"),
        (["fp32.onnx", "text.onnx"], "text.onnx is not a binary PPM"),
        (["fp32.onnx", "short.ppm"], "short.ppm is cut short"),
    ],
)
def test_what_cannot_be_used_is_one_line(program, exported, tmp_path, words, reason):
    write_views(tmp_path, (32, 48))
    shutil.copy(exported / "fp32.onnx", tmp_path)
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "short.ppm").write_bytes((tmp_path / "a.ppm").read_bytes()[:-1])
    done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]  # OpenVINO may have logged something before
    assert not list(tmp_path.glob("*.npy"))
