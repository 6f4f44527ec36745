"""The folder of a training run: its identity, state, weights and logs.

It holds ``config.yaml``, ``last.ckpt`` and ``previous.ckpt`` (everything needed to resume), ``weights.safetensors``
(the latest student), ``best.safetensors`` (the best by validation), ``metrics.jsonl``, and, for viewing,
``report.html``, ``curves.png`` and TensorBoard events. One run at a time holds the folder.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from upath import UPath

from samfeat.files import write_bytes
from samfeat.pipelines.config import Config
from samfeat.pipelines.training.checkpoint import load_state, save_state
from samfeat.pipelines.training.loader import RawBatch
from samfeat.student.export import save_weights
from samfeat.student.extractor import EXTRACTION_PRESETS
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.schema import package_versions
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.lock import lock_store

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from samfeat.pipelines.training.validation import PairView

RECORDED = ("samfeat", "torch", "lightning-fabric", "zarr", "numpy", "opencv-python", "kornia")

logger = logging.getLogger(__name__)


class RunFolder:
    """One run's folder. Only a process that calls :meth:`begin` writes to it.

    Args:
        path: path of the folder.
        config: configuration of the run.
        stores: training data.
        overfit: whether the run trains on a single batch.
    """

    def __init__(self, path: Path, config: Config, stores: Sequence[TeacherCache], *, overfit: bool) -> None:
        from samfeat.pipelines.training.report import RunReport  # drawing is loaded when something is to be drawn

        self.path, self._config, self._stores = path, config, stores
        self._identity = {
            "config": config.to_dict(),
            "stores": [
                {"name": store.path.name, "images": len(store)} | json.loads(json.dumps(store.provenance.identity))
                for store in stores
            ],
            "overfit": overfit,
        }
        self._report = RunReport(path, stores, config, versions=package_versions(*RECORDED))
        self._writer: SummaryWriter | None = None
        self._held = ExitStack()

    def lock(self) -> None:
        """Hold the folder until :meth:`close`, as a store is held while it is written.

        Raises:
            ValueError: another run holds it.
        """
        self._held.enter_context(lock_store(UPath(self.path.absolute())))

    def load(self, *, resume: bool, device: torch.device) -> dict[str, Any] | None:
        """The state to resume from; None for a new run.

        Raises:
            ValueError: the folder is not empty, belongs to another run, or has damaged checkpoints only.
        """
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty: choose another --out, or continue with --resume auto")
        state = load_state(self.path, device) if resume else None
        if state:
            there = {key: state[key] for key in self._identity}
            if differences := _differences(there, self._identity):
                raise ValueError(
                    f"{self.path} belongs to another run ({'; '.join(differences[:5])}): choose another --out"
                )
        return state

    def begin(self, step: int, *, new: bool) -> None:
        """Create the folder, or remove what was recorded after ``step``."""
        from torch.utils.tensorboard import SummaryWriter

        from samfeat.pipelines.training.report import forget_after

        self.path.mkdir(parents=True, exist_ok=True)
        if new:
            OmegaConf.save(OmegaConf.structured(self._config), self.path / "config.yaml")
        forget_after(self.path / "metrics.jsonl", -1 if new else step)
        self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step or None)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append values to ``metrics.jsonl`` and to TensorBoard's events."""
        if self._writer is None:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, steps: int, views: Sequence[PairView]) -> None:
        """Redraw the report, at ``step`` of ``steps``, with the pairs of the latest validation."""
        if self._writer is not None:
            self._report.write(step, steps, views, self._writer)

    def save(
        self,
        counters: dict[str, Any],
        student: SAMFeatNetwork,
        averaged: SAMFeatNetwork,
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Write a checkpoint, and the averaged weights beside it."""
        if self._writer is None:
            return
        states = {
            "network": student.state_dict(),
            "average": averaged.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        save_state(self.path, counters | states | self._identity)
        self.save_weights("weights.safetensors", averaged, step=counters["step"], figures={})

    def save_weights(self, name: str, student: SAMFeatNetwork, *, step: int, figures: dict[str, float]) -> None:
        """Write the student with its whole provenance."""
        save_weights(
            self.path / name,
            student,
            extraction=asdict(EXTRACTION_PRESETS[self._config.network_preset]),
            provenance={
                "config": self._config.to_dict(),
                "step": step,
                "validation": figures,
                "stores": [{"name": store.path.name, **store.provenance.to_json()} for store in self._stores],
                "versions": package_versions(*RECORDED),
            },
        )

    def save_bad_batch(self, number: int, raw: RawBatch) -> Path:
        """Write a batch whose loss is not finite, to be looked at with ``torch.load``."""
        buffer = io.BytesIO()
        torch.save(raw._asdict(), buffer)
        return write_bytes(self.path / f"bad_batch_{number}.pt", buffer.getvalue())

    def close(self) -> None:
        """Finish TensorBoard's events and give the folder free."""
        if self._writer:
            self._writer.close()
        self._held.close()


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """One readable line for every value that differs between two trees of plain values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line for key in keys for line in _differences(there.get(key), here.get(key), f"{prefix}.{key}".strip("."))
        ]
    return [] if there == here else [f"{prefix}: {there!r} there, {here!r} asked for"[:200]]
