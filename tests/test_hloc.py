"""The extractor for hloc, run by hloc's own code; skipped where hloc is not installed."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import skimage.data
from PIL import Image

from samfeat import SAMFeat

FOLDER = Path(__file__).parents[1] / "integrations" / "hloc"


@pytest.mark.integration
def test_hloc_stores_the_features_of_the_extractor(tmp_path, monkeypatch):
    extractors = pytest.importorskip("hloc.extractors", reason="install hloc from its repository")
    extract_features = pytest.importorskip("hloc.extract_features")
    monkeypatch.setattr(extractors, "__path__", [*extractors.__path__, str(FOLDER)])
    (tmp_path / "photos").mkdir()
    Image.fromarray(skimage.data.astronaut()[:320, :480]).save(tmp_path / "photos" / "a.png")
    model = {"name": "samfeat", "weights": "samfeat-slim", "max_keypoints": 300}
    conf = {"output": "features", "model": model, "preprocessing": {"grayscale": False}}
    path = extract_features.main(conf, tmp_path / "photos", tmp_path, as_half=False)
    expected = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=300).extract(tmp_path / "photos" / "a.png")
    with h5py.File(path) as file:
        group = file["a.png"]
        np.testing.assert_allclose(group["keypoints"][()], expected["keypoints"], atol=1e-3)
        np.testing.assert_allclose(group["descriptors"][()], expected["descriptors"].T, atol=1e-4)
        assert group["image_size"][()].tolist() == [480, 320]
