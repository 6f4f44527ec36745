"""What does a training step cost, part by part, and what does the teacher's guidance add to it?

    python tests/benchmarks/bench_step.py [--items 2] [--repeats 7] [--device cpu] [--compile] [--out bench/step.md]

400 x 400 crops of photographs (the store of bench_store.py) and their warps. The variants take their steps in turn, in
one process: medians, minima, and ratios of both. "Without guidance" leaves out the relation, edge and WSC losses, and
nothing else; the network is the same. The parts are measured one by one, on the outputs of one forward pass; a loss's
figure holds its own forward and backward. "Plain" is the same step in float32 and torch's own memory order.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bench_store import SHARD, write_store
from figures import record
from torch import Tensor

from samfeat.pipelines.config import Config, DataConfig, load_config
from samfeat.pipelines.train import State, new_state, train_step
from samfeat.pipelines.training.batches import make_batch
from samfeat.pipelines.training.loader import (
    PREFETCHED,
    BatchPart,
    FromDisk,
    Item,
    RawBatch,
    batch_memory,
    item_generators,
    read_ahead,
    read_batch,
)
from samfeat.pipelines.training.objective import losses, total
from samfeat.pipelines.training.pace import Clock
from samfeat.pipelines.training.processes import connect
from samfeat.teacher_cache.schema import Targets
from samfeat.teacher_cache.store import TeacherCache

TERMS = ("detection", "descriptor", "relation", "edge", "wsc")
GUIDANCE = ("relation", "edge", "wsc")


def plain_state(config: Config) -> State:
    """A student in torch's own memory order, which is fed images in that order."""
    state = new_state(config, connect(config.run))
    state.student.to(memory_format=torch.contiguous_format)
    state.student.register_forward_pre_hook(lambda module, arguments: (arguments[0].contiguous(),))
    return state


def configured(precision: str, device: str, *, compiled: bool = False, without: tuple[str, ...] = ()) -> Config:
    words = [f"run.precision={precision}", f"run.accelerator={device}", f"run.compile={str(compiled).lower()}"]
    return load_config("default", [*words, *(f"losses.{name}=0" for name in without)])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def make_states(device: str, *, compiled: bool) -> dict[str, State]:
    """All variants by name."""
    states = {"plain fp32": plain_state(configured("fp32", device))}
    for precision in ("fp32", "bf16"):
        for translated in (False, True)[: 1 + compiled]:
            for without in ((), GUIDANCE):
                chosen = configured(precision, device, compiled=translated, without=without)
                name = precision + " compiled" * translated + ", without guidance" * bool(without)
                states[name] = new_state(chosen, connect(chosen.run))
    return states


def request(source: FromDisk, number: int, part: BatchPart, memory: Targets | None = None) -> Callable[[], RawBatch]:
    """What reads a batch."""
    items = [Item(0, "synthetic", k) for k in range(part.total)]
    return partial(read_batch, source, items, DataConfig(), item_generators(0, number, part), memory)


def share_of_waiting(state: State, store: TeacherCache, part: BatchPart, count: int) -> float:
    """The share of time that a step waits for the trainer's own loader."""
    memory = batch_memory(store, 2 * part.total, PREFETCHED + 2)
    batches = read_ahead((request(FromDisk([store]), k, part, next(memory)) for k in range(count)), 1)
    clock = Clock(0)
    for number in range(count):
        with clock.waiting():
            raw = next(batches)
        train_step(state, raw, number, rate=0.0, part=part).values[-1].item()
    return clock.read(count)[1]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parts_of(state: State, raw: RawBatch) -> dict[str, float]:
    """Seconds of every part of a step."""
    config, device, times = state.config, state.fabric.device, {}

    def timed(name: str, run: Callable[[], object]) -> object:
        kept: list[object] = []
        times[name] = seconds(lambda: kept.append(run()), device)
        return kept[0]

    generator = torch.Generator(device).manual_seed(0)
    batch = timed("views and targets", lambda: make_batch(raw, config.data, generator))
    images = batch.images.contiguous(memory_format=torch.channels_last)

    def forward():
        with state.autocast:
            return state.network(images)

    output = timed("network, forward", forward)
    leaves = [value.detach().requires_grad_() for value in output[:-1]]
    detached = output._replace(**dict(zip(output._fields, leaves)))

    def one_loss(name: str) -> None:
        alone = replace(config.losses, **{other: 0.0 for other in TERMS if other != name})
        with state.autocast:
            terms = losses(detached, batch, alone, sampling=config.network.sampling)
        total(terms, alone).backward()

    for name in TERMS:
        timed(f"{name} loss", lambda name=name: one_loss(name))
    reached = [(value, leaf.grad) for value, leaf in zip(output[:-1], leaves) if leaf.grad is not None]
    timed("network, backward", lambda: torch.autograd.backward(*map(list, zip(*reached))))
    state.adam.found_inf = torch.zeros((), device=device)
    timed("optimiser", state.adam.step)
    state.adam.zero_grad(set_to_none=True)
    return times


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2, help="of a batch; twice as many images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compiled variants as well")
    parser.add_argument("--out", type=Path, default=Path("bench/step.md"))
    options = parser.parse_args()
    device, part = torch.device(options.device), BatchPart(0, options.items, options.items)
    states = make_states(options.device, compiled=options.compile)
    guided = [name for name in states if "without" not in name and "plain" not in name]
    times: dict[str, list[float]] = {name: [] for name in states}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in guided}
    values: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, *_ = write_store(Path(folder) / "photos.zarr", max(SHARD + 1, options.items))
        raw = request(FromDisk([store]), 0, part)()

        def take(name: str) -> None:
            values[name] = train_step(states[name], raw, 0, rate=0.0, part=part).values

        for repeat in range(options.repeats + 1):
            measured = {name: seconds(lambda name=name: take(name), device) for name in states}
            inner = {name: parts_of(states[name], raw) for name in guided}
            for name in states if repeat else ():
                times[name].append(measured[name])
            for name in guided if repeat else ():
                parts[name].append(inner[name])
        waiting = share_of_waiting(states["bf16"], store, part, options.repeats)

    rows = []
    for name, taken in times.items():
        middle, least = statistics.median(taken), min(taken)
        bare = times.get(f"{name}, without guidance")
        added = [f"{100 * (pick(taken) / pick(bare) - 1):.1f} %" for pick in (statistics.median, min)] if bare else []
        faster = [pick(times["plain fp32"]) / pick(taken) for pick in (statistics.median, min)]
        rows.append(
            [
                name,
                f"{1e3 * middle:.0f} ({1e3 * least:.0f})",
                f"{2 * options.items / middle:.2f}",
                f"{faster[0]:.2f} ({faster[1]:.2f})",
                " (".join(added) + (")" if added else ""),
            ]
        )
    text = table(["step", "ms", "images/s", "times as fast as plain fp32", "guidance adds"], rows)
    rows = []
    for what in parts[guided[0]][0]:
        shares = []
        for name in guided:
            middle = statistics.median(one[what] for one in parts[name])
            shares.append(f"{1e3 * middle:.1f} ({100 * middle / statistics.median(times[name]):.1f} %)")
        rows.append([what, *shares])
    text += "\n" + table(["part", *(f"{name}: ms (share of its step)" for name in guided)], rows) + "\n"
    reference = values["plain fp32"][:-2]
    for name in guided:
        worst = ((values[name][:-2] - reference).abs() / reference.abs()).max().item()
        text += f"{name}: losses differ from those of plain fp32 by {worst:.1e} at most (relative)\n"
    text += (
        f"Waiting for data: {100 * waiting:.2f} % of the time (bf16, one reading thread).\n"
        f"Medians, minima in brackets. {options.items} pairs of 400 x 400 pixels, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    figures = {
        f"guidance, {name}": 100 * (middle[name] / middle[f"{name}, without guidance"] - 1) for name in ("fp32", "bf16")
    }
    figures["training step, bf16"] = middle["plain fp32"] / middle["bf16"]
    record(figures, beside=options.out, device=options.device)


if __name__ == "__main__":
    main()
