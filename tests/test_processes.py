"""Several processes train as one: the same losses, one record, one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import SETTINGS, SMALL_WINDOWS, config

from samfeat.pipelines.train import train

STEPS = [
    "optimiser.batch_size=5",  # shared as 2 and 3
    "optimiser.steps=20",
    "optimiser.learning_rate=1e-5",  # at a hundred times that, single processes with other thread numbers part as well
    "run.validate_every=100",
    "run.checkpoint_every=100",
]


@pytest.fixture(scope="module")
def cache(toy_cache):
    return toy_cache


def command(cache, out, *more: str) -> list[str]:
    words = ["train", "--cache", cache, "--out", out, *SETTINGS, SMALL_WINDOWS, *STEPS, *more]
    return [str(word) for word in words]


def run(words: list[str], *, module: tuple[str, ...] = ("samfeat.cli",)) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return subprocess.run([sys.executable, "-m", *module, *words], capture_output=True, text=True, env=environment)


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    arguments = [sys.executable, "-u", "-m", "samfeat.cli", *words]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def losses_of(folder) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {name: value for name, value in row.items() if name.startswith("loss/")}
        for row in rows
        if "loss/total" in row
    }


def run_of_one_process(cache, folder, *overrides: str):
    train(cache, folder, config(*STEPS, *overrides))
    return folder


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    return run_of_one_process(cache, tmp_path_factory.mktemp("runs") / "alone")


@pytest.mark.parametrize(
    ("starter", "steps"),
    [
        ("--devices", 4),
        pytest.param("--devices", 20, marks=pytest.mark.slow),
        pytest.param("torchrun", 20, marks=pytest.mark.slow),
    ],
)
def test_two_processes_follow_one(cache, tmp_path, starter, steps):
    words = command(cache, tmp_path / "two", f"optimiser.steps={steps}")
    if starter == "torchrun":
        torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "samfeat.cli")
        done = run(words, module=torchrun)
    else:
        done = run([*words, "--devices", "2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{steps} steps.") == 1
    assert done.stdout.count(f"step {steps:>6}") == 1
    assert not done.stderr
    alone = run_of_one_process(cache, tmp_path / "alone", f"optimiser.steps={steps}")
    expected, got = losses_of(alone), losses_of(tmp_path / "two")
    assert list(expected) == list(range(1, steps + 1))
    for step, terms in expected.items():
        assert got[step] == pytest.approx(terms, rel=1e-5, abs=1e-6), step


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(cache, alone, tmp_path):
    process = start(command(cache, tmp_path / "run", "--devices", "2"))
    until_step(process, 6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    step = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["step"]
    assert 6 <= step < 20
    done = run(command(cache, tmp_path / "run", "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    expected, got = losses_of(alone), losses_of(tmp_path / "run")
    for number, terms in expected.items():
        assert got[number] == pytest.approx(terms, rel=1e-5, abs=1e-6), number


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(cache, alone, tmp_path):
    words = command(cache, tmp_path / "run", "--devices", "2", "run.checkpoint_every=2")
    process = start(words)
    until_step(process, 5)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "--resume auto continues" in error
    assert "Traceback" not in error
    done = run([*words, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (tmp_path / "run", alone))
    assert weights.keys() == expected.keys()
    assert losses_of(tmp_path / "run")[20] == pytest.approx(losses_of(alone)[20], rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_mistakes_of_the_user_are_one_line(cache, tmp_path):
    done = run(command(cache, tmp_path / "run", "--devices", "2", "optimiser.batch_size=1"))
    assert done.returncode == 2
    assert "a batch of 1 items cannot be shared by 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


def until_step(process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return
        assert time.monotonic() < deadline
    raise AssertionError(process.stderr.read())
