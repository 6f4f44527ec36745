"""Where shards are made: threads of this process, worker processes, or a Dask cluster. Only this file imports dask.

However many workers there are, come and go or die, a shard is one task: whoever gets it writes all of it. At most a few
tasks a worker are handed out at any time, so that memory does not grow with the number of shards.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from distributed import Client

AHEAD = 2  # tasks handed out for every thread that works
DEATHS = 10  # workers that may die over one shard before it counts as their murderer
PATIENCE = 20.0  # seconds for a scheduler to answer
PLUGIN = "samfeat-shards"


class ShardMaker(Protocol):
    """Makes whole shards of a store. Pickled once for every worker process."""

    def __call__(self, shard: int) -> None:
        """Make one shard, from beginning to end."""
        ...

    def stop(self) -> None:
        """Make the calls that are under way, in any thread, end soon."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who makes the shards.

    Attributes:
        threads: shards in flight in one process; None is one a processor in this process, 2 in others.
        processes: worker processes on this machine.
        devices: GPUs of this machine, by number; one worker process each.
        scheduler: address of a running Dask scheduler; its workers need this package, and see the same files.
    """

    threads: int | None = None
    processes: int = 0
    devices: tuple[str, ...] = ()
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if (self.threads is not None and self.threads < 1) or self.processes < 0:
            raise ValueError(f"threads must be at least 1 and processes at least 0, got {self}")
        if sum([bool(self.processes), bool(self.devices), bool(self.scheduler)]) > 1:
            raise ValueError("choose one of --workers, --devices and --scheduler")

    @property
    def in_flight(self) -> int:
        """Shards in flight in one process."""
        return self.threads or ((os.cpu_count() or 1) if self.here else 2)

    @property
    def here(self) -> bool:
        """Whether this process does the work itself."""
        return not (self.processes or self.devices or self.scheduler)


def make_shards(
    maker: ShardMaker, shards: Sequence[int], workers: Workers, *, report: Callable[[str], None] = print
) -> Iterator[int]:
    """Make all shards; yields the number of each one that is finished, in the order of finishing.

    Args:
        maker: makes a shard; a picklable object where ``workers`` are other processes.
        shards: what is to be made.
        workers: who makes it.
        report: takes one line for people: where the dashboard is.

    Raises:
        ValueError: no such GPU, the cluster cannot be reached, or its workers die over a shard again and again.
        Exception: what a shard raised; shards under way are then given up.
    """
    for device in workers.devices:
        _check_device(device)
    if workers.here:
        yield from _in_threads(maker, shards, workers.in_flight)
        return
    with _cluster(workers) as client:
        report(f"dashboard: {client.dashboard_link}")
        yield from _on_cluster(client, maker, shards)


def _check_device(device: str) -> None:
    import torch

    there = torch.cuda.device_count()
    if not device.isdecimal() or int(device) >= there:
        raise ValueError(f"no GPU {device!r} here ({there} GPUs): leave --devices out, or use --workers")


def _in_threads(maker: ShardMaker, shards: Sequence[int], threads: int) -> Iterator[int]:
    waiting: dict[Future[None], int] = {}
    left = iter(shards)
    with ThreadPoolExecutor(threads, thread_name_prefix="samfeat-shard") as pool:
        try:
            while True:
                for shard in _some(left, threads * AHEAD - len(waiting)):
                    waiting[pool.submit(maker, shard)] = shard
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    done.result()
                    yield waiting.pop(done)
        finally:
            maker.stop()
            pool.shutdown(wait=True, cancel_futures=True)  # nothing is written after this function has ended


def _on_cluster(client: Client, maker: ShardMaker, shards: Sequence[int]) -> Iterator[int]:
    from distributed import KilledWorker, WorkerPlugin, as_completed, get_worker

    class Plugin(WorkerPlugin):
        """Brings the maker, and with it the teacher's weights, to a worker once."""

        name = PLUGIN

        def __init__(self, maker: ShardMaker) -> None:
            self.maker = maker

    def make(shard: int) -> int:
        cast(Plugin, get_worker().plugins[PLUGIN]).maker(shard)
        return shard

    try:
        client.register_plugin(Plugin(maker))
    except Exception as error:  # whatever a worker raised, as text
        raise ValueError(f"the workers cannot begin: {error}") from error
    left = iter(shards)

    def submit(count: int) -> list[Any]:
        return [client.submit(make, shard, pure=False, retries=0) for shard in _some(left, count)]

    running = as_completed(submit(_room(client)), loop=client.loop)
    try:
        for done in running:
            try:
                shard = done.result()
            except KilledWorker as error:
                raise ValueError(
                    f"{DEATHS} workers died over one shard, the last was {error.last_worker.address}: "
                    "is there enough memory for the teacher in each of them? Finished shards are kept"
                ) from error
            done.release()
            for future in submit(_room(client) - running.count()):
                running.add(future)
            yield shard
    finally:
        client.cancel(list(running.futures), force=True)


def _room(client: Client) -> int:
    """Tasks that keep the workers of this moment busy; a cluster may grow and shrink."""
    return max(1, sum(client.nthreads().values())) * AHEAD


def _some(left: Iterator[int], count: int) -> Iterator[int]:
    for _, shard in zip(range(count), left, strict=False):
        yield shard


@contextmanager
def _cluster(workers: Workers) -> Iterator[Client]:
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    with dask.config.set({"distributed.scheduler.allowed-failures": DEATHS}):
        if workers.scheduler:
            try:
                client = Client(workers.scheduler, timeout=PATIENCE, set_as_default=False)
            except (OSError, TimeoutError) as error:
                raise ValueError(
                    f"no Dask scheduler answers at {workers.scheduler}: start one, or use --workers"
                ) from error
            with client:
                yield client
            return
        if workers.devices and importlib.util.find_spec("dask_cuda"):
            from dask_cuda import LocalCUDACluster

            with _children_ignore_interrupts():
                cluster = LocalCUDACluster(
                    CUDA_VISIBLE_DEVICES=list(workers.devices), threads_per_worker=workers.in_flight
                )
        else:
            environments = [{"CUDA_VISIBLE_DEVICES": device} for device in workers.devices] or [{}] * workers.processes
            options = {"nthreads": workers.in_flight, "memory_limit": 0, "silence_logs": logging.CRITICAL}
            with _children_ignore_interrupts():
                cluster = SpecCluster(
                    scheduler={"cls": Scheduler, "options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}},
                    workers={
                        number: {"cls": Nanny, "options": {**options, "env": environment}}
                        for number, environment in enumerate(environments)
                    },
                    silence_logs=logging.CRITICAL,
                )
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; the workers leave the answer to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
