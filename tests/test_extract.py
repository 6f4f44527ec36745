import json
import os
import signal
import time
import warnings
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from samfeat.pipelines.extract import extract_folder
from samfeat.pipelines.features.formats import Features, read_features
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.features.protocol import Method, shrunk


@pytest.fixture
def photo() -> np.ndarray:
    """Blobs and corners that every detector finds."""
    rng = np.random.default_rng(3)
    image = np.full((160, 200, 3), 90, np.uint8)
    for _ in range(60):
        x, y, r = rng.integers(10, 190), rng.integers(10, 150), rng.integers(3, 12)
        cv2.rectangle(image, (int(x), int(y)), (int(x + r), int(y + r)), rng.integers(0, 255, 3).tolist(), -1)
    return image


@pytest.fixture
def folder(tmp_path, photo) -> Path:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    cv2.imwrite(str(root / "b.png"), photo)
    cv2.imwrite(str(root / "deep" / "a.ppm"), photo[:, :150])
    (root / "notes.txt").write_text("not an image")
    return root


class Counting:
    """A method that tells how often it ran: one keypoint, at the image's size."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, image: np.ndarray) -> Features:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        size = np.array(image.shape[1::-1])
        return {
            "keypoints": size[None].astype(np.float32),
            "scores": np.ones(1, np.float32),
            "descriptors": np.arange(4, dtype=np.float32)[None],
            "image_size": size,
        }


def counting(**config) -> tuple[Method, Counting]:
    extract = Counting(config.pop("fail_at", None))
    return Method("count", {"method": "count", **config}, extract), extract


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_opencv_features_are_unit_sorted_and_capped(name, photo):
    features = load_method(name, max_keypoints=20)(photo)
    assert 10 < len(features["keypoints"]) <= 20
    assert features["image_size"].tolist() == [200, 160]
    assert (features["keypoints"] >= 0).all()
    assert (features["keypoints"] < [200, 160]).all()
    assert (np.diff(features["scores"]) <= 0).all()
    assert np.linalg.norm(features["descriptors"], axis=1) == pytest.approx(1, abs=1e-5)
    assert {key: values.dtype for key, values in features.items() if key != "image_size"} == {
        "keypoints": np.float32, "scores": np.float32, "descriptors": np.float32,
    }  # fmt: skip


def test_sift_finds_a_blob_where_it_is():
    y, x = np.mgrid[:80, :100]
    blob = 40 + 180 * np.exp(-((x - 51.3) ** 2 + (y - 38.6) ** 2) / (2 * 5.0**2))
    features = load_method("sift")(np.repeat(blob.round().astype(np.uint8)[..., None], 3, 2))
    assert features["keypoints"][0] == pytest.approx([51.3, 38.6], abs=0.05)


def test_sift_reads_rgb_not_bgr():
    y, x = np.mgrid[:60, :60]
    blob = np.exp(-((x - 30) ** 2 + (y - 30) ** 2) / (2 * 4.0**2))
    red, blue = np.zeros((60, 60, 3), np.uint8), np.zeros((60, 60, 3), np.uint8)
    red[..., 0] = blue[..., 2] = (255 * blob).astype(np.uint8)
    sift = load_method("sift")
    assert len(sift(red)["scores"]) > 0
    assert len(sift(blue)["scores"]) == 0  # red weighs 0.30 in grey, blue 0.11: too faint


def test_orb_dot_products_are_hamming_distances(photo):
    features = load_method("orb", max_keypoints=30)(photo)
    found = cv2.ORB_create(nfeatures=30).detectAndCompute(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), None)
    by_response = np.argsort([-k.response for k in found[0]], kind="stable")
    codes = found[1][by_response]
    hamming = np.array([[cv2.norm(a, b, cv2.NORM_HAMMING) for b in codes] for a in codes])
    assert features["descriptors"] @ features["descriptors"].T == pytest.approx(1 - hamming / 128, abs=1e-5)


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_nothing_to_see_is_a_normal_result(name):
    features = load_method(name)(np.full((50, 60, 3), 128, np.uint8))
    assert features["keypoints"].shape == (0, 2)
    assert features["scores"].shape == (0,)
    assert features["descriptors"].shape == (0, {"sift": 128, "orb": 256}[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "surf"}, "sift"),
        ({"name": "sift", "weights": "some.safetensors"}, "no weights"),
        ({"name": "sift", "max_keypoints": 0}, "at least 1"),
        ({"name": "orb", "multiscale": True}, "no options, got multiscale"),
    ],
)
def test_bad_methods_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_method(**arguments)


def test_samfeat_from_its_weights_file(tmp_path, photo):
    from samfeat.student.extractor import SAMFeat

    model = SAMFeat("default", detection_threshold=0.0, max_keypoints=40)
    model.save(tmp_path / "a.safetensors")
    method = load_method("samfeat", weights=tmp_path / "a.safetensors", max_keypoints=20, device="cpu")
    features = method(photo)
    expected = model.extract(photo)
    assert features["keypoints"] == pytest.approx(expected["keypoints"][:20].numpy())
    assert features["descriptors"] == pytest.approx(expected["descriptors"][:20].numpy(), abs=1e-5)
    assert method.config["max_keypoints"] == 20
    pyramid = load_method("samfeat", weights=tmp_path / "a.safetensors", multiscale=True, device="cpu")
    assert not np.allclose(pyramid(photo)["scores"], expected["scores"].numpy())
    assert json.loads(json.dumps(dict(method.config))) == method.config
    with pytest.raises(FileNotFoundError, match="absent"):
        load_method("samfeat", weights=tmp_path / "absent.safetensors")


def test_hloc_file_reads_back_with_h5py(folder, tmp_path, photo):
    sift = load_method("sift", max_keypoints=25)
    summary = extract_folder(folder, tmp_path / "out" / "feats.h5", method=sift)
    assert (summary.written, summary.skipped, summary.failed) == (["b.png", "deep/a.ppm"], [], {})
    expected = sift(photo[..., ::-1].copy())  # cv2.imwrite took the fixture for BGR
    with h5py.File(tmp_path / "out" / "feats.h5") as file:
        group = file["b.png"]
        assert group["keypoints"][()] == pytest.approx(expected["keypoints"])
        assert group["descriptors"].shape == (128, 25)  # hloc stores one descriptor a column
        assert pytest.approx(expected["descriptors"]) == group["descriptors"][()].T
        assert group["scores"].shape == (25,)
        assert group["image_size"][()].tolist() == [200, 160]
        assert group["keypoints"].attrs["uncertainty"] == 1.0
        assert file["deep/a.ppm"]["image_size"][()].tolist() == [150, 160]
        again = read_features(file, "b.png")
        assert again["descriptors"] == pytest.approx(expected["descriptors"])


def test_d2net_files_read_back_with_numpy(folder, tmp_path, photo):
    sift = load_method("sift", max_keypoints=25)
    seen = []
    extract_folder(folder, tmp_path / "out", method=sift, format="d2net", progress=lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]
    with np.load(tmp_path / "out" / "b.png.sift") as file:
        assert sorted(file) == ["descriptors", "keypoints", "scores"]
        assert file["keypoints"].shape == (25, 2)
        assert file["descriptors"].shape == (25, 128)
        assert file["descriptors"] == pytest.approx(sift(photo[..., ::-1].copy())["descriptors"])
    assert sorted(p.name for p in (tmp_path / "out" / "deep").iterdir()) == ["a.ppm.sift"]


@pytest.mark.parametrize("format", ["hloc", "d2net"])
def test_an_interrupted_run_goes_on(folder, tmp_path, format):
    method, _ = counting(fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        extract_folder(folder, tmp_path / "out", method=method, format=format)
    method, extract = counting()
    summary = extract_folder(folder, tmp_path / "out", method=method, format=format)
    assert (summary.written, summary.skipped, extract.calls) == (["deep/a.ppm"], ["b.png"], 1)
    summary = extract_folder(folder, tmp_path / "out", method=method, format=format)
    assert (summary.written, summary.skipped, extract.calls) == ([], ["b.png", "deep/a.ppm"], 1)
    extract_folder(folder, tmp_path / "out", method=method, format=format, overwrite=True)
    assert extract.calls == 3


def test_a_killed_run_loses_nothing_but_the_image_it_was_at(tmp_path, photo):
    """SIGKILL again and again: in the end the features are those of an undisturbed run."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(60):
        cv2.imwrite(str(tmp_path / "images" / f"{k:03}.png"), photo[k:, k:])

    def noted(image: np.ndarray) -> Features:
        with (tmp_path / "calls").open("a") as file:
            file.write("x")
        return Counting()(image) | {"descriptors": np.full((1, 5000), image.mean(), np.float32)}

    method = Method("noted", {"method": "noted"}, noted)
    kills, status = 0, None
    while status is None:
        child = os.fork()
        if child == 0:
            try:
                extract_folder(tmp_path / "images", tmp_path / "f.h5", method=method, threads=2)
                os._exit(0)
            finally:
                os._exit(1)
        if kills < 12:
            time.sleep(rng.uniform(0.005, 0.06))
            os.kill(child, signal.SIGKILL)
        status = os.WEXITSTATUS(code) if os.WIFEXITED(code := os.waitpid(child, 0)[1]) else None
        kills += status is None
    assert status == 0
    assert kills >= 3
    assert 60 <= (tmp_path / "calls").stat().st_size <= 60 + kills
    extract_folder(tmp_path / "images", tmp_path / "whole.h5", method=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "f.h5", "images", "whole.h5"]
    with h5py.File(tmp_path / "f.h5") as killed, h5py.File(tmp_path / "whole.h5") as whole:
        assert list(killed) == list(whole)
        for name in whole:
            for key, values in whole[name].items():
                np.testing.assert_array_equal(killed[name][key], values)


def test_a_full_disk_keeps_what_is_done(folder, tmp_path, monkeypatch):
    output = tmp_path / "feats.h5"
    method, extract = counting()

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("samfeat.pipelines.extract.write_features", full)
        with pytest.raises(OSError, match="disk full"):
            extract_folder(folder, output, method=method)
    assert not output.exists()
    summary = extract_folder(folder, output, method=method)
    assert (summary.skipped, extract.calls) == (["b.png", "deep/a.ppm"], 2)
    with h5py.File(output) as file:
        assert sorted(file) == ["b.png", "deep"]


def test_a_file_grows_with_its_folder(folder, tmp_path, photo):
    method = counting()[0]
    extract_folder(folder, tmp_path / "f.h5", method=method)
    cv2.imwrite(str(folder / "c.png"), photo)
    summary = extract_folder(folder, tmp_path / "f.h5", method=method)
    assert (summary.written, summary.skipped) == (["c.png"], ["b.png", "deep/a.ppm"])
    with h5py.File(tmp_path / "f.h5") as file:
        assert sorted(file) == ["b.png", "c.png", "deep"]


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_changes_nothing(folder, tmp_path, photo, threads):
    for k in range(6):
        cv2.imwrite(str(folder / f"more{k}.png"), photo[k:])
    (folder / "more3.png").write_bytes(b"")
    summary = extract_folder(folder, tmp_path / "f.h5", method=counting()[0], threads=threads)
    assert summary.written == ["b.png", "deep/a.ppm", *(f"more{k}.png" for k in (0, 1, 2, 4, 5))]
    assert list(summary.failed) == ["more3.png"]
    with h5py.File(tmp_path / "f.h5") as file:
        assert [file[name]["image_size"][1] for name in summary.written] == [160, 160, 160, 159, 158, 156, 155]


def test_a_limited_size_moves_keypoints_by_pixel_centres(photo):
    """A blob of a large image is found where it is, though the method saw a quarter of the size."""
    y, x = np.mgrid[:320, :400]
    blob = 40 + 180 * np.exp(-((x - 201.3) ** 2 + (y - 150.6) ** 2) / (2 * 20.0**2))
    image = np.repeat(blob.round().astype(np.uint8)[..., None], 3, 2)
    method = shrunk(load_method("sift"), 100)
    features = method(image)
    assert features["keypoints"][0] == pytest.approx([201.3, 150.6], abs=0.3)
    assert features["image_size"].tolist() == [400, 320]
    assert features["uncertainty"] == 4
    assert method.config["max_size"] == 100
    small = shrunk(load_method("sift"), 400)(image)
    assert "uncertainty" not in small
    with pytest.raises(ValueError, match="at least 1"):
        shrunk(method, 0)


@pytest.mark.parametrize("format", ["hloc", "d2net"])
def test_another_configuration_is_refused_with_the_difference(folder, tmp_path, format):
    extract_folder(folder, tmp_path / "out", method=counting(threshold=0.5)[0], format=format)
    other, extract = counting(threshold=0.7)
    with pytest.raises(ValueError, match=r"threshold 0\.5 there, 0\.7 here"):
        extract_folder(folder, tmp_path / "out", method=other, format=format)
    assert extract.calls == 0
    extract_folder(folder, tmp_path / "out", method=other, format=format, overwrite=True)
    assert extract.calls == 2


def test_bad_images_are_reported_not_fatal(folder, tmp_path):
    (folder / "broken.jpg").write_bytes((folder / "b.png").read_bytes()[:500])
    (folder / "empty.png").write_bytes(b"")
    summary = extract_folder(folder, tmp_path / "feats.h5", method=counting()[0])
    assert summary.written == ["b.png", "deep/a.ppm"]
    assert sorted(summary.failed) == ["broken.jpg", "empty.png"]
    assert "empty" in summary.failed["empty.png"]


def test_a_list_names_images_relative_to_itself(folder, tmp_path):
    (folder / "list.txt").write_text("deep/a.ppm\n\nb.png\n")
    assert extract_folder(folder / "list.txt", tmp_path / "f.h5", method=counting()[0]).written == [
        "deep/a.ppm",
        "b.png",
    ]
    (folder / "list.txt").write_text("../images/b.png\n")
    with pytest.raises(ValueError, match="paths below it"):
        extract_folder(folder / "list.txt", tmp_path / "f.h5", method=counting()[0])
    (folder / "list.txt").write_text("gone.png\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        extract_folder(folder / "list.txt", tmp_path / "f.h5", method=counting()[0])


def test_bad_inputs_are_refused_in_one_line(folder, tmp_path):
    method = counting()[0]
    (tmp_path / "none").mkdir()
    (tmp_path / "text.h5").write_text("no HDF5")
    cases = [
        (tmp_path / "none", tmp_path / "f.h5", "hloc", ValueError, "no image"),
        (tmp_path / "absent", tmp_path / "f.h5", "hloc", FileNotFoundError, "does not exist"),
        (folder / "b.png", tmp_path / "f.h5", "hloc", ValueError, "not a text file"),
        (folder, tmp_path / "f.h5", "colmap", ValueError, "hloc, d2net"),
        (folder, tmp_path / "text.h5", "hloc", OSError, "HDF5"),
    ]
    for images, output, format, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            extract_folder(images, output, method=method, format=format)
        assert "\n" not in str(caught.value)


def test_a_name_that_is_not_utf8_is_left_out_before_anything_is_computed(folder, tmp_path, photo):
    cv2.imwrite(str(folder / "x.png"), photo)
    os.rename(folder / "x.png", os.fsencode(folder) + b"/caf\xe9.png")
    method, extract = counting()
    summary = extract_folder(folder, tmp_path / "f.h5", method=method)
    assert (summary.written, extract.calls) == (["b.png", "deep/a.ppm"], 2)
    assert list(summary.failed) == ["caf\udce9.png"]
    assert "not UTF-8" in summary.failed["caf\udce9.png"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_an_image_too_large_for_the_memory_is_named_and_the_rest_done(folder, tmp_path, error):
    def extract(image):
        if image.shape[1] == 200:
            raise error
        return counting()[1](image)

    summary = extract_folder(folder, tmp_path / "f.h5", method=Method("count", {}, extract))
    assert summary.written == ["deep/a.ppm"]
    assert "--max-size" in summary.failed["b.png"]


def test_other_errors_of_a_method_are_not_hidden(folder, tmp_path):
    def extract(image):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        extract_folder(folder, tmp_path / "f.h5", method=Method("count", {}, extract))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_photographs_above_the_limit_are_read_at_a_fraction(folder, tmp_path, suffix, monkeypatch):
    """A blob of a photograph above the limits of pixels, which are scaled down with it, is found where it is."""
    for module, name in (("samfeat.images", "MAX_PIXELS"), ("PIL.Image", "MAX_IMAGE_PIXELS")):
        monkeypatch.setattr(f"{module}.{name}", 300 * 400)
    y, x = np.mgrid[:320, :400]
    blob = 40 + 180 * np.exp(-((x - 201.3) ** 2 + (y - 150.6) ** 2) / (2 * 20.0**2))
    (tmp_path / "large").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    stored = Image.fromarray(blob.round().astype(np.uint8)).rotate(90, expand=True)
    stored.save(tmp_path / "large" / f"blob{suffix}", exif=exif, quality=95)
    method = shrunk(load_method("sift"), 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_folder(tmp_path / "large", tmp_path / "f.h5", method=method, max_size=100)
    with h5py.File(tmp_path / "f.h5") as file:
        features = read_features(file, f"blob{suffix}")
    assert features["keypoints"][0] == pytest.approx([201.3, 150.6], abs=0.5)
    assert features["image_size"].tolist() == [400, 320]


def test_an_output_that_is_an_image_is_refused(folder, tmp_path):
    before = (folder / "b.png").read_bytes()
    (tmp_path / "link.h5").symlink_to(folder / "b.png")
    for output in (folder / "b.png", tmp_path / "link.h5"):
        with pytest.raises(ValueError, match="is an input"):
            extract_folder(folder, output, method=counting()[0], overwrite=True)
    assert (folder / "b.png").read_bytes() == before


def test_lists_with_a_bom_comments_and_repeats(folder, tmp_path):
    (folder / "list.txt").write_bytes("\ufeff# mine\r\nb.png\r\nb.png\r\n".encode())
    assert extract_folder(folder / "list.txt", tmp_path / "f.h5", method=counting()[0]).written == ["b.png"]
