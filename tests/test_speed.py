"""The benchmark of speed: what is measured, in which order, and what the table says. No time is tested."""

import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from samfeat.cli import app
from samfeat.pipelines import speed
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.speed import added_memory, benchmark_speed, measure, parse_size, photograph, using_threads
from samfeat.student.extractor import SAMFeat


def test_contenders_take_turns_and_the_first_round_is_not_timed(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speed, "added_memory", lambda contender: contender() or 7.0)
    durations = {"a": iter([9, 1, 3, 2]), "b": iter([9, 10, 30, 50])}

    def contender(name):
        def run():
            calls.append(name)
            clock[0] += next(durations[name])

        return run

    seen = []
    found = measure(
        {name: contender(name) for name in "ab"}, repeats=3, images=2, progress=lambda *state: seen.append(state)
    )
    assert calls == list("abababab")
    assert seen == [(n, 8) for n in range(1, 9)]
    assert found == [("a", 1000.0, 500.0, 7.0), ("b", 15000.0, 5000.0, 7.0)]


def test_added_memory_sees_what_is_allocated():
    def lasting():
        kept = np.ones(64 << 20, np.uint8)
        time.sleep(0.2)
        return kept

    assert added_memory(lambda: time.sleep(0.05)) < 32
    assert added_memory(lasting) == pytest.approx(64, abs=16)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_sizes():
    assert parse_size("480x640") == (480, 640)
    for wrong in ("480", "480x", "axb", "0x64", "480x100"):
        with pytest.raises(ValueError, match=r"480x640"):
            parse_size(wrong)
    assert photograph((64, 96)).shape == (64, 96, 3)


def test_the_table_holds_every_contender(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "precisions", lambda device: ["fp32", "bf16"])
    models = {"slim": SAMFeat("slim", detection_threshold=0.0, max_keypoints=20)}
    found = benchmark_speed(
        tmp_path / "speed.md",
        models=models,
        methods=[load_method("orb", max_keypoints=50)],
        size=(64, 96),
        threads=1,
        batch=2,
        repeats=1,
    )
    names = [f"slim {p}, {what}" for p in ("fp32", "bf16") for what in ("network", "features")] + ["orb, features"]
    assert [timing.name for timing in found] == names
    assert all(0 < timing.minimum <= timing.median for timing in found)
    text = (tmp_path / "speed.md").read_text()
    assert "64 x 96 pixels, 2 images a call, 1 threads" in text
    assert all(f"| {name} |" in text for name in names)


def test_peers_need_weights(tmp_path):
    assert [m.name for m in speed.other_methods(None, max_keypoints=9, device="cpu")] == ["sift", "orb"]
    with pytest.raises(FileNotFoundError, match="begin with aliked, disk, xfeat"):
        speed.other_methods(tmp_path, max_keypoints=9, device="cpu")


def test_command(tmp_path):
    options = ["--size", "64x96", "--repeats", "1", "--max-keypoints", "30", "--device", "cpu", "--threads", "1"]
    done = CliRunner().invoke(app, ["benchmark", "speed", "--out", str(tmp_path / "s.md"), *options])
    assert done.exit_code == 0, done.output
    assert "samfeat-slim fp32, features" in done.output
    assert "sift, features" in (tmp_path / "s.md").read_text()
    wrong = CliRunner().invoke(app, ["benchmark", "speed", "--size", "480"])
    assert wrong.exit_code == 2
