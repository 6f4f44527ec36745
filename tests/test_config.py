"""Configuration: presets, overrides, and errors that name the remedy."""

from __future__ import annotations

import math

import pytest

from samfeat.pipelines.config import CONFIGS, changes, load_config
from samfeat.student.network import PRESETS


@pytest.mark.parametrize("preset", CONFIGS)
def test_presets_load_and_survive_a_round_trip(preset):
    config = load_config(preset)
    assert config.preset == preset
    assert config.to_dict()["losses"]["relation_form"] == config.losses.relation_form
    assert config.network == PRESETS[config.network_preset]


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
        ("default", ["network_preset=tiny"], "network_preset='tiny'"),
        ("default", ["losses=3"], "losses"),
    ],
)
def test_mistakes_are_named_in_one_line(preset, overrides, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        load_config(preset, overrides)
    assert "\n" not in str(error.value)


def test_changes_are_what_differs_from_the_preset(tmp_path):
    assert changes(load_config("paper")) == changes(load_config()) == {}
    changed = changes(load_config("sample", ["losses.edge=3", "optimiser.steps=350", "network_preset=paper"]))
    assert changed.pop("losses.edge") == (10.0, 3.0)
    assert changed.pop("network_preset") == ("default", "paper")
    assert {key.partition(".")[0] for key in changed} == {"network"}
    assert changed["network.edge_attention"] == ("row", "pixel")
    own = tmp_path / "own.yaml"
    own.write_text("optimiser: {steps: 5}")
    config = load_config(str(own), ["optimiser.steps=6"])
    assert changes(config) == {"optimiser.steps": (5, 6)}
    own.unlink()
    with pytest.raises(ValueError, match="unknown preset"):
        changes(config)


def test_the_slim_student_is_one_override_away():
    assert load_config("sample", ["network_preset=slim"]).network == PRESETS["slim"]
