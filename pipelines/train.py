"""Stage two: train the student from cached targets. Neither this module nor its imports import SAM.

Read top to bottom: :func:`train` calls :func:`setup`, then :func:`fit`, which calls :func:`train_step` for every step
and :func:`validate` at intervals. The files of a run are in :mod:`samfeat.pipelines.training.run_folder`.

Every random choice depends only on the seed, the step and the position in the batch. A checkpoint therefore stores the
step instead of random states, and any number of processes can share a batch.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from samfeat.files import allow_many_files
from samfeat.pipelines.config import Config, learning_rate
from samfeat.pipelines.errors import is_out_of_memory
from samfeat.pipelines.interruption import Interruption
from samfeat.pipelines.training.batches import make_batch
from samfeat.pipelines.training.checkpoint import load_initial
from samfeat.pipelines.training.loader import BatchPart, Loader, RawBatch, largest_that_fits, read_ahead
from samfeat.pipelines.training.objective import losses, total
from samfeat.pipelines.training.pace import Clock, LateValues, arrived
from samfeat.pipelines.training.processes import (
    average,
    check_compiler,
    connect,
    has_bf16,
    lost_processes,
    reduction_over,
)
from samfeat.pipelines.training.run_folder import RunFolder
from samfeat.pipelines.training.validation import Validation, hold_out
from samfeat.student.network import DESCRIPTOR_DIM, SAMFeatNetwork
from samfeat.teacher_cache.store import TeacherCache, open_stores

MOST_BAD_STEPS = 3  # in a row before the run stops
COUNTERS = ("step", "bad_steps", "first", "latest", "best")  # stored in a checkpoint besides weights and optimiser

logger = logging.getLogger(__name__)


@dataclass
class State:
    """The state of a training run.

    Attributes:
        config: configuration of the run.
        fabric: devices and processes.
        student: the plain network, in channels-last order; its parameters are trained.
        network: the same network as Fabric runs it.
        average: moving average of the student, which is validated and saved; without ``optimiser.average`` the student.
        adam: the optimiser.
        autocast: context of the forward pass and the losses.
        step: steps done.
        bad_steps: numbers of the skipped steps.
        first, latest: validation figures of the untrained student and of the last validation.
        best: best MMA@3 so far.
    """

    config: Config
    fabric: Fabric
    student: SAMFeatNetwork
    network: nn.Module
    average: SAMFeatNetwork
    adam: torch.optim.Adam
    autocast: AbstractContextManager[Any]
    step: int = 0
    bad_steps: list[int] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    best: float = -math.inf


class Progress(NamedTuple):
    """Values for a live display after a step.

    Attributes:
        step, steps: done and in total.
        terms: the latest loss terms, by name, including ``total``.
        images_per_second: since the previous update, over all processes.
        validation: the latest validation figures.
    """

    step: int
    steps: int
    terms: dict[str, float]
    images_per_second: float
    validation: dict[str, float]


@dataclass(frozen=True)
class TrainSummary:
    """The result of a run.

    Attributes:
        folder: the run's folder.
        steps: steps of the whole run.
        first, last: validation figures of the untrained and of the final student; empty except on rank 0.
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

    Several processes, started by torchrun or :func:`samfeat.pipelines.training.processes.launch`, split every batch and
    train the same student as one process would. Only rank 0 writes and reports. Skipped steps are logged.

    Args:
        cache: a folder with ``*.zarr`` stores, or one store.
        folder: the run's folder; new or empty unless ``resume``.
        config: see :mod:`samfeat.pipelines.config`.
        resume: continue from ``last.ckpt`` if there is one.
        overfit: train on the first batch only, to check that the losses can fall.
        progress: called after every logged step.

    Raises:
        FileNotFoundError, ValueError: no usable store, stores that do not fit together, a run folder that is in use or
            belongs to another run, damaged checkpoints, losses that are not finite three steps in a row, CUDA requested
            but not available, too little memory for the batch.
        ConnectionError: another process of the run is gone; the run can continue from its last checkpoint.
        KeyboardInterrupt: Ctrl-C or SIGTERM; while training, raised after the current step with ``last.ckpt`` written.
    """
    allow_many_files()
    stores = open_stores(cache)
    run_folder = RunFolder(Path(folder), config, stores, overfit=overfit)
    try:
        with lost_processes():
            state, loader, validation = setup(stores, run_folder, config, resume=resume, overfit=overfit)
            with Interruption() as interruption:
                fit(state, loader, validation, run_folder, interruption, progress)
        return TrainSummary(run_folder.path, loader.steps, state.first, state.latest)
    finally:
        run_folder.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def setup(
    stores: Sequence[TeacherCache], folder: RunFolder, config: Config, *, resume: bool, overfit: bool
) -> tuple[State, Loader, Validation]:
    """Set up :func:`fit`: a new student or that of the last checkpoint, its data, and its validation."""
    _check_stores(stores, distilled=config.losses.distillation > 0)
    fabric = connect(config.run)
    if fabric.is_global_zero:
        folder.lock()
    saved = folder.load(resume=resume, device=fabric.device)
    held_out = set() if overfit else hold_out(stores, config.run)
    loader = Loader(stores, config, held_out, fabric, overfit=overfit)
    shown = sorted(held_out) or loader.first_images(config.run.validation_images)
    validation = Validation(stores, shown, config.run, config.data, held_out=bool(held_out))

    state = new_state(config, fabric)
    if saved:
        state.student.load_state_dict(saved["network"])
        state.average.load_state_dict(saved["average"])
        state.adam.load_state_dict(saved["optimiser"])
        for name in COUNTERS:
            setattr(state, name, saved[name])
    fabric.barrier()  # every process has read the folder before rank 0 writes to it
    if fabric.is_global_zero:
        folder.begin(state.step, new=saved is None)
    return state, loader, validation


def new_state(config: Config, fabric: Fabric) -> State:
    """An untrained student, or the one given by ``run.init``, and its optimiser."""
    student = SAMFeatNetwork(config.network, generator=torch.Generator().manual_seed(config.run.seed))
    for parameter in student.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if config.run.init:
        load_initial(student, config.run.init)
    student.to(fabric.device)
    averaged = copy.deepcopy(student) if config.optimiser.average else student
    if config.run.compile:
        check_compiler()
        student.compile()
    network = fabric.setup_module(student)
    adam = torch.optim.Adam(
        student.parameters(),
        lr=config.optimiser.learning_rate,
        weight_decay=config.optimiser.weight_decay,
        fused=True,
    )
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and has_bf16(fabric.device))
    autocast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=bf16)
    return State(config, fabric, student, cast(nn.Module, network), averaged, adam, autocast)


def fit(
    state: State,
    loader: Loader,
    validation: Validation,
    folder: RunFolder,
    interruption: Interruption,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train from ``state.step`` to the last step, or until interrupted."""
    run, alone = state.config.run, state.fabric.world_size == 1
    if not state.first:
        state.first = state.latest = validate(state, loader, validation, folder)
    clock, late = Clock(state.step), deque[LateValues]()
    batches = read_ahead(loader.requests(state.step), state.config.data.workers)
    while state.step < loader.steps:
        with clock.waiting():
            raw = next(batches)
        values = None
        try:
            values = train_step(
                state,
                raw,
                loader.number(state.step),
                rate=learning_rate(state.config.optimiser, state.step, loader.steps, loader.steps_per_epoch),
                part=loader.part,
                progress=loader.progress(state.step),
                asked=interruption.asked,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if values is None:  # outside the handler, where the memory of the failed step is free again
            _refuse_batch_size(state, loader, raw)
        state.step += 1
        late.append(LateValues.of(state.step, *values))

        validating = state.step % run.validate_every == 0 or state.step == loader.steps
        saving = state.step % run.checkpoint_every == 0 or state.step == loader.steps
        stop = False  # of several processes all stop at the same step, whose shared values say that one was asked
        for arrival in arrived(late, wait=validating or saving or (alone and interruption.asked)):
            stop |= log_step(state, loader, folder, clock, arrival, progress)
        stop = (interruption.asked if alone else stop) and state.step < loader.steps
        with clock.aside():
            if validating:
                state.latest = validate(state, loader, validation, folder)
            if saving or stop:
                counters = {name: getattr(state, name) for name in COUNTERS}
                folder.save(counters, state.student, state.average, state.adam)
        if stop:
            raise KeyboardInterrupt(
                f"saved after step {state.step} in {folder.path}, the same command with --resume auto continues"
            )


class StepValues(NamedTuple):
    """Values of a step, on the device, the same in all processes.

    Attributes:
        names: the loss terms, their ``total``, the ``gradient_norm`` before clipping, and ``asked``, the share of
            processes asked to stop.
        values: float32 [n].
    """

    names: list[str]
    values: Tensor


def train_step(
    state: State,
    raw: RawBatch,
    number: int,
    *,
    rate: float,
    part: BatchPart,
    progress: float = 1.0,
    asked: bool = False,
) -> StepValues:
    """Train on one batch. Never waits for the device; a non-finite step changes no weights.

    Args:
        state: the training state.
        raw: this process's part of the batch.
        number: number of the batch, which determines all random choices.
        rate: learning rate of this step.
        part: which part of the batch it is.
        progress: fraction of all steps done so far.
        asked: whether this process was asked to stop.
    """
    config, fabric, weights = state.config, state.fabric, list(state.student.parameters())
    generator = torch.Generator(fabric.device).manual_seed(config.run.seed * 1_000_003 + number)
    batch = make_batch(raw, config.data, generator, part, progress=progress)

    reduction = reduction_over(fabric.world_size)
    with state.autocast:
        output = state.network(batch.images.contiguous(memory_format=torch.channels_last))
        terms = losses(output, batch, config.losses, sampling=config.network.sampling, reduction=reduction)
    terms["total"] = total(terms, config.losses)

    state.adam.zero_grad(set_to_none=True)
    fabric.backward(terms["total"])
    norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    if config.optimiser.clip_norm:
        clip_grads_with_norm_(weights, config.optimiser.clip_norm, norm)
    values = torch.stack([*(term.detach() for term in terms.values()), norm, torch.full_like(norm, float(asked))])
    values = average(values, fabric.world_size)

    # Skip the step if a loss or the gradient is not finite. `if not values.isfinite().all()` would make the host
    # wait for the device at every step. The fused kernel of Adam reads the attribute `found_inf`, a tensor that
    # torch.amp.GradScaler normally sets, on the device: where it is 1 the kernel changes neither weights nor moments.
    cast(Any, state.adam).found_inf = (~values.isfinite().all()).float()
    for group in state.adam.param_groups:
        group["lr"] = rate
    state.adam.step()

    if state.average is not state.student:
        decay = min(config.optimiser.average, (state.step + 1) / (state.step + 10))  # a short memory at the start
        with torch.no_grad():
            torch._foreach_lerp_([*state.average.parameters()], [*weights], 1 - decay)
    return StepValues([*terms, "gradient_norm", "asked"], values)


def log_step(
    state: State,
    loader: Loader,
    folder: RunFolder,
    clock: Clock,
    arrival: LateValues,
    progress: Callable[[Progress], None] | None,
) -> bool:
    """Record the values of an earlier step; returns whether a process was asked to stop."""
    step, named = arrival.step, arrival.read()
    asked = named.pop("asked") > 0
    if not all(map(math.isfinite, named.values())):
        _report_left_out(state, loader, folder, step, named)
    if step % state.config.run.log_every == 0 or step in (1, loader.steps):
        speed, waiting = clock.read(step)
        figures = {
            "images_per_second": 2 * loader.batch_size * speed,
            "waiting": waiting,
            "learning_rate": learning_rate(state.config.optimiser, step - 1, loader.steps, loader.steps_per_epoch),
            "gradient_norm": named.pop("gradient_norm"),
        }
        folder.record(step, figures | {f"loss/{name}": value for name, value in named.items()})
        if progress and state.fabric.is_global_zero:
            progress(Progress(step, loader.steps, named, figures["images_per_second"], state.latest))
    return asked


def validate(state: State, loader: Loader, validation: Validation, folder: RunFolder) -> dict[str, float]:
    """Validate the averaged student, and record and draw the results; empty except on rank 0."""
    figures: dict[str, float] = {}
    if state.fabric.is_global_zero:
        state.average.eval()
        with state.autocast:
            figures, views = validation.run(state.average, state.config)
        folder.record(state.step, {f"validation/{name}": value for name, value in figures.items()})
        folder.show(state.step, loader.steps, views)
        if figures["mma@3"] > state.best and state.step:
            state.best = figures["mma@3"]
            folder.save_weights("best.safetensors", state.average, step=state.step, figures=figures)
    state.student.train()
    state.fabric.barrier()
    return figures


def _report_left_out(state: State, loader: Loader, folder: RunFolder, step: int, named: dict[str, float]) -> None:
    """Report and save the batch of a non-finite step; stop after several in a row."""
    number = step - 1
    state.bad_steps.append(number)
    bad = ", ".join(name for name, value in named.items() if not math.isfinite(value))
    what = f"step {number} left out: {bad} not finite"
    if state.fabric.is_global_zero:
        path = folder.save_bad_batch(number, loader.whole_batch(number))
        what += f" for {', '.join(loader.names(number))} (saved as {path.name})"
        folder.record(step, {"left_out": len(state.bad_steps)})
    if state.bad_steps[-MOST_BAD_STEPS:] == list(range(number - MOST_BAD_STEPS + 1, number + 1)):
        raise ValueError(
            f"{what}, {MOST_BAD_STEPS} in a row: lower optimiser.learning_rate, or look at the batches; "
            f"{folder.path / 'last.ckpt'}, if there is one, is from before"
        )
    if state.fabric.is_global_zero:
        logger.warning("%s", what)


def _refuse_batch_size(state: State, loader: Loader, raw: RawBatch) -> NoReturn:
    advice = "try half of it"
    if state.fabric.world_size == 1:

        def attempt(items: RawBatch) -> None:
            count = len(items.synthetic)
            train_step(state, items, 0, rate=0.0, part=BatchPart(0, count, count))

        fits = largest_that_fits(raw, attempt)
        advice = f"{fits} would fit" if fits else "not even 1 fits: train on smaller crops, or on another device"
    raise ValueError(
        f"not enough memory on {state.fabric.device} for optimiser.batch_size={loader.batch_size}: {advice}"
    )


def _check_stores(stores: Sequence[TeacherCache], *, distilled: bool) -> None:
    for store in stores:
        store.require_complete()
        first = stores[0]
        if (store.spec.image_size, store.spec.embedding) != (first.spec.image_size, first.spec.embedding):
            raise ValueError(
                f"{store.path.name} has images of {store.spec.image_size} and embeddings of {store.spec.embedding}, "
                f"{first.path.name} of {first.spec.image_size} and {first.spec.embedding}: train on one of them"
            )
        if distilled and (channels := first.spec.embedding[0]) != DESCRIPTOR_DIM:
            raise ValueError(
                f"losses.distillation needs a teacher with {DESCRIPTOR_DIM} channels, such as aliked; "
                f"{first.path.name} has {channels}: set losses.distillation=0"
            )
