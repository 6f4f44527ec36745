"""torch.hub, from a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from samfeat import SAMFeat, match

ROOT = Path(__file__).parents[1]


def hub(**options):
    return torch.hub.load(str(ROOT), "samfeat", source="local", **options)


def test_features_have_the_documented_keys_and_match(tmp_path):
    SAMFeat("default", detection_threshold=0.0, max_keypoints=50).save(tmp_path / "w.safetensors")
    model = hub(weights=str(tmp_path / "w.safetensors"))
    image = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    found = model.extract(image)
    assert {key: tuple(values.shape) for key, values in found.items()} == {
        "keypoints": (50, 2), "scores": (50,), "descriptors": (50, 128), "image_size": (2,),
    }  # fmt: skip
    assert found["image_size"].tolist() == [80, 64]
    pairs = match(found, found, cosine=True)["matches"]
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert len(pairs) == 50


def test_weights_say_which_network_they_belong_to(tmp_path):
    SAMFeat("released", max_keypoints=7).save(tmp_path / "w.safetensors")
    model = hub(weights=str(tmp_path / "w.safetensors"), border=2)
    assert model.network.config.sampling == "released"
    assert (model.extraction.max_keypoints, model.extraction.border) == (7, 2)


def test_a_preset_and_its_mistakes(tmp_path):
    assert hub(preset="released", max_keypoints=3).extraction.max_keypoints == 3
    with pytest.raises(ValueError, match="no preset 'best'"):
        hub(preset="best")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.safetensors is neither"):
        hub(weights=str(tmp_path / "bad.safetensors"))
