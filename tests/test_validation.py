"""Validation on a toy store: which images are held out, what the figures and the views say of a student."""

from __future__ import annotations

import dataclasses
import itertools
import types

import cv2
import numpy as np
import pytest
import torch
from toys import toy_store

import samfeat.pipelines.training.validation as validating
from samfeat.pipelines.config import load_config
from samfeat.pipelines.training.validation import VIEWED, Validation, hold_out
from samfeat.student.network import PRESETS, SAMFeatNetwork
from samfeat.teacher_cache.store import open_stores

CONFIG = load_config(
    "default", ["data.views.size=0", "run.validation_images=2", "run.validation_pairs=5", "run.max_keypoints=50"]
)
IMAGES = [(0, 0), (0, 5), (0, 7)]


@pytest.fixture(scope="module")
def stores(toy_cache):
    return open_stores(toy_cache)


@pytest.fixture(scope="module")
def network():
    return SAMFeatNetwork(PRESETS["default"], generator=torch.Generator().manual_seed(0))


def validation_of(stores) -> Validation:
    return Validation(stores, IMAGES, CONFIG.run, CONFIG.data)


class Names:
    """What of a store decides what is held out."""

    def __init__(self, *names: str, paired: bool = True, failures: tuple[int, ...] = ()) -> None:
        self.names, self.failures = list(names), dict.fromkeys(failures, "")
        self.spec = types.SimpleNamespace(paired=paired)


def pairs(scene: str, *photographs: str) -> list[str]:
    """Names of all pairs of some photographs."""
    return [f"{scene}/{name}#{k}" for k, pair in enumerate(itertools.combinations(photographs, 2)) for name in pair]


def test_whole_scenes_are_held_out(tmp_path):
    several = Names(*(name for scene in "abcdefgh" for name in pairs(scene, "1.jpg", "2.jpg")))
    held = hold_out([several], CONFIG.run)
    assert len(held) == 2
    assert len({several.names[image].split("/")[0] for _, image in held}) == 1
    assert held == hold_out([several], CONFIG.run)
    assert held != hold_out([several], dataclasses.replace(CONFIG.run, seed=1))
    photos = toy_store(tmp_path / "b.zarr", 12, paired=False)
    assert len(hold_out([photos], CONFIG.run)) == 2


def test_photographs_are_held_out_where_no_scene_can_be_spared(stores):
    held = hold_out(stores, CONFIG.run)  # a scene would be a third of the images: never more than a quarter
    assert len(held) == 2
    assert len({stores[0].names[image].rpartition("#")[0] for _, image in held}) == 1
    scene = Names(*pairs("church", *(f"{k}.jpg" for k in range(12))))
    held = {image for _, image in hold_out([scene], CONFIG.run)}
    photographs = {scene.names[image].rpartition("#")[0] for image in held}
    assert held == {image for image, name in enumerate(scene.names) if name.rpartition("#")[0] in photographs}
    lost = {image // 2 for image in held}
    assert 0 < 2 * len(lost) <= len(scene.names) / 4


def test_nothing_is_held_out_where_nothing_can_be_spared():
    assert hold_out([Names("one.jpg", paired=False)], CONFIG.run) == set()
    assert hold_out([Names(*pairs("church", "1.jpg", "2.jpg", "3.jpg"))], CONFIG.run) == set()
    assert hold_out([Names("a.jpg", "b.jpg", "c.jpg", "d.jpg", paired=False, failures=(1,))], CONFIG.run) == set()


def test_an_untrained_student_and_a_trivial_pair(stores, network):
    validation = validation_of(stores)
    figures = validation.run(network, CONFIG).figures
    assert figures["held_out"] == 1
    assert 0 < figures["keypoints"] <= CONFIG.run.max_keypoints
    assert 0 <= figures["mma@1"] <= figures["mma@3"] <= figures["mma@5"] < 0.5  # untrained: hardly better than chance
    validation.right, validation.homographies = validation.left, torch.eye(3).repeat(5, 1, 1)
    outcome = validation.run(network, CONFIG)
    assert outcome.figures["mma@1"] == 1.0  # every point of an image matches itself
    for view in outcome.views:
        assert len(view.errors) > 0
        assert not view.errors.any()
        assert (view.points[0] == view.points[1]).all()


def test_errors_of_a_view_are_distances_from_the_homography(stores, network):
    validation = validation_of(stores)
    views = validation.run(network, CONFIG).views
    assert len(views) == VIEWED
    for view, homography in zip(views, validation.homographies[[0, 2, 4]].double().numpy()):
        expected = cv2.perspectiveTransform(view.points[:1].astype(np.float64).transpose(1, 0, 2), homography)[:, 0]
        np.testing.assert_allclose(view.errors, np.linalg.norm(expected - view.points[1], axis=1), rtol=1e-6)


def test_a_view_shows_the_image_its_cached_edges_and_the_maps_of_the_network(stores, network):
    views = validation_of(stores).run(network, CONFIG).views
    for view, (store, image) in zip(views, IMAGES):
        targets = stores[store][image]
        assert (view.name, view.teacher) == (stores[store].names[image], "toy")
        assert (view.left == targets.image).all()
        assert (view.cached_edges == targets.edges).all()
        with torch.no_grad():
            dense = network(torch.from_numpy(targets.image).permute(2, 0, 1)[None].float() * 2 / 255 - 1)
        np.testing.assert_allclose(view.heatmap, 1 / (1 + np.exp(-dense.heatmap[0, 0].numpy())), atol=1e-5)
        np.testing.assert_allclose(view.edges, dense.edges[0, 0], atol=1e-5)
        np.testing.assert_allclose(view.attention, dense.attention[0, 0], atol=1e-5)
    again = validation_of(stores).run(network, CONFIG).views
    assert all((view.right == other.right).all() for view, other in zip(views, again))


def test_views_of_fewer_pairs_than_usual(stores, network):
    run = dataclasses.replace(CONFIG.run, validation_pairs=1)
    outcome = Validation(stores, IMAGES, run, CONFIG.data).run(network, CONFIG)
    assert [view.name for view in outcome.views] == [stores[0].names[0]]


def test_windows_of_the_default_preset_are_a_homography_apart(stores, network, monkeypatch):
    monkeypatch.setattr(validating, "relight", lambda images, **_: images)
    config = load_config("default", ["run.validation_pairs=4", "run.max_keypoints=50"])
    validation = Validation(stores, IMAGES, config.run, config.data, held_out=False)
    assert validation.run(network, config).figures["held_out"] == 0
    inside = np.zeros((64, 64), np.float32)
    inside[4:-4, 4:-4] = 1
    for left, right, homography in zip(validation.left, validation.right, validation.homographies.double().numpy()):
        assert left.shape == right.shape == (3, 64, 64)
        moved = cv2.warpPerspective(left.permute(1, 2, 0).numpy(), homography, (64, 64), flags=cv2.INTER_AREA)
        both = cv2.warpPerspective(inside, homography, (64, 64)) > 0.99
        assert both.sum() > 100
        grey, other = (np.float32(picture).mean(axis=2)[both] for picture in (moved, right.permute(1, 2, 0).numpy()))
        assert np.corrcoef(grey, other)[0, 1] > 0.7
