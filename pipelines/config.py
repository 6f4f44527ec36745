"""Every option of training, typed; those of the losses are in :class:`samfeat.student.losses.LossConfig`.

``configs/<preset>.yaml`` holds a preset's changes to these defaults, and ``key=value`` arguments on the command line
override both. D1-D28 are the known differences between the paper and the authors' released code; each is settled here,
in ``LossConfig`` or in :class:`samfeat.student.network.NetworkConfig`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from samfeat.pipelines.homography import HomographyConfig, ViewConfig
from samfeat.student.losses import LossConfig
from samfeat.student.network import PRESETS, NetworkConfig
from samfeat.teacher_cache.schema import flatten

CONFIGS = ("default", "paper", "released", "sample")


@dataclass(frozen=True)
class DataConfig:
    """What a training item is.

    Attributes:
        real_pairs: use the stored pairs as they are (one item per pair and epoch).
        synthetic_pairs: use homography-warped pairs (one item per stored pair, or photograph, and epoch).
        identity_probability: share of synthetic pairs whose second view is an exact copy (released: 0.5).
        warp_targets: warp the clean view's targets along for the warped view; the released code drops its supervision
            instead.
        photometric_probability: share of items whose views get light, contrast, noise and blur changes.
        homography: the distribution of the homographies.
        views: windows of both images instead, with a wider and growing distribution; ``views.size`` turns them on, and
            ``identity_probability``, ``warp_targets``, ``photometric_probability`` and ``homography`` are then not used
            in training.
        label_threshold: detector labels with a lower score are not used.
        workers: threads that read the stores ahead; 0 reads on demand.
        in_memory: ``host`` or ``device`` copies everything that training needs there before the first step, and reads
            no files afterwards.
    """

    real_pairs: bool = True
    synthetic_pairs: bool = True
    identity_probability: float = 0.0
    warp_targets: bool = True
    photometric_probability: float = 0.5
    homography: HomographyConfig = field(default_factory=HomographyConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    label_threshold: float = 0.0
    workers: int = 1
    in_memory: Literal["none", "host", "device"] = "none"


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam and its schedule.

    Attributes:
        learning_rate: peak learning rate.
        weight_decay: L2-style decay, as in the released code.
        schedule: ``linear`` to zero per step, after a warm-up; ``cosine``, the same along half a cosine; ``released``
            steps once per epoch, as in the released code.
        warmup: share of all steps spent rising to the peak (not with ``released``).
        batch_size: items (pairs) per step, over all processes; twice as many images.
        epochs: passes over all items.
        steps: stop after this many steps instead (and fit the schedule to them).
        clip_norm: maximum norm of the gradient; 0 does not clip.
        average: decay of the moving average of the weights that is validated and saved as the student; 0 uses the
            weights themselves.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Literal["linear", "cosine", "released"] = "linear"
    warmup: float = 0.02
    batch_size: int = 14
    epochs: int = 30
    steps: int | None = None
    clip_norm: float = 0.0
    average: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out.

    Attributes:
        seed: determines every random choice.
        init: weights of a student of the same network to start from; empty for random ones.
        precision: ``auto`` is bf16 if the device supports it in hardware, else fp32.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        compile: compile the network with torch.compile, which takes a minute and needs a C++ compiler.
        validation_images: images held out of training for validation, whole scenes at a time, or photographs of one
            scene if there are too few scenes.
        validation_pairs: homography pairs made from them, the same at every validation.
        validate_every, checkpoint_every, log_every: in steps.
        max_keypoints: keypoints per image in validation.
    """

    seed: int = 0
    init: str = ""
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
    """One training run.

    Attributes:
        preset: the preset that the other values are based on.
        network_preset: the network that ``network`` is based on: ``default``, ``slim``, ``paper`` or ``released``.
    """

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
        if not 0 <= self.optimiser.average < 1:
            raise ValueError(f"optimiser.average={self.optimiser.average}: a decay below 1, such as 0.999, or 0")
        if not (self.data.real_pairs or self.data.synthetic_pairs):
            raise ValueError("data.real_pairs and data.synthetic_pairs are both off: nothing is left to train on")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written into checkpoints and run folders."""
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self), enum_to_str=True))


def load_config(preset: str = "default", overrides: Sequence[str] = ()) -> Config:
    """Load a preset (a name in ``CONFIGS``, or the path of a YAML file) with ``key=value`` overrides.

    Values are YAML without interpolation: ``${...}`` is refused.

    Raises:
        ValueError: unknown preset, unknown key (with the nearest known ones), bad YAML, or a value of the wrong type.
    """
    changes = _read_preset(preset)
    for override in overrides:
        _merge(changes, *_parse_override(override))
    named = changes.get("network_preset", preset if preset in PRESETS else "default")
    if named not in list(PRESETS):
        raise ValueError(f"network_preset={named!r}: choose from {', '.join(PRESETS)}")
    config = OmegaConf.structured(Config(preset=preset, network_preset=named, network=PRESETS[named]))
    OmegaConf.set_readonly(config, False)
    known = _keys(Config)
    for key, value in _leaves(changes):
        if key not in known:
            raise ValueError(_unknown_key(key, known))
        try:
            if value in ({}, MISSING):
                raise TypeError("a value is missing")
            nested: dict[str, Any] = {}
            _merge(nested, key.split("."), value)
            config = OmegaConf.merge(config, nested)
        except (OmegaConfBaseException, TypeError, OverflowError) as error:
            raise ValueError(f"configuration key {key}: {value!r} does not fit here ({_reason(error)})") from error
    try:
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration key {getattr(error, 'full_key', None) or '?'}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return "wrong type" if "$VALUE" in text else text  # a placeholder that OmegaConf does not fill in lists


def _parse_override(override: str) -> tuple[list[str], Any]:
    """The parts of the key, and the value, of ``key=value``."""
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(name.isidentifier() for name in names):
        raise ValueError(f"{override!r} is not of the form key=value, for example optimiser.batch_size=4")
    return names, _parse_yaml(text, f"override {override!r}")


def _merge(changes: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Set a value in nested dictionaries; a dictionary is merged into the existing one."""
    for name in names[:-1]:
        inner = changes.get(name)
        changes[name] = changes = dict(inner) if isinstance(inner, dict) else {}
    there = changes.get(names[-1])
    if isinstance(value, dict) and isinstance(there, dict):
        for key, inner in value.items():
            _merge(there, [key], inner)
    else:
        changes[names[-1]] = value


def _parse_yaml(text: str, where: str) -> Any:
    """A value in YAML, of plain types.

    Raises:
        ValueError: not valid YAML, a duplicate key, or an interpolation.
    """
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict):
            value = OmegaConf.to_container(OmegaConf.create(text))  # refuses duplicate keys
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where} is not valid YAML ({reason})") from None
    if "${" in text:
        raise ValueError(f"{where} holds ${{...}}: values are not interpolated, write them out")
    return value


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """Error message for an unknown key: suggests the nearest one, or lists its section."""
    inside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == key]
    if inside:
        return f"configuration key {key!r} is a section: set {key}.{inside[0]} or another of its keys"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if near:
        return f"unknown configuration key {key!r}: did you mean {near[0]!r}?"
    section, _, name = key.rpartition(".")
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    if same_name:
        return f"unknown configuration key {key!r}: did you mean {' or '.join(map(repr, same_name))}?"
    members = [other for other in known if other.startswith(f"{section}.") and "." not in other[len(section) + 1 :]]
    if section and members:
        return f"unknown configuration key {key!r}: {section} has {', '.join(o.rpartition('.')[2] for o in members)}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown configuration key {key!r}: did you mean {near[0]!r}? `samfeat-cli config` lists all keys"


def changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """Differences from the configuration's preset: (value of the preset, current value) by dotted key.

    Raises:
        ValueError: the preset is a file that is no longer there.
    """
    preset, mine = flatten(load_config(config.preset).to_dict()), flatten(config.to_dict())
    return {key: (preset[key], value) for key, value in mine.items() if value != preset[key]}


def learning_rate(config: OptimiserConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of one step.

    ``linear`` and ``cosine``: up over the warm-up, then down to zero at the end. ``released``: the factor
    1 - max(0, e - 1) / 31 in epoch e of 30 (the released code steps its scheduler late, so that the first two epochs
    share the peak).
    """
    if config.schedule == "released":
        epoch = step // steps_per_epoch
        return config.learning_rate * (1 - max(0, epoch - 1) / (config.epochs + 1))
    rising = max(1, round(config.warmup * steps))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    left = max(0.0, (steps - step) / max(1, steps - rising))
    if config.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return config.learning_rate * left


def _read_preset(preset: str) -> dict[str, Any]:
    if preset in CONFIGS:
        text = (resources.files("samfeat.pipelines.configs") / f"{preset}.yaml").read_text()
    elif Path(preset).suffix in {".yaml", ".yml"} and Path(preset).is_file():
        try:
            text = Path(preset).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{preset} is not a text file (UTF-8)") from None
    else:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(CONFIGS)}, or give a .yaml file")
    values = _parse_yaml(text, preset)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{preset}: a configuration file holds keys and values, such as `optimiser: {{steps: 100}}`")
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


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values; an empty dictionary is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = prefix + str(key)
        found += _leaves(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found
