"""Make shards in threads of this process, worker processes, or a Dask cluster. Only this file imports dask.

However many workers there are, come and go or die, a shard is one task: whoever gets it writes all of it. At most a few
tasks a worker are handed out at any time, so that memory does not grow with the number of shards.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

AHEAD = 2  # tasks handed out for every thread that works
DEATHS = 10  # workers that may die on one shard before the shard is blamed
PATIENCE = 20.0  # seconds for a scheduler to answer
PLUGIN = "samfeat-shards"


class ShardMaker(Protocol):
    """Makes whole shards of a store. Pickled once for every worker process."""

    def __call__(self, shard: int) -> Any:
        """Make one whole shard; the return value (picklable) is passed to the caller of make_shards."""
        ...

    def stop(self) -> None:
        """Make running calls, in any thread, end soon."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who makes the shards.

    Attributes:
        threads: shards processed at once per process; None means one per processor in this process, 2 in others.
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
        """Shards processed at once per process."""
        return self.threads or ((os.cpu_count() or 1) if self.here else 2)

    @property
    def here(self) -> bool:
        """Whether this process does the work itself."""
        return not (self.processes or self.devices or self.scheduler)


def make_shards(maker: ShardMaker, shards: Sequence[int], workers: Workers) -> Iterator[tuple[int, Any]]:
    """Make all shards; yields the number of each finished shard and the maker's return value, as they finish.

    Args:
        maker: makes a shard; must be picklable if ``workers`` are other processes.
        shards: the shards to make.
        workers: the workers to use.

    Raises:
        ValueError: no such GPU, the cluster cannot be reached, or its workers repeatedly die on one shard.
        Exception: raised by a shard; running shards are then abandoned.
    """
    for device in workers.devices:
        _check_device(device)
    if workers.here:
        yield from _in_threads(maker, shards, workers.in_flight)
        return
    with _cluster(workers) as client:
        logger.info(f"dashboard: {client.dashboard_link}")
        yield from _on_cluster(client, maker, shards)


def _check_device(device: str) -> None:
    import torch

    there = torch.cuda.device_count()
    if not device.isdecimal() or int(device) >= there:
        raise ValueError(f"no GPU {device!r} here ({there} GPUs): leave --devices out, or use --workers")


def _in_threads(maker: ShardMaker, shards: Sequence[int], threads: int) -> Iterator[tuple[int, Any]]:
    waiting: dict[Future[Any], int] = {}
    left = iter(shards)
    with ThreadPoolExecutor(threads, thread_name_prefix="samfeat-shard") as pool:
        try:
            while True:
                for shard in _some(left, threads * AHEAD - len(waiting)):
                    waiting[pool.submit(maker, shard)] = shard
                if not waiting:
                    return
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    returned = done.result()
                    yield waiting.pop(done), returned
        finally:
            maker.stop()
            pool.shutdown(wait=True, cancel_futures=True)  # nothing is written after this function has ended


def _on_cluster(client: Client, maker: ShardMaker, shards: Sequence[int]) -> Iterator[tuple[int, Any]]:
    from distributed import KilledWorker, WorkerPlugin, as_completed, get_worker

    class Plugin(WorkerPlugin):
        """Send the maker, with the teacher's weights, to a worker once."""

        name = PLUGIN

        def __init__(self, maker: ShardMaker) -> None:
            self.maker = maker

    def make(shard: int) -> tuple[int, Any]:
        return shard, cast(Plugin, get_worker().plugins[PLUGIN]).maker(shard)

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
                made = done.result()
            except KilledWorker as error:
                raise ValueError(
                    f"{DEATHS} workers died over one shard, the last was {error.last_worker.address}: "
                    "is there enough memory for the teacher in each of them? Finished shards are kept"
                ) from error
            done.release()
            for future in submit(_room(client) - running.count()):
                running.add(future)
            yield made
    finally:
        client.cancel(list(running.futures), force=True)


def _room(client: Client) -> int:
    """Number of tasks that keep the current workers busy; a cluster may grow and shrink."""
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
    """Ignore Ctrl-C in workers: it reaches all processes of a terminal, and the main process handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
