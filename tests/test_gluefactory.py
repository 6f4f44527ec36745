"""The extractor and configurations for glue-factory, run by its own code; skipped where it is not installed."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from omegaconf import OmegaConf

from samfeat import LightGlue, SAMFeat

FOLDER = Path(__file__).parents[1] / "integrations" / "gluefactory"
SMALL = OmegaConf.create(
    {
        "extractor": {"weights": "samfeat-slim", "max_num_keypoints": 200},
        "matcher": {"descriptor_dim": 32, "n_layers": 2, "num_heads": 2},
    }
)


@pytest.fixture
def get_model(monkeypatch):
    models = pytest.importorskip("gluefactory.models", reason="install glue-factory from its repository")
    monkeypatch.syspath_prepend(str(FOLDER))
    return models.get_model


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(skimage.data.astronaut()[:240, :320].copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.integration
def test_features_are_ours_on_the_image_without_its_padding(get_model, image):
    options = {"max_num_keypoints": 1500, "detection_threshold": 0.3, "force_num_keypoints": True}
    extractor = get_model("samfeat_extractor")({"weights": "samfeat-slim"} | options)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 80))
    found = extractor({"image": padded, "image_size": torch.tensor([[320, 240]])})
    student = SAMFeat.from_pretrained(
        "samfeat-slim", max_keypoints=1500, detection_threshold=0.3, weighted_descriptors=False
    )
    expected = student.extract(image)
    count = len(expected["keypoints"])
    assert 50 < count < 1500
    assert found["keypoints"].shape == (1, 1500, 2)
    torch.testing.assert_close(found["keypoints"][0, :count], expected["keypoints"] + 0.5)
    torch.testing.assert_close(found["keypoint_scores"][0, :count], expected["scores"])
    torch.testing.assert_close(found["descriptors"][0, :count], expected["descriptors"])
    assert (found["descriptors"][0, :count].norm(dim=1) - 1).abs().max() < 1e-4
    assert found["descriptors"][0, count:].abs().max() == 0
    assert (found["keypoints"][0, count:] <= torch.tensor([320, 240])).all()


@pytest.mark.integration
def test_the_extractor_is_not_trained(get_model):
    with pytest.raises(ValueError, match="samfeat-cli train"):
        get_model("samfeat_extractor")({"weights": "samfeat-slim", "trainable": True})


@pytest.mark.integration
def test_lightglue_learns_from_homographies_goes_on_with_megadepth_and_is_read_here(get_model, image, tmp_path):
    conf = OmegaConf.merge(OmegaConf.load(FOLDER / "samfeat+lightglue_homography.yaml").model, SMALL)
    torch.manual_seed(0)
    model = get_model(conf.name)(conf).train()
    moved = torch.roll(image, (6, 10), dims=(2, 3))
    view = {"image_size": torch.tensor([[320, 240]])}
    homography = torch.tensor([[[1.0, 0, 10], [0, 1, 6], [0, 0, 1]]])
    data = {"view0": view | {"image": image}, "view1": view | {"image": moved}, "H_0to1": homography}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    before = {name: values.clone() for name, values in model.extractor.state_dict().items()}
    losses = []
    for _ in range(15):
        loss = model.loss(model(data), data)[0]["total"].mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert all(torch.equal(values, before[name]) for name, values in model.extractor.state_dict().items())

    conf = OmegaConf.merge(OmegaConf.load(FOLDER / "samfeat+lightglue_megadepth.yaml").model, SMALL)
    second = get_model(conf.name)(conf).eval()
    second.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, same = second(data), model.eval()(data)
    torch.testing.assert_close(found["log_assignment"], same["log_assignment"])

    torch.save({"model": second.state_dict()}, tmp_path / "checkpoint_best.tar")
    ours = LightGlue.from_pretrained(tmp_path / "checkpoint_best.tar")
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=200)
    matched = ours(*(student.extract(each) for each in (image, moved)))
    index = (found["matches0"][0] >= 0).nonzero()[:, 0]
    assert len(index) > 0
    torch.testing.assert_close(matched["matches"], torch.stack((index, found["matches0"][0, index]), dim=1))
    torch.testing.assert_close(matched["scores"], found["matching_scores0"][0, index])
