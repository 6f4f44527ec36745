"""The student as a local feature of kornia, run by kornia's own matchers."""

import kornia.feature as kf
import numpy as np
import pytest
import skimage.data
import torch

from samfeat import SAMFeat, match
from samfeat.student.kornia import KorniaFeature


@pytest.fixture(scope="module")
def student():
    return SAMFeat.from_pretrained("samfeat-slim", max_keypoints=300)


@pytest.fixture(scope="module")
def pair():
    left, right, _ = skimage.data.stereo_motorcycle()
    return [torch.from_numpy(view[100:340, 200:520]).permute(2, 0, 1)[None] / 255 for view in (left, right)]


def test_kornias_matcher_finds_our_matches(student, pair):
    # by distance, which ranks as cosine similarity does for descriptors of unit length
    unit = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=300, weighted_descriptors=False)
    matcher = kf.LocalFeatureMatcher(KorniaFeature(unit), kf.DescriptorMatcher("mnn", 1.0))
    found = matcher({"image0": pair[0], "image1": pair[1]})
    first, second = (student.extract(image) for image in pair)
    matches = match(first, second, cosine=True)["matches"]
    assert len(matches) > 100
    ours = np.hstack((first["keypoints"][matches[:, 0]], second["keypoints"][matches[:, 1]]))
    theirs = np.hstack((found["keypoints0"], found["keypoints1"]))
    assert set(map(tuple, theirs.round(3))) == set(map(tuple, ours.round(3)))


def test_a_batch_is_filled_up_and_kornia_tells_the_filling(pair):
    student = SAMFeat.from_pretrained("samfeat-slim", max_keypoints=300, detection_threshold=0.3)
    images = torch.cat((pair[0], torch.full_like(pair[0], 0.5), pair[1]))
    lafs, responses, descriptors = KorniaFeature(student, scale=6.0)(images)
    alone = [student.extract(image) for image in images]
    counts = [len(features["keypoints"]) for features in alone]
    assert counts[1] < counts[0]
    assert kf.laf_is_filled(lafs).sum(1).tolist() == counts
    for number, features in enumerate(alone):
        kept = kf.laf_is_filled(lafs)[number]
        torch.testing.assert_close(kf.get_laf_center(lafs)[number, kept], features["keypoints"])
        torch.testing.assert_close(responses[number, kept], features["scores"])
        torch.testing.assert_close(descriptors[number, kept], features["descriptors"])
    kept = kf.laf_is_filled(lafs)[0]
    assert kf.get_laf_scale(lafs)[0, kept].flatten().tolist() == pytest.approx([6.0] * counts[0])
    assert kf.get_laf_orientation(lafs)[0, kept].abs().max() < 1e-4


def test_grey_images_masks_and_wrong_shapes(student, pair):
    grey = pair[0].mean(1, keepdim=True)
    mask = torch.ones_like(grey)
    mask[..., :160] = 0
    lafs, _, _ = KorniaFeature(student)(grey, mask)
    expected = student.extract(grey)["keypoints"]
    expected = expected[expected[:, 0].round() >= 160]
    assert 0 < len(expected) < 300
    torch.testing.assert_close(kf.get_laf_center(lafs)[0], expected)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, H, W\]"):
        KorniaFeature(student)(pair[0][0])
    with pytest.raises(ValueError, match="the mask of images"):
        KorniaFeature(student)(grey, mask[..., 1:])


def test_kornias_lightglue_takes_the_frames(student, pair):
    torch.manual_seed(0)
    network = kf.LightGlue(features=None, input_dim=128, descriptor_dim=32, n_layers=2, num_heads=2).eval()
    torch.nn.init.orthogonal_(network.log_assignment[-1].final_proj.weight, gain=8.0)
    torch.nn.init.constant_(network.log_assignment[-1].matchability.bias, 5.0)
    matcher = kf.LightGlueMatcher.__new__(kf.LightGlueMatcher)  # its constructor downloads weights
    kf.GeometryAwareDescriptorMatcher.__init__(matcher, "aliked")
    matcher.feature_name, matcher.matcher = "aliked", network
    (lafs0, _, first), (lafs1, _, second) = (KorniaFeature(student)(image) for image in pair)
    scores, index = matcher(first[0], second[0], lafs0, lafs1, (240, 320), (240, 320))
    data = {
        f"image{number}": {
            "keypoints": features["keypoints"][None],
            "descriptors": features["descriptors"][None],
            "image_size": features["image_size"][None],
        }
        for number, features in enumerate(map(student.extract, pair))
    }
    with torch.no_grad():
        expected = network(data)
    assert len(index) > 0
    torch.testing.assert_close(index, expected["matches"][0])
    torch.testing.assert_close(scores[:, 0], expected["scores"][0])
