import importlib.util
import json
import os
import random
from pathlib import Path

import cv2
import h5py
import kornia.feature
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from samfeat.pipelines.evaluation.protocol import Job, predict
from samfeat.pipelines.extract import extract_images
from samfeat.pipelines.features.formats import Features
from samfeat.pipelines.features.methods import PEERS, load_method
from samfeat.pipelines.features.protocol import choose_device
from samfeat.pipelines.metrics import match_errors

FILES = {
    "aliked": ("aliked-n16rot.pth", "aliked-n32.pth"),
    "disk": ("disk-depth-save.pth",),
    "xfeat": ("xfeat.pt",),
}

spec = importlib.util.spec_from_file_location("damage", Path(__file__).parent / "fuzz" / "damage.py")
assert spec is not None
assert spec.loader is not None
damage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(damage)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> dict[str, Path]:
    """Files of random weights as the authors' files are laid out, by method."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    aliked = kornia.feature.ALIKED("aliked-t16").state_dict()
    del aliked["dkd.hw_grid"]
    tensors = {"aliked": aliked, "disk": {"extractor": kornia.feature.DISK().state_dict()}}
    tensors["xfeat"] = kornia.feature.XFeat().net.state_dict()
    tensors["xfeat"]["keypoint_head.3.weight"] *= 100  # random logits are too flat for kornia's threshold
    for name, values in tensors.items():
        torch.save(values, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in tensors}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Rectangles, uint8 [100, 150, 3]: no side is a multiple of 32."""
    rng = np.random.default_rng(3)
    image = np.full((100, 150, 3), 90, np.uint8)
    for _ in range(40):
        x, y, r = (int(v) for v in (rng.integers(5, 140), rng.integers(5, 90), rng.integers(3, 14)))
        cv2.rectangle(image, (x, y), (x + r, y + r), rng.integers(0, 255, 3).tolist(), -1)
    return image


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", PEERS)
def test_features_are_unit_sorted_and_capped(name, untrained, photo):
    method = load_method(name, weights=untrained[name], max_keypoints=20, device="cpu")
    features = method(photo)
    assert 0 < len(features["keypoints"]) <= 20
    assert features["image_size"].tolist() == [150, 100]
    assert (features["keypoints"] >= 0).all()
    assert (features["keypoints"] <= [149, 99]).all()
    assert (np.diff(features["scores"]) <= 0).all()
    assert np.linalg.norm(features["descriptors"], axis=1) == pytest.approx(1, abs=1e-5)
    assert {v.dtype for k, v in features.items() if k != "image_size"} == {np.dtype(np.float32)}
    assert json.loads(json.dumps(dict(method.config))) == method.config


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (40, 33)])
def test_small_and_empty_images_are_normal(name, size, untrained):
    method = load_method(name, weights=untrained[name], device="cpu")
    for image in (np.full((*size, 3), 128, np.uint8), np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)):
        features = method(image)
        assert len(features["keypoints"]) == len(features["scores"]) == len(features["descriptors"])
        assert (features["keypoints"] <= np.array(size[::-1]) - 1).all()


def test_disk_finds_what_kornia_finds(untrained, photo):
    network = kornia.feature.DISK()
    network.load_state_dict(torch.load(untrained["disk"], weights_only=True)["extractor"])
    with torch.no_grad():
        found = network.eval()(tensor(photo), n=30, pad_if_not_divisible=True)[0]
    order = torch.argsort(-found.detection_scores, stable=True)
    features = load_method("disk", weights=untrained["disk"], max_keypoints=30, device="cpu")(photo)
    assert features["keypoints"] == pytest.approx(found.keypoints[order].numpy())
    assert features["descriptors"] == pytest.approx(found.descriptors[order].numpy(), abs=1e-6)


def test_aliked_finds_what_kornia_finds(untrained, photo):
    network = kornia.feature.ALIKED("aliked-t16", max_num_keypoints=30)
    network.load_state_dict(torch.load(untrained["aliked"], weights_only=True), strict=False)
    with torch.no_grad():
        found = network.eval()(tensor(photo))[0]
    order = torch.argsort(-found.keypoint_scores, stable=True)
    features = load_method("aliked", weights=untrained["aliked"], max_keypoints=30, device="cpu")(photo)
    assert features["keypoints"] == pytest.approx(found.keypoints[order].numpy(), abs=1e-4)
    assert features["descriptors"] == pytest.approx(found.descriptors[order].numpy(), abs=1e-5)


def test_xfeat_maps_points_back_by_pixel_centres(untrained, photo):
    """The centre of pixel i of the resized image that the network sees lies at (i + 1/2) * scale - 1/2."""
    network = kornia.feature.XFeat(top_k=30)
    network.net.load_state_dict(torch.load(untrained["xfeat"], weights_only=True))
    resized = F.interpolate(tensor(photo), (96, 128), mode="bilinear", align_corners=False)
    found = network.eval().detectAndCompute(resized)[0]
    expected = (found["keypoints"].numpy() + 0.5) * (150 / 128, 100 / 96) - 0.5
    features = load_method("xfeat", weights=untrained["xfeat"], max_keypoints=30, device="cpu")(photo)
    assert len(expected) > 10
    assert features["keypoints"] == pytest.approx(expected, abs=1e-4)
    assert features["descriptors"] == pytest.approx(found["descriptors"].numpy(), abs=1e-5)


def test_weights_of_something_else_are_refused_in_one_line(untrained, tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"extractor": 3}, tmp_path / "number.pth")
    (tmp_path / "half.pth").write_bytes(untrained["disk"].read_bytes()[:5000])
    torch.save(kornia.feature.DISK(), tmp_path / "module.pth")  # a pickle of a class
    for name in PEERS:
        others = [path for other, path in untrained.items() if other != name]
        for path in [*others, *sorted(tmp_path.glob("*.pth"))]:
            with pytest.raises(ValueError, match=path.name) as caught:
                load_method(name, weights=path, device="cpu")
            assert "\n" not in str(caught.value)
        with pytest.raises(FileNotFoundError, match="absent"):
            load_method(name, weights=tmp_path / "absent.pth")
        with pytest.raises(ValueError, match="needs its authors' weights"):
            load_method(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_device("auto"), choose_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="no GPU"):
        choose_device("cuda")


def write_h5(path: Path, images: dict[str, dict[str, np.ndarray]]) -> Path:
    """A file as hloc writes it."""
    with h5py.File(path, "w") as file:
        for name, values in images.items():
            for key, value in values.items():
                file.create_dataset(f"{name}/{key}", data=value)
    return path


def hloc_features(number: int = 5, dtype: type = np.float16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "keypoints": rng.uniform(0, 90, (number, 2)).astype(np.float32),
        "scores": rng.permutation(number).astype(dtype),
        "descriptors": rng.normal(size=(8, number)).astype(dtype),
        "image_size": np.array([100, 80]),
    }


def reader(path: Path, *names: str, max_keypoints: int | None = None):
    method = load_method(str(path), max_keypoints=max_keypoints)
    job = Job(data=path, output=path.parent, method=method, name="unused")
    return predict(job, {name: Path(name) for name in names})


def test_features_made_elsewhere_are_read_by_name(tmp_path):
    stored = hloc_features()
    path = write_h5(tmp_path / "superpoint.h5", {"db/a.jpg": stored, "b.jpg": hloc_features(3)})
    assert load_method(str(path)).name == "superpoint"
    features: Features = reader(path, "db/a.jpg", "b.jpg")("db/a.jpg")
    assert features["keypoints"] == pytest.approx(stored["keypoints"])
    assert features["descriptors"] == pytest.approx(stored["descriptors"].T.astype(np.float32))
    assert features["descriptors"].dtype == features["scores"].dtype == np.float32
    best = reader(path, "db/a.jpg", max_keypoints=2)("db/a.jpg")
    order = np.argsort(-stored["scores"])[:2]
    assert best["keypoints"] == pytest.approx(stored["keypoints"][order])
    assert best["scores"].tolist() == [4, 3]
    assert not (tmp_path / "unused").exists()


def test_names_may_lack_the_folder_of_their_scene_in_the_file(tmp_path):
    """As ``extract church/`` names them, where an evaluation of the scenes beside each other says church/a.jpg."""
    stored = hloc_features()
    path = write_h5(tmp_path / "f.h5", {"a.jpg": stored, "in/b.jpg": hloc_features(3), "tower/c.jpg": hloc_features(4)})
    read = reader(path, "church/a.jpg", "church/in/b.jpg")
    assert read("church/a.jpg")["keypoints"] == pytest.approx(stored["keypoints"])
    assert len(read("church/in/b.jpg")["keypoints"]) == 3
    read = reader(path, "church/a.jpg", "castle/in/b.jpg", "tower/c.jpg")  # of three scenes, each name once
    assert [len(read(name)["keypoints"]) for name in ("church/a.jpg", "castle/in/b.jpg", "tower/c.jpg")] == [5, 3, 4]
    for names in (("church/a.jpg", "tower/a.jpg"), ("a.jpg", "tower/a.jpg")):  # which of them is a.jpg?
        with pytest.raises(ValueError, match=r"has features of 'a\.jpg', which may be '.*/a\.jpg' or ") as caught:
            reader(path, *names)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no features of 1 of 2 images, the first is 'church/c\.jpg'"):
        reader(path, "church/a.jpg", "church/c.jpg")


def test_a_file_of_ours_reads_back_as_it_was(tmp_path, photo):
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    sift = load_method("sift", max_keypoints=30)
    extract_images({"a.png": tmp_path / "a.png"}, tmp_path / "sift.h5", method=sift)
    features = reader(tmp_path / "sift.h5", "a.png")("a.png")
    expected = sift(np.ascontiguousarray(photo[..., ::-1]))
    assert all(features[key] == pytest.approx(values) for key, values in expected.items())


def test_feature_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    path = write_h5(tmp_path / "f.h5", {"a.jpg": hloc_features(), "c.jpg": {"global_descriptor": np.ones(4)}})
    with pytest.raises(ValueError, match=r"no features of 2 of 3 images, the first is 'b\.jpg'"):
        reader(path, "a.jpg", "b.jpg", "c.jpg")
    unscored = {key: value for key, value in hloc_features().items() if key != "scores"}
    turned = {**unscored, "descriptors": unscored["descriptors"].T}
    path = write_h5(tmp_path / "g.h5", {"a.jpg": unscored, "b.jpg": turned, "d.jpg": {"keypoints": np.ones((1, 2))}})
    assert len(reader(path, "a.jpg")("a.jpg")["keypoints"]) == 5
    for name, limit, message in (("a.jpg", 2, "no scores"), ("b.jpg", None, "layout"), ("d.jpg", None, "descriptors")):
        with pytest.raises(ValueError, match=message) as caught:
            reader(path, name, max_keypoints=limit)(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="computes none"):
        load_method(str(path))(np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="no weights"):
        load_method(str(path), weights="a.pth")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_method(str(tmp_path / "absent.h5"))
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(OSError, match="not an HDF5 file"):
        load_method(str(tmp_path / "text.h5"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("a.jpg", h5py.ExternalLink("nowhere.h5", "/"), "is damaged"),
        ("a.jpg", np.float32(1), "no features of 1 of 1 images"),
        ("a.jpg", h5py.Empty("f"), "no features of 1 of 1 images"),
        ("a.jpg/scores", np.float32(1), r"scores \(\) of the 5 keypoints of 'a\.jpg'"),
        ("a.jpg/scores", np.zeros((3, 2)), r"scores \(3, 2\) of the 5 keypoints of 'a\.jpg'"),
        ("a.jpg/descriptors", h5py.Empty("f"), "descriptors are not numbers"),
    ],
)
def test_strange_entries_of_feature_files_are_refused_in_one_line(tmp_path, place, value, message):
    path = write_h5(tmp_path / "f.h5", {"a.jpg": hloc_features()})
    with h5py.File(path, "r+") as file:
        del file[place]
        file[place] = value
    with pytest.raises((ValueError, OSError), match=message) as caught:
        reader(path, "a.jpg")("a.jpg")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("seed", [5, 9, 45, 50, 63, 66, 67, 70, 71, 73, 78, 107, 111, 131, 133, 138, 141, 147])
def test_damaged_feature_files_are_refused_in_one_line(tmp_path, seed):
    rng = random.Random(seed)
    path = write_h5(tmp_path / "f.h5", {f"{k}.jpg": hloc_features(k + 5) for k in range(3)})
    (damage.damage_file if rng.random() < 0.4 else damage.damage_hdf5)(path, rng)
    names = [f"church/{k}.jpg" for k in range(3)]
    with pytest.raises((ValueError, OSError)) as caught:
        list(map(reader(path, *names), names))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_the_authors_weights_match_real_photographs(name, file):
    root = Path(os.environ.get("SAMFEAT_DATA", Path(__file__).parents[1] / "../shared/data"))
    weights, folder = root / "peers" / file, root / "homography/oxford/leuven"
    for path in (weights, folder):
        if not path.exists():
            pytest.skip(f"{path} is not there: set SAMFEAT_DATA to the folder that holds peers and homography")
    images = [cv2.imread(str(folder / f"{k}.png"))[100:420, 200:650, ::-1] for k in (1, 2)]
    corner = np.array([[1, 0, 200.0], [0, 1, 100], [0, 0, 1]])
    homography = np.linalg.inv(corner) @ np.loadtxt(folder / "H_1_2") @ corner
    method = load_method(name, weights=weights, max_keypoints=1000, device="cpu")
    features = [method(np.ascontiguousarray(image)) for image in images]
    errors = match_errors(*features, homography)
    assert len(errors) > 100
    assert np.mean(errors <= 3) > (0.6 if name == "xfeat" else 0.9)
