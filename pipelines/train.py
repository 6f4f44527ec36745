"""Stage two: train the student from cached targets. Nothing here, or imported from here, reaches SAM.

A run lives in one folder, see :mod:`samfeat.pipelines.training.run_folder`. Every random choice follows from the seed,
the number of the step and the place in the batch, so the step is all that a checkpoint has to say about random states
and the sampler's position, and any number of processes can share a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from samfeat.pipelines.config import Config, learning_rate
from samfeat.pipelines.files import allow_many_files
from samfeat.pipelines.training.batches import (
    PREFETCHED,
    Item,
    Part,
    RawBatch,
    epoch_batches,
    item_generators,
    list_items,
    read_ahead,
    read_batch,
)
from samfeat.pipelines.training.cached import FromDisk, InMemory, Source, batch_memory
from samfeat.pipelines.training.interruption import Interruption
from samfeat.pipelines.training.pace import Clock, LateValues
from samfeat.pipelines.training.processes import connect, lost_processes
from samfeat.pipelines.training.run_folder import RunFolder
from samfeat.pipelines.training.step import TrainingStep, out_of_memory
from samfeat.pipelines.training.validation import Validation, hold_out
from samfeat.teacher_cache.schema import Targets
from samfeat.teacher_cache.store import TeacherCache, open_stores

MOST_BAD_STEPS = 3  # in a row; then the run stops
LATE = 2  # steps on a GPU whose values have not been read yet, so that it never waits for the host
COUNTERS = ("step", "bad_steps", "first", "latest", "best")  # beside weights and optimiser, the state of a run


class Progress(NamedTuple):
    """What a live display may show after a step.

    Attributes:
        step, steps: done and in all.
        terms: the latest loss terms, by name, with ``total``.
        images_per_second: since the last display, by all processes.
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

    Started by torchrun (or :func:`samfeat.pipelines.training.processes.launch`), several processes share every batch
    and come to what one process would come to; the first one alone writes and reports.

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
            CUDA asked for where there is none, not enough memory for the batch.
        ConnectionError: another process of the run is gone; the run can go on from its last checkpoint.
        KeyboardInterrupt: Ctrl-C or SIGTERM, answered after the step under way, with ``last.ckpt`` written.
    """
    allow_many_files()
    stores = open_stores(cache)
    _check_stores(stores)
    run = _Run(stores, RunFolder(Path(folder), config, stores, overfit=overfit), config, overfit=overfit, report=report)
    try:
        with lost_processes(), Interruption() as interruption:
            run.prepare(resume=resume)
            return run.fit(progress, interruption)
    finally:
        run.folder.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Run:
    """One training run: setup in the constructor, then :meth:`prepare` and :meth:`fit`."""

    def __init__(
        self,
        stores: list[TeacherCache],
        folder: RunFolder,
        config: Config,
        *,
        overfit: bool,
        report: Callable[[str], None],
    ) -> None:
        self.stores, self.folder, self.config, self.report = stores, folder, config, report
        held_out = set() if overfit else hold_out(stores, config.run)
        items = list_items(stores, config.data, held_out)
        size = min(config.optimiser.batch_size, len(items))
        if size == 0:
            raise ValueError("nothing to train on: every image failed in stage one, is held out, or is switched off")
        self.fabric = connect(config.run)
        if size < self.fabric.world_size:
            raise ValueError(f"a batch of {size} items cannot be shared by {self.fabric.world_size} processes")
        self.batch_size, self.items, self.overfit = size, items, overfit
        self.part = Part.of(size, self.fabric.global_rank, self.fabric.world_size)
        self.steps_per_epoch = len(items) // size
        self.steps = config.optimiser.steps or config.optimiser.epochs * self.steps_per_epoch
        shown = held_out or {(item.store, _first_image(stores, item)) for item in items[: config.run.validation_images]}
        self.validation = Validation(stores, sorted(shown), config.run, config.data.homography)

        self.one_step = TrainingStep(config, self.fabric)
        self.step = 0
        self.bad_steps: list[int] = []
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = -math.inf
        self._epoch: tuple[int, list[list[Item]]] = -1, []
        self._late: deque[LateValues] = deque()

    # -- beginning ----------------------------------------------------------------------------------------------------

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, or load the state to go on from."""
        state = self.folder.load(resume=resume, device=self.fabric.device)
        if state:
            self.one_step.student.load_state_dict(state["network"])
            self.one_step.adam.load_state_dict(state["optimiser"])
            for name in COUNTERS:
                setattr(self, name, state[name])
        self.fabric.barrier()  # all have looked before the first one writes
        if self.fabric.is_global_zero:
            self.folder.begin(self.step, new=state is None)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self, progress: Callable[[Progress], None] | None, interruption: Interruption) -> TrainSummary:
        """All steps that are left."""
        if not self.first:
            self.first = self.latest = self._validate()
        alone = self.fabric.world_size == 1  # several processes stop by what their steps' values say, all at one step
        every, clock = self.config.run, Clock(self.step)
        batches = read_ahead(self._requests(self._source()), self.config.data.workers)
        while True:
            with clock.waiting():
                raw = next(batches, None)
            if raw is None:
                return TrainSummary(self.folder.path, self.steps, self.first, self.latest)
            self._one_step(raw, asked=interruption.asked)
            self.step += 1
            validate = self.step % every.validate_every == 0 or self.step == self.steps
            save = self.step % every.checkpoint_every == 0 or self.step == self.steps
            stop = self._harvest(clock, progress, every_one=validate or save or (alone and interruption.asked))
            stop = (interruption.asked if alone else stop) and self.step < self.steps
            with clock.aside():
                if validate:
                    self.latest = self._validate()
                if save or stop:
                    self._save()
            if stop:
                raise KeyboardInterrupt

    def _source(self) -> Source:
        where = self.config.data.in_memory
        if where == "none":
            return FromDisk(self.stores)
        return InMemory(self.stores, self.fabric.device if where == "device" else torch.device("cpu"))

    def _requests(self, source: Source) -> Iterator[Callable[[], RawBatch]]:
        """One read request a step, from the current step to the last."""
        pieces = max(PREFETCHED, self.config.data.workers) + 2 + LATE
        memory = batch_memory(self.stores[0], 2 * (self.part.stop - self.part.start), pieces)
        for step in range(self.step, self.steps):
            yield partial(self._read, source, step, next(memory) if isinstance(source, FromDisk) else None)

    def _read(self, source: Source, step: int, memory: Targets | None) -> RawBatch:
        number = self._number(step)
        rngs = item_generators(self.config.run.seed, number, self.part)
        return read_batch(
            source, self._items_of(number)[self.part.start : self.part.stop], self.config.data, rngs, memory
        )

    def _number(self, step: int) -> int:
        """Of the batch that a step trains on."""
        return 0 if self.overfit else step

    def _items_of(self, number: int) -> list[Item]:
        """The items of a batch."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, epoch_batches(self.items, self.batch_size, epoch, self.config.run.seed)
        return self._epoch[1][place]

    def _one_step(self, raw: RawBatch, *, asked: bool) -> None:
        rate = learning_rate(self.config.optimiser, self.step, self.steps, self.steps_per_epoch)
        values = None
        try:
            values = self.one_step(raw, self._number(self.step), learning_rate=rate, part=self.part, asked=asked)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if values is None:  # the memory of the failed step is free by now
            self._refuse_batch_size(raw)
        self._late.append(LateValues.of(self.step + 1, values))

    def _refuse_batch_size(self, raw: RawBatch) -> NoReturn:
        size, advice = self.batch_size, "try half of it"
        if self.fabric.world_size == 1:
            fits = self.one_step.largest_that_fits(raw)
            advice = f"{fits} would fit" if fits else "not even 1 fits: train on smaller crops, or on another device"
        raise ValueError(f"not enough memory on {self.fabric.device} for optimiser.batch_size={size}: {advice}")

    def _harvest(self, clock: Clock, progress: Callable[[Progress], None] | None, *, every_one: bool) -> bool:
        """Look at the values of finished steps, of all or of all but the latest; whether one was asked to stop."""
        asked = False
        while self._late and (every_one or len(self._late) > (LATE if self._late[0].copied else 0)):
            late = self._late.popleft()
            step, named = late.step, dict(zip(self.one_step.names, late.read()))
            asked |= named.pop("asked") > 0
            if not all(map(math.isfinite, named.values())):
                self._left_out(step, named)
            if step % self.config.run.log_every == 0 or step in (1, self.steps):
                speed, waiting = clock.read(step)
                rate = learning_rate(self.config.optimiser, step - 1, self.steps, self.steps_per_epoch)
                norm = named.pop("gradient_norm")
                around = {"images_per_second": 2 * self.batch_size * speed, "waiting": waiting, "learning_rate": rate}
                terms = {f"loss/{name}": value for name, value in named.items()}
                self.folder.record(step, around | {"gradient_norm": norm} | terms)
                if progress and self.fabric.is_global_zero:
                    progress(Progress(step, self.steps, named, 2 * self.batch_size * speed, self.latest))
        return asked

    def _left_out(self, step: int, named: dict[str, float]) -> None:
        """Name and save the batch of a step that is not finite; stop where that happens again and again."""
        number = step - 1
        self.bad_steps.append(number)
        bad = ", ".join(name for name, value in named.items() if not math.isfinite(value))
        what = f"step {number} left out: {bad} not finite"
        if self.fabric.is_global_zero:
            items, whole = self._items_of(self._number(number)), Part(0, self.batch_size, self.batch_size)
            rngs = item_generators(self.config.run.seed, self._number(number), whole)
            path = self.folder.save_bad_batch(number, read_batch(FromDisk(self.stores), items, self.config.data, rngs))
            names = ", ".join(self.stores[item.store].names[_first_image(self.stores, item)] for item in items)
            what += f" for {names} (saved as {path.name})"
            self.folder.record(step, {"left_out": len(self.bad_steps)})
        if self.bad_steps[-MOST_BAD_STEPS:] == list(range(number - MOST_BAD_STEPS + 1, number + 1)):
            raise ValueError(
                f"{what}, {MOST_BAD_STEPS} in a row: lower optimiser.learning_rate, or look at the batches; "
                f"{self.folder.path / 'last.ckpt'} is from before"
            )
        if self.fabric.is_global_zero:
            self.report(what)

    def _validate(self) -> dict[str, float]:
        """Figures of the student as it is; the first process alone looks."""
        figures: dict[str, float] = {}
        if self.fabric.is_global_zero:
            self.one_step.student.eval()
            with self.one_step.autocast:
                figures, views = self.validation.run(self.one_step.student, self.config)
            self.folder.record(self.step, {f"validation/{name}": value for name, value in figures.items()})
            self.folder.show(self.step, self.steps, views)
            if figures["mma@3"] > self.best and self.step:
                self.best = figures["mma@3"]
                self.folder.save_weights("best.safetensors", self.one_step.student, step=self.step, figures=figures)
        self.one_step.student.train()
        self.fabric.barrier()
        return figures

    def _save(self) -> None:
        self.folder.save(
            {name: getattr(self, name) for name in COUNTERS},
            self.one_step.student,
            self.one_step.adam,
        )


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
