"""Validation on a toy store: which images are held out, what the figures and the views say of a student."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from toys import toy_store

from samfeat.pipelines.config import load_config
from samfeat.pipelines.training.validation import VIEWED, Validation, hold_out
from samfeat.student.network import PRESETS, SAMFeatNetwork
from samfeat.teacher_cache.store import open_stores

CONFIG = load_config("default", ["run.validation_images=2", "run.validation_pairs=5", "run.max_keypoints=50"])
IMAGES = [(0, 0), (0, 5), (0, 7)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    toy_store(folder / "a.zarr")
    return open_stores(folder)


@pytest.fixture(scope="module")
def network():
    return SAMFeatNetwork(PRESETS["default"], generator=torch.Generator().manual_seed(0))


def validation_of(stores) -> Validation:
    return Validation(stores, IMAGES, CONFIG.run, CONFIG.data.homography)


def test_whole_scenes_are_held_out(stores, tmp_path):
    assert hold_out(stores, CONFIG.run) == set()  # a scene would be a third of the images: never more than a quarter
    photos = toy_store(tmp_path / "b.zarr", 12, paired=False)
    held = hold_out([photos], CONFIG.run)
    assert len(held) == 2
    assert held == hold_out([photos], CONFIG.run)


def test_an_untrained_student_and_a_trivial_pair(stores, network):
    validation = validation_of(stores)
    figures = validation.run(network, CONFIG).figures
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
    outcome = Validation(stores, IMAGES, run, CONFIG.data.homography).run(network, CONFIG)
    assert [view.name for view in outcome.views] == [stores[0].names[0]]
