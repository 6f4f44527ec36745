"""The extractor for deep-image-matching, run by its own code; skipped where that cannot be imported."""

from importlib import import_module
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import skimage.data
from PIL import Image

from samfeat import SAMFeat, match

FOLDER = Path(__file__).parents[1] / "integrations" / "deep_image_matching"
TO_SECOND = np.array([[1.08, 0.12, -30.0], [-0.1, 1.02, 24.0], [5e-5, -1e-5, 1.0]])


@pytest.fixture
def toolbox(monkeypatch):
    """deep_image_matching with the extractor and its pipeline."""
    reason = "install deep-image-matching from its repository, and kornia before 0.9"
    toolbox = pytest.importorskip("deep_image_matching", reason=reason, exc_type=ImportError)
    extractors = toolbox.extractors
    monkeypatch.setattr(extractors, "__path__", [*extractors.__path__, str(FOLDER)])
    import_module("deep_image_matching.extractors.samfeat")
    return toolbox


@pytest.fixture
def photos(tmp_path):
    """A folder with a photograph and, in grey, its view by ``TO_SECOND``; no side is a multiple of 16."""
    first = np.ascontiguousarray(skimage.data.astronaut()[:313, :471])
    second = cv2.cvtColor(cv2.warpPerspective(first, TO_SECOND, (457, 339)), cv2.COLOR_RGB2GRAY)
    (tmp_path / "images").mkdir()
    Image.fromarray(first).save(tmp_path / "images" / "a.png")
    Image.fromarray(second).save(tmp_path / "images" / "b.png")
    return tmp_path


def configuration(toolbox, photos, **options):
    given = {"dir": photos, "outs": photos / "out", "pipeline": "samfeat+kornia_matcher", "strategy": "bruteforce"}
    config = toolbox.Config(toolbox.config.cli_options_defaults | given | options)
    config.extractor.update(weights="samfeat-slim", max_keypoints=500)
    return config


@pytest.mark.integration
def test_features_and_matches_are_those_of_the_extractor(toolbox, photos):
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=500, weighted_descriptors=False)
    expected = {name: student.extract(photos / "images" / name) for name in ("a.png", "b.png")}
    toolbox.ImageMatcher(configuration(toolbox, photos)).run()
    with h5py.File(photos / "out" / "features.h5") as file:
        features = {name: {key: values[()] for key, values in file[name].items()} for name in expected}
    for name, values in expected.items():
        np.testing.assert_allclose(features[name]["keypoints"], values["keypoints"], atol=1e-4)
        np.testing.assert_allclose(features[name]["scores"], values["scores"], atol=1e-5)
        np.testing.assert_allclose(features[name]["descriptors"], values["descriptors"].T, atol=1e-5)
    pairs = match(expected["a.png"], expected["b.png"])["matches"]
    with h5py.File(photos / "out" / "raw_matches.h5") as raw, h5py.File(photos / "out" / "matches.h5") as verified:
        assert set(map(tuple, raw["a.png"]["b.png"][()].tolist())) == set(map(tuple, pairs.tolist()))
        kept = verified["a.png"]["b.png"][()]
    first, second = features["a.png"]["keypoints"][kept[:, 0]], features["b.png"]["keypoints"][kept[:, 1]]
    assert len(kept) > 100
    assert np.median(distances(cv2.perspectiveTransform(first[None], TO_SECOND)[0], second)) < 0.5


@pytest.mark.integration
def test_tiles_and_the_whole_image_agree(toolbox, photos):
    whole = SAMFeat.from_pretrained("samfeat-slim", weighted_descriptors=False).extract(photos / "images" / "a.png")
    config = configuration(toolbox, photos, tiling="grid")
    config.general.update(tile_size=(256, 192))
    extractor = toolbox.extractors.extractor_loader(toolbox.extractors, "samfeat")(config)
    with h5py.File(extractor.extract(photos / "images" / "a.png")) as file:
        tiled = {key: values[()] for key, values in file["a.png"].items()}
    assert set(tiled["tile_idx"]) == {0, 1, 2, 3}
    matches = cv2.BFMatcher(crossCheck=True).match(
        np.ascontiguousarray(tiled["descriptors"].T), whole["descriptors"].numpy()
    )
    pairs = np.array([(each.queryIdx, each.trainIdx) for each in matches])
    assert len(pairs) > 500
    assert np.median(distances(tiled["keypoints"][pairs[:, 0]], whole["keypoints"].numpy()[pairs[:, 1]])) < 0.5


def distances(first, second):
    return np.linalg.norm(first - second, axis=1)
