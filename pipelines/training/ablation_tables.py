"""The tables of an ablation: strict reading of a YAML file, and the training run of every row and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from samfeat.pipelines.config import Config, load_config
from samfeat.student.extractor import ExtractionConfig
from samfeat.teacher_cache.store import TeacherCache


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        paper: the paper's number; None if there is none.
        change: configuration keys such as ``losses.wsc`` and their values.
        extraction: test-time options to override (:class:`samfeat.student.extractor.ExtractionConfig`).
    """

    paper: float | None = None
    change: dict[str, Any] = field(default_factory=dict)
    extraction: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AblationTable:
    """One table.

    Attributes:
        title: its title.
        measure: ``accuracy`` of trained students, or ``step_time`` of training.
        paper: description of the paper's numbers, with their unit; empty if there are none.
        reference: the row that the others are compared with; by default the first one.
        change: applied to all rows, before their own.
        rows: by name.
    """

    title: str
    measure: Literal["accuracy", "step_time"] = "accuracy"
    paper: str = ""
    reference: str | None = None
    change: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablations:
    """A file of tables; ``extraction`` holds the options of every student on sequences."""

    extraction: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, AblationTable] = field(default_factory=dict)


class Run(NamedTuple):
    """One training run.

    Attributes:
        key: digest of the configuration (but for its seed) and of the stores.
        config: the configuration, seed included.
    """

    key: str
    config: Config

    @property
    def folder(self) -> str:
        """Place below the folder of the ablations."""
        return f"runs/{self.key}/seed{self.config.run.seed}"


def load_ablations(path: str | Path | None = None) -> Ablations:
    """Load the tables in a YAML file; by default the project's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, a value of the wrong type, a table without rows, an unknown reference.
    """
    own = resources.files("samfeat.pipelines.configs") / "ablations.yaml"
    text = own.read_text() if path is None else Path(path).read_text()
    name = path or "ablations.yaml"
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Ablations), OmegaConf.create(text))
        found = cast(Ablations, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        where = getattr(error, "full_key", None)
        raise ValueError(f"{name}: {f'{where}: ' if where else ''}{str(error).splitlines()[0]}") from error
    if not found.tables:
        raise ValueError(f"{name} holds no table: give some under `tables`")
    known = [option.name for option in fields(ExtractionConfig)]
    for title, table in found.tables.items():
        if not table.rows:
            raise ValueError(f"{name}: table {title} has no rows")
        if table.reference is not None and table.reference not in table.rows:
            raise ValueError(f"{name}: table {title} has no row {table.reference!r} to refer to")
        for options in (found.extraction, *(row.extraction for row in table.rows.values())):
            if unknown := sorted(options.keys() - set(known)):
                raise ValueError(f"{name}: unknown extraction option {unknown[0]!r}: there are {', '.join(known)}")
    return found


def plan_runs(
    tables: Mapping[str, AblationTable],
    stores: Sequence[TeacherCache],
    *,
    seeds: int,
    preset: str,
    overrides: Sequence[str] = (),
) -> dict[tuple[str, str, int], Run]:
    """The run of every (table, row, seed); rows of equal configuration have equal runs.

    Raises:
        ValueError: a configuration is wrong, with the table and the row.
    """
    identity = [{"name": s.path.name, "images": len(s), **s.provenance.identity} for s in stores]
    plan = {}
    for name, table in tables.items():
        for label, row in table.rows.items():
            changes = [f"{key}={json.dumps(value)}" for key, value in (table.change | row.change).items()]
            try:
                config = load_config(preset, [*overrides, *changes])
            except ValueError as error:
                raise ValueError(f"table {name}, row {label}: {error}") from error
            values = asdict(config)
            del values["preset"], values["run"]["seed"]
            key = hashlib.sha256(json.dumps([values, identity], sort_keys=True).encode()).hexdigest()[:12]
            for seed in range(seeds):
                plan[name, label, seed] = Run(key, replace(config, run=replace(config.run, seed=seed)))
    return plan
