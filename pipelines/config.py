"""Every knob of training, once, typed.

The defaults of these dataclasses are the ``default`` preset; ``configs/<preset>.yaml`` holds what another preset
changes, and ``key=value`` arguments on the command line come last. D1-D28 are the known differences between the paper
and the code that its authors released; each is decided here or in :class:`samfeat.student.network.NetworkConfig`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from samfeat.pipelines.homography import HomographyConfig
from samfeat.student.network import PRESETS, NetworkConfig
from samfeat.teacher_cache.schema import flatten

CONFIGS = ("default", "paper", "released", "sample")


@dataclass(frozen=True)
class DataConfig:
    """What a training item is.

    Attributes:
        real_pairs: use the stored pairs as they are (one item a pair and epoch).
        synthetic_pairs: use homography-warped pairs (one item a stored pair, or a photograph, and epoch).
        identity_probability: share of synthetic pairs whose second view is an exact copy (released: 0.5).
        warp_targets: give the warped view the clean view's targets, warped along; the released code drops its
            supervision instead.
        photometric_probability: share of items whose views get light, contrast, noise and blur changes.
        homography: the distribution of the homographies.
        label_threshold: detector labels with a lower score are not used.
        workers: threads that read the stores ahead; 0 reads when the step asks.
        in_memory: ``host`` or ``device`` copies all that training needs of the stores there once, before the first
            step, and reads no file afterwards.
    """

    real_pairs: bool = True
    synthetic_pairs: bool = True
    identity_probability: float = 0.0
    warp_targets: bool = True
    photometric_probability: float = 0.5
    homography: HomographyConfig = field(default_factory=HomographyConfig)
    label_threshold: float = 0.0
    workers: int = 1
    in_memory: Literal["none", "host", "device"] = "none"


@dataclass(frozen=True)
class LossConfig:
    """Forms, constants and weights of the losses (paper eq. 1-14; weights are all 1 there).

    Attributes:
        detection, descriptor, relation, edge, wsc: weights of the five terms; 0 leaves a term out.
        positive_weight: lambda of eq. 1.
        detection_form: ``released`` (1e-4 inside the logarithms, which damps a saturated start) or ``paper`` (D18).
        deep_supervision: every detection head is supervised as well, not the fused map alone (D6).
        descriptor_form: ``triplet`` (eq. 4-6) or ``contrastive`` (cross-entropy over the dot products that
            matching ranks).
        contrastive_temperature: temperature of ``contrastive``.
        descriptor_temperature: T of eq. 6 (D7).
        descriptor_margin: the 1 of eq. 6.
        both_directions: anchors from both images of a pair, not the left one alone (D19).
        relation_form: ``eq8`` (attention-weighted), ``unweighted`` (what the released code computes: its attention
            cancels, D10), or ``features`` (DSFD of Table V).
        wsc_form: ``mean_softplus`` (what the text of III-C means), ``masked_infonce``, or ``released`` (D12, D13).
        wsc_margin, wsc_temperature: M and T of eq. 11.
        background_is_group: pixels under no mask form a group of their own (D24).
        edge_form: ``mse`` or ``l1``, both means (D8).
        edge_pooling: how the target comes to quarter resolution (D4).
    """

    detection: float = 1.0
    descriptor: float = 1.0
    relation: float = 1.0
    edge: float = 1.0
    wsc: float = 1.0
    positive_weight: float = 200.0
    detection_form: Literal["released", "paper"] = "paper"
    deep_supervision: bool = False
    descriptor_form: Literal["triplet", "contrastive"] = "contrastive"
    contrastive_temperature: float = 0.1
    descriptor_temperature: float = 15.0
    descriptor_margin: float = 1.0
    both_directions: bool = True
    relation_form: Literal["eq8", "unweighted", "features"] = "eq8"
    wsc_form: Literal["mean_softplus", "masked_infonce", "released"] = "mean_softplus"
    wsc_margin: float = 0.07
    wsc_temperature: float = 5.0
    background_is_group: bool = False
    edge_form: Literal["mse", "l1"] = "mse"
    edge_pooling: Literal["bilinear", "area", "max"] = "max"


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam and its schedule.

    Attributes:
        learning_rate: peak learning rate.
        weight_decay: L2-style decay, as in the released code.
        schedule: ``linear`` to zero per step, after a warm-up; ``released`` steps once an epoch, as the released code.
        warmup: share of all steps spent rising to the peak (``linear`` only).
        batch_size: items (pairs) in a step, over all processes; twice as many images.
        epochs: passes over all items.
        steps: stop after that many steps instead (and shape the schedule for them).
        clip_norm: largest norm of the gradient; 0 does not clip.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Literal["linear", "released"] = "linear"
    warmup: float = 0.02
    batch_size: int = 14
    epochs: int = 30
    steps: int | None = None
    clip_norm: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """How a run goes along.

    Attributes:
        seed: every random choice follows from it.
        precision: ``auto`` is bf16 where the device has it in hardware, else fp32.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        compile: translate the network with torch.compile, which takes a minute and a C++ compiler.
        validation_images: images kept out of training, whole scenes at a time, for validation.
        validation_pairs: homography pairs made from them, the same ones at every validation.
        validate_every, checkpoint_every, log_every: in steps.
        max_keypoints: keypoints of an image in validation.
    """

    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    validation_images: int = 8
    validation_pairs: int = 16
    validate_every: int = 1000
    checkpoint_every: int = 500
    log_every: int = 20
    max_keypoints: int = 1024


@dataclass(frozen=True)
class Config:
    """One training run, whole."""

    preset: str = "default"
    network_preset: str = "default"
    network: NetworkConfig = field(default_factory=lambda: PRESETS["default"])
    data: DataConfig = field(default_factory=DataConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        positive = {
            "optimiser.batch_size": self.optimiser.batch_size,
            "optimiser.epochs": self.optimiser.epochs,
            "optimiser.steps": 1 if self.optimiser.steps is None else self.optimiser.steps,
            "optimiser.learning_rate": self.optimiser.learning_rate,
            "run.log_every": self.run.log_every,
            "run.validate_every": self.run.validate_every,
            "run.checkpoint_every": self.run.checkpoint_every,
        }
        for key, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key}={value}: must be positive")
        if not (self.data.real_pairs or self.data.synthetic_pairs):
            raise ValueError("data.real_pairs and data.synthetic_pairs are both off: nothing is left to train on")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into checkpoints and run folders."""
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True))


def load_config(preset: str = "default", overrides: Sequence[str] = ()) -> Config:
    """The configuration of a preset (a name of ``CONFIGS``, or the path of a YAML file), with ``key=value`` overrides.

    Raises:
        ValueError: unknown preset, unknown key (with the nearest known one), or a value of the wrong type.
    """
    changes = _read_preset(preset)
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ValueError(f"{override!r} is not of the form key=value, for example optimiser.batch_size=4")
    try:
        changes.merge_with(OmegaConf.from_dotlist(list(overrides)))
        named = str(changes.get("network_preset", preset if preset in PRESETS else "default"))
        if named not in PRESETS:
            raise ValueError(f"network_preset={named!r}: choose from {', '.join(PRESETS)}")
        base = OmegaConf.structured(Config(preset=preset, network_preset=named, network=PRESETS[named]))
        known = _keys(Config)
        for key in _leaves(changes):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown configuration key {key!r}: did you mean {near!r}?")
        OmegaConf.set_readonly(base, False)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(base, changes)))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"configuration key {getattr(error, 'full_key', None) or '?'}: {reason}") from error


def changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """What differs from the configuration's preset: (value of the preset, value in force) by dotted key.

    Raises:
        ValueError: the preset is a file that is no longer there.
    """
    preset, mine = flatten(load_config(config.preset).to_dict()), flatten(config.to_dict())
    return {key: (preset[key], value) for key, value in mine.items() if value != preset[key]}


def learning_rate(config: OptimiserConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of one step.

    ``linear``: up over the warm-up, then down to zero at the end. ``released``: the factor 1 - max(0, e - 1) / 31 in
    epoch e of 30 (the released code steps its scheduler late, so that the first two epochs share the peak).
    """
    if config.schedule == "released":
        epoch = step // steps_per_epoch
        return config.learning_rate * (1 - max(0, epoch - 1) / (config.epochs + 1))
    rising = max(1, round(config.warmup * steps))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    return config.learning_rate * max(0.0, (steps - step) / max(1, steps - rising))


def _read_preset(preset: str) -> DictConfig:
    if preset == "default":
        return OmegaConf.create({})
    if preset in CONFIGS:
        text = (resources.files("samfeat.pipelines.configs") / f"{preset}.yaml").read_text()
    elif Path(preset).suffix in {".yaml", ".yml"} and Path(preset).is_file():
        text = Path(preset).read_text()
    else:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(CONFIGS)}, or give a .yaml file")
    values = OmegaConf.create(text)
    if not isinstance(values, DictConfig):
        raise ValueError(f"{preset}: a configuration file holds keys and values")
    return values


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a configuration dataclass."""
    found: list[str] = []
    instance = cls() if isinstance(cls, type) else cls
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        name = prefix + entry.name
        found += _keys(value, f"{name}.") if is_dataclass(value) else [name]
    return found


def _leaves(config: DictConfig, prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in config.items():
        name = prefix + str(key)
        found += _leaves(value, f"{name}.") if isinstance(value, DictConfig) else [name]
    return found
