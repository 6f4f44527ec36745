"""Configuration: presets, overrides, and errors that name the remedy."""

from __future__ import annotations

import inspect
import math
import re

import pytest

from samfeat.pipelines.config import CONFIGS, Config, changes, load_config
from samfeat.student.losses import (
    LossConfig,
    contrastive_descriptor_loss,
    descriptor_loss,
    detection_loss,
    edge_loss,
    excluded_negatives,
    wsc_loss,
)
from samfeat.student.network import PRESETS


@pytest.mark.parametrize("preset", CONFIGS)
def test_presets_load_and_survive_a_round_trip(preset):
    config = load_config(preset)
    assert config.preset == preset
    assert config.to_dict()["losses"]["relation_form"] == config.losses.relation_form
    assert config.network == PRESETS[config.network_preset]


def test_default_is_a_preset_like_the_others_and_the_dataclasses_keep_the_papers_values():
    config, plain = load_config(), Config()
    assert (config.losses.detection_form, plain.losses.detection_form) == ("peaks", "paper")
    assert (config.data.views.size, plain.data.views.size) == (192, 0)
    assert (config.optimiser.average, plain.optimiser.average) == (0.999, 0.0)
    assert (config.optimiser.schedule, plain.optimiser.schedule) == ("cosine", "linear")


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (detection_loss, {"positive_weight": "positive_weight", "form": "detection_form"}),
        (excluded_negatives, {"radius": "negative_radius"}),
        (descriptor_loss, {"temperature": "descriptor_temperature", "margin": "descriptor_margin"}),
        (contrastive_descriptor_loss, {"temperature": "contrastive_temperature"}),
        (
            wsc_loss,
            {
                "form": "wsc_form",
                "margin": "wsc_margin",
                "temperature": "wsc_temperature",
                "background_is_group": "background_is_group",
            },
        ),
        (edge_loss, {"form": "edge_form", "pooling": "edge_pooling"}),
    ],
)
def test_a_loss_and_its_configuration_have_one_default(function, options):
    parameters = inspect.signature(function).parameters
    for own, configured in options.items():
        assert parameters[own].default == getattr(LossConfig(), configured)


def test_released_preset_is_the_released_training():
    config = load_config("released")
    assert config.network == PRESETS["released"]
    assert (config.optimiser.batch_size, config.optimiser.epochs) == (12, 30)
    assert (config.optimiser.learning_rate, config.optimiser.weight_decay) == (1e-3, 1e-4)
    assert config.data.identity_probability == 0.5
    assert not config.data.warp_targets
    assert math.isclose(config.data.homography.rotation, math.pi / 2)
    losses = config.losses
    assert (losses.descriptor_temperature, losses.wsc_margin, losses.wsc_temperature) == (14, 0.07, 5)
    assert (losses.relation_form, losses.wsc_form, losses.edge_form) == ("unweighted", "released", "mse")


def test_overrides_win_over_presets():
    config = load_config("released", ["optimiser.batch_size=3", "network.edge_attention=none", "losses.wsc=0"])
    assert config.optimiser.batch_size == 3
    assert config.network.edge_attention == "none"
    assert config.network.initialisation == "released"
    assert config.losses.wsc == 0


def test_a_yaml_file_is_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("network_preset: paper\noptimiser:\n  steps: 7\n")
    config = load_config(str(tmp_path / "mine.yaml"), ["optimiser.batch_size=2"])
    assert (config.network, config.optimiser.steps, config.optimiser.batch_size) == (PRESETS["paper"], 7, 2)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("defualt", [], "unknown preset 'defualt'"),
        ("default", ["optimiser.batchsize=3"], "did you mean 'optimiser.batch_size'"),
        ("default", ["losses.relations=0"], "did you mean 'losses.relation'"),
        ("default", ["lr=1"], "unknown configuration key 'lr'"),
        ("default", ["optimiser.batch_size=many"], "optimiser.batch_size"),
        ("default", ["losses.wsc_form=infonce"], "losses.wsc_form"),
        ("default", ["network.edge_attention=columns"], "edge_attention"),
        ("default", ["optimiser.batch_size"], "not of the form key=value"),
        ("default", ["optimiser.batch_size=0"], "must be positive"),
        ("default", ["optimiser.learning_rate=nan"], "must be positive"),
        ("default", ["data.real_pairs=false", "data.synthetic_pairs=false"], "nothing is left to train on"),
        (
            "default",
            [f"losses.{name}=0" for name in ("detection", "descriptor", "relation", "edge", "wsc")],
            "every weight is 0",
        ),
        ("default", ["optimiser.average=1"], "a decay below 1"),
        ("default", ["data.views.size=100"], "must be a multiple of 8"),
        ("default", ["data.views.scale=0.5"], "scale must be at least 1"),
        ("default", ["data.views.mild=2"], "shares in [0, 1]"),
        ("default", ["network_preset=tiny"], "network_preset='tiny'"),
        ("default", ["losses=3"], "losses"),
        ("default", ["optimiser.weight_decay=" + 400 * "9"], "optimiser.weight_decay"),
    ],
)
def test_mistakes_are_named_in_one_line(preset, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_config(preset, overrides)
    assert "\n" not in str(error.value)


def test_changes_are_what_differs_from_the_preset(tmp_path):
    assert changes(load_config("paper")) == changes(load_config()) == {}
    assert changes(load_config("default", ["data.views.size=64"])) == {"data.views.size": (192, 64)}
    changed = changes(load_config("sample", ["losses.edge=3", "optimiser.steps=350", "network_preset=paper"]))
    assert changed.pop("losses.edge") == (10.0, 3.0)
    assert changed.pop("network_preset") == ("default", "paper")
    assert {key.partition(".")[0] for key in changed} == {"network"}
    assert changed["network.edge_attention"] == ("none", "pixel")
    assert changed["network.widths"] == ((16, 32, 64, 128), (64, 64, 128, 128))
    own = tmp_path / "own.yaml"
    own.write_text("optimiser: {steps: 5}")
    config = load_config(str(own), ["optimiser.steps=6"])
    assert changes(config) == {"optimiser.steps": (5, 6)}
    own.unlink()
    with pytest.raises(ValueError, match="unknown preset"):
        changes(config)


def test_the_slim_student_is_one_override_away():
    assert load_config("sample", ["network_preset=slim"]).network == PRESETS["slim"]
