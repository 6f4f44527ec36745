"""Stage two: train the student from cached targets. Nothing here, or imported from here, reaches SAM.

A run lives in one folder: ``config.yaml``, ``last.ckpt`` and ``previous.ckpt`` (everything needed to go on),
``weights.safetensors`` (the latest student), ``best.safetensors`` (the best by validation), ``metrics.jsonl``,
TensorBoard events, ``curves.png``. Every random choice follows from the seed and the number of the step, so the step is
all that a checkpoint has to say about random states and the sampler's position.
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
from typing import Any, NamedTuple, cast

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
from samfeat.pipelines.checkpoint import load_state, save_state
from samfeat.pipelines.config import Config, learning_rate
from samfeat.pipelines.files import allow_many_files, write_bytes
from samfeat.pipelines.interruption import Interruption
from samfeat.pipelines.objective import losses, total
from samfeat.pipelines.report import draw_curves, forget_after
from samfeat.pipelines.validation import Validation, hold_out
from samfeat.student.export import save_weights
from samfeat.student.extractor import EXTRACTION_PRESETS
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.schema import package_versions
from samfeat.teacher_cache.store import TeacherCache, open_stores

MOST_BAD_STEPS = 3  # in a row; then the run stops
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
    report: Callable[[str], None] = print,
    progress: Callable[[Progress], None] | None = None,
) -> TrainSummary:
    """Train a student from every store of ``cache`` and write the run ``folder``.

    Args:
        cache: a folder with ``*.zarr`` stores, or one store.
        folder: the run's folder; new or empty unless ``resume``.
        config: see :mod:`samfeat.pipelines.config`.
        resume: go on from ``last.ckpt`` where there is one, else start.
        overfit: train on the first batch alone, again and again: a check that the losses can fall.
        report: takes one line for people, about a step that was left out.
        progress: called after every step.

    Raises:
        FileNotFoundError, ValueError: no usable store, stores that do not fit together, a run folder in use, a
            checkpoint of another configuration or of other stores, losses that are not finite three steps in a row,
            CUDA asked for where there is none.
        KeyboardInterrupt: Ctrl-C or SIGTERM, answered after the step under way, with ``last.ckpt`` written.
    """
    allow_many_files()
    stores = open_stores(cache)
    _check_stores(stores)
    run = _Run(stores, Path(folder), config, overfit=overfit, report=report)
    run.prepare(resume=resume)
    try:
        with Interruption() as interruption:
            return run.fit(progress, interruption)
    finally:
        run.writer.close()


class _Run:
    """One training run: setup in the constructor, then :meth:`prepare` and :meth:`fit`."""

    def __init__(
        self,
        stores: list[TeacherCache],
        folder: Path,
        config: Config,
        *,
        overfit: bool,
        report: Callable[[str], None],
    ) -> None:
        self.stores, self.folder, self.config, self.report = stores, folder, config, report
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
        self.adam = torch.optim.Adam(
            self.student.parameters(),
            lr=config.optimiser.learning_rate,
            weight_decay=config.optimiser.weight_decay,
            fused=True,
        )
        self.network, self.optimiser = self.fabric.setup(self.student, self.adam)
        self.step = 0
        self.bad_steps: list[int] = []
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = -math.inf
        self._epoch: tuple[int, list[list[Item]]] = -1, []
        self.writer: SummaryWriter

    # -- beginning ----------------------------------------------------------------------------------------------------

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, or load the state to go on from."""
        if not resume and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: choose another --out, or go on with --resume auto")
        self.folder.mkdir(parents=True, exist_ok=True)
        state = load_state(self.folder, self.fabric.device) if resume else None
        if state:
            self._restore(state)
        else:
            OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
        forget_after(self.folder / "metrics.jsonl", self.step if state else -1)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step or None)

    def _restore(self, state: dict[str, Any]) -> None:
        mine = {"config": self.config.to_dict(), "stores": self._identity(), "overfit": self.overfit}
        differences = _differences({key: state[key] for key in mine}, mine)
        if differences:
            raise ValueError(
                f"{self.folder} belongs to another run ({'; '.join(differences[:5])}): choose another --out"
            )
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.first, self.latest, self.best = (state[key] for key in ("step", "first", "latest", "best"))
        self.bad_steps = state["bad_steps"]

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, progress: Callable[[Progress], None] | None, interruption: Interruption) -> TrainSummary:
        """All steps that are left."""
        if not self.first:
            self.first = self.latest = self._validate()
        started, begun = time.monotonic(), self.step
        self.network.train()
        for raw in read_ahead(self._requests(), self.config.data.workers):
            terms = self._one_step(raw)
            self.step += 1
            if not math.isfinite(terms["total"]):
                self._skipped(terms)
            due = self.step % self.config.run.log_every == 0 or self.step in (1, self.steps)
            rate = 2 * self.batch_size * (self.step - begun) / (time.monotonic() - started)
            if due:
                values = self._log(terms, rate)
                if progress:
                    progress(Progress(self.step, self.steps, values, rate, self.latest))
            if self.step % self.config.run.validate_every == 0 or self.step == self.steps:
                self.latest = self._validate()
            if self.step % self.config.run.checkpoint_every == 0 or self.step == self.steps or interruption.asked:
                self._save()
            if interruption.asked and self.step < self.steps:
                raise KeyboardInterrupt
        return TrainSummary(self.folder, self.steps, self.first, self.latest)

    def _requests(self) -> Iterator[Callable[[], RawBatch]]:
        """One read request a step, from the current step to the last."""
        memory = batch_memory(self.stores[0], self.batch_size, self.config.data.workers)
        for step in range(self.step, self.steps):
            number = 0 if self.overfit else step
            rng = np.random.default_rng([self.config.run.seed, number, 1])
            yield partial(read_batch, self.stores, self._items_of(number), self.config.data, rng, next(memory))

    def _items_of(self, number: int) -> list[Item]:
        """The items of a step's batch."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self.items, self.batch_size, epoch, self.config.run.seed)
        return self._epoch[1][place]

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
        cast(Any, self.adam).found_inf = (
            ~torch.isfinite(terms["total"])
        ).float()  # the step is then left out, on the device
        self.optimiser.step()
        return {name: term.detach() for name, term in terms.items()}

    def _skipped(self, terms: dict[str, Tensor]) -> None:
        """Name and save the batch of a step whose loss is not finite; stop where that happens again and again."""
        number = self.step - 1
        self.bad_steps.append(number)
        items = self._items_of(0 if self.overfit else number)
        rng = np.random.default_rng([self.config.run.seed, number, 1])
        raw = read_batch(self.stores, items, self.config.data, rng)
        buffer = io.BytesIO()
        torch.save(raw._asdict(), buffer)
        path = write_bytes(self.folder / f"bad_batch_{number}.pt", buffer.getvalue())
        names = ", ".join(self.stores[item.store].names[_first_image(self.stores, item)] for item in items)
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        report = f"step {number} left out: {', '.join(bad)} not finite for {names} (saved as {path.name})"
        self._record({"step": self.step, "left_out": len(self.bad_steps)})
        if self.bad_steps[-MOST_BAD_STEPS:] == list(range(number - MOST_BAD_STEPS + 1, number + 1)):
            raise ValueError(
                f"{report}, {MOST_BAD_STEPS} in a row: lower optimiser.learning_rate, or look at the batches; "
                f"{self.folder / 'last.ckpt'} is from before"
            )
        self.report(report)

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
            "step": self.step,
            "bad_steps": self.bad_steps,
            "first": self.first,
            "latest": self.latest,
            "best": self.best,
            "overfit": self.overfit,
            "config": self.config.to_dict(),
            "stores": self._identity(),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        save_state(self.folder, state)
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
