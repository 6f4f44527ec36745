"""Settings of toy trainings and of a toy ablation study, for the tests and for the processes they start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from samfeat.pipelines.ablation import ablate
from samfeat.pipelines.config import Config, load_config
from samfeat.pipelines.training.ablation_tables import AblationTable, Row, load_ablations

SETTINGS = [
    "optimiser.batch_size=2",
    "optimiser.steps=4",
    "optimiser.warmup=0.0",
    "run.precision=fp32",
    "run.accelerator=cpu",
    "run.log_every=1",
    "run.validate_every=4",
    "run.checkpoint_every=2",
    "run.validation_images=2",
    "run.validation_pairs=2",
    "run.max_keypoints=50",
]
SMALL_WINDOWS = "data.views.size=64"  # the side of toy crops; the default preset's are three times as large
STUDY_SETTINGS = [
    SMALL_WINDOWS,
    "optimiser.batch_size=2",
    "optimiser.steps=3",
    "run.precision=fp32",
    "run.accelerator=cpu",
    "run.log_every=1",
    "run.validate_every=3",
    "run.checkpoint_every=1",
    "run.validation_images=2",
    "run.validation_pairs=2",
    "run.max_keypoints=40",
]
TABLES = {
    "A": AblationTable(
        "First",
        paper="MMA [%]",
        rows={"whole": Row(80.0), "no wsc": Row(79.0, {"losses.wsc": 0}), "gain": Row(None, {}, {"edge_gain": 5.0})},
    ),
    "B": AblationTable(
        "Second",
        reference="same",
        change={"losses.wsc": 0},
        rows={"other": Row(None, {"losses.edge": 0}), "same": Row()},
    ),
}
EXTRACTION = {"detection_threshold": 0.0, "max_keypoints": 30}


def leave_out_charts(patch: pytest.MonkeyPatch) -> None:
    """Trainings draw no charts, which take longer than their toy steps; test_report looks at them."""
    patch.setattr("samfeat.pipelines.training.report.draw_curves", lambda path, rows: path)
    patch.setattr("samfeat.pipelines.training.report._charts", lambda rows: [])


def config(*overrides: str, preset: str = "default") -> Config:
    """The configuration of a toy training of 4 steps, on the CPU."""
    return load_config(preset, [*SETTINGS, *([SMALL_WINDOWS] if preset == "default" else []), *overrides])


def metrics(folder: Path) -> list[dict]:
    """Every line that a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_study(cache: Path, folder: Path, *, tables: dict[str, AblationTable] = TABLES, **options: Any) -> Any:
    """Ablations of toy tables, two seeds."""
    given = dataclasses.replace(load_ablations(), tables=tables, extraction=EXTRACTION)
    return ablate(cache, folder, **{"ablations": given, "seeds": 2, "overrides": STUDY_SETTINGS} | options)
