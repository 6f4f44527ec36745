"""Stage two: train the student from cached targets. Nothing here, or imported from here, reaches SAM.

A run lives in one folder: ``config.yaml``, ``last.ckpt`` (everything needed to go on), ``weights.safetensors`` (the
latest student), ``best.safetensors`` (the best by validation), ``metrics.jsonl``, TensorBoard events, ``curves.png``.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from samfeat.pipelines.batches import (
    Item,
    RawBatch,
    batch_memory,
    epoch_batches,
    list_items,
    make_batch,
    read_ahead,
    read_batch,
)
from samfeat.pipelines.config import Config, OptimiserConfig
from samfeat.pipelines.files import allow_many_files, write_bytes
from samfeat.pipelines.objective import losses, total
from samfeat.pipelines.report import draw_curves
from samfeat.pipelines.validation import Validation, hold_out
from samfeat.student.export import save_weights
from samfeat.student.extractor import EXTRACTION_PRESETS
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.schema import package_versions
from samfeat.teacher_cache.store import TeacherCache, open_stores

CHECKPOINT_VERSION = 1
RECORDED = ("samfeat", "torch", "lightning-fabric", "zarr", "numpy", "opencv-python", "kornia")


class Progress(NamedTuple):
    """What a live display may show after a step.

    Attributes:
        step, steps: done and in all.
        terms: the latest loss terms, by name, with ``total``.
        images_per_second: since the run started.
        validation: the latest validation figures.
    """

    step: int
    steps: int
    terms: dict[str, float]
    images_per_second: float
    validation: dict[str, float]


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        steps: steps of the whole run.
        first, last: validation figures of the untrained and of the final student.
    """

    folder: Path
    steps: int
    first: dict[str, float]
    last: dict[str, float]


def train(
    cache: str | Path,
    folder: str | Path,
    config: Config,
    *,
    resume: bool = False,
    overfit: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> TrainSummary:
    """Train a student from every store of ``cache`` and write the run ``folder``.

    Args:
        cache: a folder with ``*.zarr`` stores, or one store.
        folder: the run's folder; new or empty unless ``resume``.
        config: see :mod:`samfeat.pipelines.config`.
        resume: go on from ``last.ckpt`` where there is one, else start.
        overfit: train on the first batch alone, again and again: a check that the losses can fall.
        progress: called after every step.

    Raises:
        FileNotFoundError, ValueError: no usable store, stores that do not fit together, a run folder in use, a
            checkpoint of another configuration or of other stores, a loss that is not finite, CUDA asked for where
            there is none.
        KeyboardInterrupt: as it came, with ``last.ckpt`` written.
    """
    allow_many_files()
    stores = open_stores(cache)
    _check_stores(stores)
    run = _Run(stores, Path(folder), config, overfit=overfit)
    run.prepare(resume=resume)
    try:
        return run.fit(progress)
    finally:
        run.writer.close()


class _Run:
    """One training run: setup in the constructor, then :meth:`prepare` and :meth:`fit`."""

    def __init__(self, stores: list[TeacherCache], folder: Path, config: Config, *, overfit: bool) -> None:
        self.stores, self.folder, self.config = stores, folder, config
        self.fabric = _fabric(config)
        held_out = set() if overfit else hold_out(stores, config.run)
        items = list_items(stores, config.data, held_out)
        size = min(config.optimiser.batch_size, len(items))
        if size == 0:
            raise ValueError("nothing to train on: every image failed in stage one, is held out, or is switched off")
        self.batch_size, self.items, self.overfit = size, items, overfit
        self.steps_per_epoch = len(items) // size
        self.steps = config.optimiser.steps or config.optimiser.epochs * self.steps_per_epoch
        shown = held_out or {(item.store, _first_image(stores, item)) for item in items[: config.run.validation_images]}
        self.validation = Validation(stores, sorted(shown), config.run, config.data.homography)

        generator = torch.Generator().manual_seed(config.run.seed)
        self.student = SAMFeatNetwork(config.network, generator=generator)
        for parameter in self.student.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(
            self.student.parameters(), lr=config.optimiser.learning_rate, weight_decay=config.optimiser.weight_decay
        )
        self.network, self.optimiser = self.fabric.setup(self.student, optimiser)
        self.step = 0
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = -math.inf
        self.writer: SummaryWriter

    # -- beginning ----------------------------------------------------------------------------------------------------

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, or load the state to go on from."""
        state = self.folder / "last.ckpt"
        if not resume and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: choose another --out, or go on with --resume auto")
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and state.exists():
            self._load(state)
        else:
            OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step or None)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.fabric.device, weights_only=True)
            version = state["version"]
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            raise ValueError(f"{path} is not a readable checkpoint: delete it, or choose another --out") from error
        if version != CHECKPOINT_VERSION:
            raise ValueError(f"{path} has checkpoint version {version}, this program reads {CHECKPOINT_VERSION}")
        mine = {"config": self.config.to_dict(), "stores": self._identity(), "overfit": self.overfit}
        differences = _differences({key: state[key] for key in mine}, mine)
        if differences:
            raise ValueError(f"{path} belongs to another run ({'; '.join(differences[:5])}): choose another --out")
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.first, self.latest, self.best = (state[key] for key in ("step", "first", "latest", "best"))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, progress: Callable[[Progress], None] | None) -> TrainSummary:
        """All steps that are left."""
        if not self.first:
            self.first = self.latest = self._validate()
        started, begun = time.monotonic(), self.step
        self.network.train()
        try:
            for raw in read_ahead(self._requests(), self.config.data.workers):
                terms = self._one_step(raw)
                self.step += 1
                due = self.step % self.config.run.log_every == 0 or self.step in (1, self.steps)
                rate = 2 * self.batch_size * (self.step - begun) / (time.monotonic() - started)
                if due:
                    values = self._log(terms, rate)
                    if progress:
                        progress(Progress(self.step, self.steps, values, rate, self.latest))
                if self.step % self.config.run.validate_every == 0 or self.step == self.steps:
                    self.latest = self._validate()
                if self.step % self.config.run.checkpoint_every == 0 or self.step == self.steps:
                    self._save()
        except KeyboardInterrupt:
            self._save()
            raise
        return TrainSummary(self.folder, self.steps, self.first, self.latest)

    def _requests(self) -> Iterator[Callable[[], RawBatch]]:
        """One read request a step, from the current step to the last."""
        epoch, batches = -1, []
        memory = batch_memory(self.stores[0], self.batch_size, self.config.data.workers)
        for step in range(self.step, self.steps):
            number = 0 if self.overfit else step
            if epoch != (wanted := number // self.steps_per_epoch):
                epoch, batches = wanted, epoch_batches(self.items, self.batch_size, wanted, self.config.run.seed)
            chosen: list[Item] = batches[number % self.steps_per_epoch]
            rng = np.random.default_rng([self.config.run.seed, number, 1])
            yield partial(read_batch, self.stores, chosen, self.config.data, rng, next(memory))

    def _one_step(self, raw: RawBatch) -> dict[str, Tensor]:
        number = 0 if self.overfit else self.step
        generator = torch.Generator(self.fabric.device).manual_seed(self.config.run.seed * 1_000_003 + number)
        batch = make_batch(raw, self.config.data, generator)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config.optimiser, self.step, self.steps, self.steps_per_epoch)
        output = self.network(batch.images.contiguous(memory_format=torch.channels_last))
        with self.fabric.autocast():
            terms = losses(output, batch, self.config.losses, sampling=self.config.network.sampling)
        terms["total"] = total(terms, self.config.losses)
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(terms["total"])
        if self.config.optimiser.clip_norm:
            self.fabric.clip_gradients(self.network, self.optimiser, max_norm=self.config.optimiser.clip_norm)
        self.optimiser.step()
        return terms

    def _validate(self) -> dict[str, float]:
        self.network.eval()
        with self.fabric.autocast():
            figures = self.validation.run(self.student, self.config)
        self.network.train()
        self._record({"step": self.step} | {f"validation/{name}": value for name, value in figures.items()})
        draw_curves(self.folder)
        if figures["mma@3"] > self.best and self.step:
            self.best = figures["mma@3"]
            self._save_weights("best.safetensors", figures)
        return figures

    # -- writing ------------------------------------------------------------------------------------------------------

    def _log(self, terms: dict[str, Tensor], rate: float) -> dict[str, float]:
        values = {name: float(term.detach()) for name, term in terms.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"the loss is not finite at step {self.step} ({', '.join(bad)}): lower optimiser.learning_rate, "
                f"then go on from {self.folder / 'last.ckpt'}"
            )
        rate_now = self.optimiser.param_groups[0]["lr"]
        self._record(
            {"step": self.step, "images_per_second": rate, "learning_rate": rate_now}
            | {f"loss/{name}": value for name, value in values.items()}
        )
        return values

    def _record(self, values: dict[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, values["step"])

    def _save(self) -> None:
        state = {
            "version": CHECKPOINT_VERSION,
            "step": self.step,
            "first": self.first,
            "latest": self.latest,
            "best": self.best,
            "overfit": self.overfit,
            "config": self.config.to_dict(),
            "stores": self._identity(),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.folder / "last.ckpt", buffer.getvalue())
        self._save_weights("weights.safetensors", {})

    def _save_weights(self, name: str, figures: dict[str, float]) -> None:
        save_weights(
            self.folder / name,
            self.student,
            extraction=asdict(EXTRACTION_PRESETS[self.config.network_preset]),
            provenance={
                "config": self.config.to_dict(),
                "step": self.step,
                "validation": figures,
                "stores": [{"name": store.path.name, **store.provenance.to_json()} for store in self.stores],
                "versions": package_versions(*RECORDED),
            },
        )

    def _identity(self) -> list[dict[str, Any]]:
        return [
            {"name": store.path.name, "images": len(store)} | json.loads(json.dumps(store.provenance.identity))
            for store in self.stores
        ]


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


def _fabric(config: Config) -> Fabric:
    run = config.run
    if run.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.accelerator=cuda, but this machine has no usable CUDA device: leave it at auto")
    accelerator = "cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if _has_bf16(accelerator) else "fp32"
    return Fabric(accelerator=accelerator, devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")


def _has_bf16(accelerator: str) -> bool:
    if accelerator == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_stores(stores: Sequence[TeacherCache]) -> None:
    for store in stores:
        store.require_complete()
        first = stores[0]
        if (store.spec.image_size, store.spec.embedding) != (first.spec.image_size, first.spec.embedding):
            raise ValueError(
                f"{store.path.name} has images of {store.spec.image_size} and embeddings of {store.spec.embedding}, "
                f"{first.path.name} of {first.spec.image_size} and {first.spec.embedding}: train on one of them"
            )


def _first_image(stores: Sequence[TeacherCache], item: Item) -> int:
    return 2 * item.index if stores[item.store].spec.paired else item.index


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """One readable line for every value that differs between two trees of plain values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line for key in keys for line in _differences(there.get(key), here.get(key), f"{prefix}.{key}".strip("."))
        ]
    return [] if there == here else [f"{prefix}: {there!r} there, {here!r} asked for"[:200]]
