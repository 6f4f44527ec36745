"""Who makes the shards: threads, worker processes, a running cluster that changes; workers that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shard_makers import Broken, Marker

from samfeat.pipelines.workers import AHEAD, Workers, make_shards


def made(folder: Path) -> dict[int, str]:
    return {int(path.name): path.read_text() for path in folder.iterdir() if path.name.isdecimal()}


def test_threads_make_every_shard_once_and_no_more_at_a_time_than_asked(tmp_path):
    maker = Marker(tmp_path, pause=0.01)
    done = list(make_shards(maker, range(5, 45), Workers(threads=3)))
    assert sorted(shard for shard, _ in done) == list(range(5, 45))
    assert set(made(tmp_path)) == set(range(5, 45))
    assert 1 < maker.most <= 3


def test_a_consumer_that_leaves_stops_the_threads(tmp_path):
    maker = Marker(tmp_path, pause=0.01)
    shards = make_shards(maker, range(1000), Workers(threads=2))
    next(shards)
    shards.close()
    count = len(made(tmp_path))
    assert maker.stopped
    assert count <= 2 * AHEAD + 2
    time.sleep(0.05)
    assert len(made(tmp_path)) == count


def test_an_error_in_a_thread_arrives_as_it_was(tmp_path):
    with pytest.raises(OSError, match="No space left") as error:
        list(make_shards(Broken(tmp_path), range(100), Workers(threads=2)))
    assert error.value.errno == 28
    assert len(made(tmp_path)) < 20


def test_nothing_to_do_starts_nothing(tmp_path):
    assert list(make_shards(Marker(tmp_path), [], Workers())) == []


@pytest.mark.parametrize(
    "wrong",
    [{"threads": 0}, {"processes": -1}, {"processes": 2, "devices": ("0",)}, {"devices": ("0",), "scheduler": "x"}],
)
def test_contradictions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"choose one|at least"):
        Workers(**wrong)


@pytest.mark.parametrize("device", [str(torch.cuda.device_count()), "a", "-1"])
def test_a_gpu_that_is_not_there(tmp_path, device):
    with pytest.raises(ValueError, match=f"no GPU '{device}' here"):
        list(make_shards(Marker(tmp_path), range(3), Workers(devices=(device,))))
    assert made(tmp_path) == {}


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(tmp_path, caplog):
    caplog.set_level("INFO", "samfeat")
    maker = Marker(tmp_path, pause=0.01, kill=7)
    done = list(make_shards(maker, range(30), Workers(processes=2)))
    assert sorted(shard for shard, _ in done) == list(range(30))
    assert (tmp_path / "killed7").exists()
    workers = set(made(tmp_path).values())
    assert str(os.getpid()) not in workers
    assert "http://" in caplog.text


@pytest.mark.slow
def test_errors_of_workers_arrive_and_murderers_are_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space left") as error:
        list(make_shards(Broken(tmp_path), range(100), Workers(processes=1)))
    assert error.value.errno == 28
    monkeypatch.setattr("samfeat.pipelines.workers.DEATHS", 1)
    with pytest.raises(ValueError, match="died over one shard"):
        list(make_shards(Marker(tmp_path, kill=2, always=True), range(4), Workers(processes=1)))


def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("samfeat.pipelines.workers.PATIENCE", 0.5)
    with pytest.raises(ValueError, match="no Dask scheduler answers at"):
        list(make_shards(Marker(tmp_path), range(3), Workers(scheduler="tcp://127.0.0.1:9")))


@pytest.mark.slow
def test_a_running_cluster_may_grow_and_shrink(tmp_path):
    tools = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []

    def start(*arguments):
        processes.append(subprocess.Popen([tools / "dask", *arguments], env=environment, stderr=subprocess.DEVNULL))
        return processes[-1]

    address = tmp_path / "scheduler.json"
    start("scheduler", "--scheduler-file", str(address), "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
    worker = ["worker", "--scheduler-file", str(address), "--no-dashboard", "--nthreads", "1"]
    try:
        while not address.exists():
            time.sleep(0.05)
        url = json.loads(address.read_text())["address"]
        first = start(*worker)
        folder = tmp_path / "made"
        folder.mkdir()
        done: list[tuple[int, None]] = []
        shards = make_shards(Marker(folder, pause=0.1), range(80), Workers(scheduler=url))
        for shard in shards:
            done.append(shard)
            if len(done) == 5:
                start(*worker)
            if len(set(made(folder).values())) == 2 and first.poll() is None:
                first.terminate()
        assert sorted(shard for shard, _ in done) == list(range(80))
        assert len(set(made(folder).values())) == 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
