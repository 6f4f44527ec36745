"""Stage two on a toy store: it learns, resumes to the bit, refuses what does not fit, and never needs SAM."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toys import toy_store

import samfeat.pipelines.training.step as stepping
from samfeat.pipelines.config import learning_rate, load_config
from samfeat.pipelines.train import train
from samfeat.pipelines.training.objective import losses, total
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork

KILLS = int(os.environ.get("SAMFEAT_KILLS", 6))
SETTINGS = [
    "optimiser.batch_size=2",
    "optimiser.steps=4",
    "optimiser.warmup=0.0",
    "run.precision=fp32",
    "run.accelerator=cpu",
    "run.log_every=1",
    "run.validate_every=4",
    "run.checkpoint_every=2",
    "run.validation_images=2",
    "run.validation_pairs=2",
    "run.max_keypoints=50",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    toy_store(folder / "a.zarr")
    return folder


def config(*overrides: str, preset: str = "default"):
    return load_config(preset, [*SETTINGS, *overrides])


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(cache, folder, config())


def test_a_run_leaves_everything_behind(run):
    files = {path.name for path in run.folder.iterdir()}
    assert files == {
        "config.yaml",
        "last.ckpt",
        "previous.ckpt",
        "weights.safetensors",
        "best.safetensors",
        "metrics.jsonl",
        "tensorboard",
        "curves.png",
        "report.html",
    }
    logged = [line for line in metrics(run.folder) if "loss/total" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        parts = [line[f"loss/{name}"] for name in ("detection", "descriptor", "relation", "edge", "wsc")]
        assert np.isclose(sum(parts), line["loss/total"], rtol=1e-5)
    student = SAMFeat.from_pretrained(run.folder / "weights.safetensors")
    assert student.provenance["step"] == 4
    assert student.provenance["stores"][0]["teacher"] == {"name": "toy", "strength": 1.0}
    assert student.provenance["config"]["optimiser"]["batch_size"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_is_the_undisturbed_run_to_the_bit(cache, run, tmp_path, number):
    def cut(state):
        if state.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(cache, tmp_path / "cut", config(), progress=cut)
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["step"] == 3
    resumed = train(cache, tmp_path / "cut", config(), resume=True)
    assert_equal_runs(tmp_path / "cut", run.folder)
    assert resumed.first == run.first
    assert resumed.last == run.last


def assert_equal_runs(folder, other):
    expected, got = (load_file(place / "weights.safetensors") for place in (other, folder))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "waiting")} for row in metrics(f)]
        for f in (other, folder)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_killed_at_random_steps(cache, tmp_path):
    steps = 10 * KILLS
    settings = [f"optimiser.steps={steps}", f"run.validate_every={steps}", "run.checkpoint_every=2", "run.log_every=1"]
    whole = train(cache, tmp_path / "whole", config(*settings))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from samfeat.pipelines.config import learning_rate, load_config; from samfeat.pipelines.train import train\n"
        f"config = load_config('default', {[*SETTINGS, *settings]!r})\n"
        f"train({str(cache)!r}, {str(tmp_path / 'cut')!r}, config, resume=True, "
        "progress=lambda state: print(state.step, flush=True))\n"
    )
    moments, deaths = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        if not process.stdout.readline():
            break
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
    assert deaths >= KILLS // 2
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(cache, tmp_path / "cut", config(*settings), resume=True)
        shutil.rmtree(tmp_path / "whole")
        whole = train(cache, tmp_path / "whole", config(*settings))
    finally:
        torch.set_num_threads(torch_threads)
    assert_equal_runs(tmp_path / "cut", whole.folder)


@pytest.mark.parametrize("where", ["host", "device"])
def test_training_from_memory_is_the_same_to_the_bit(cache, run, tmp_path, where):
    train(cache, tmp_path / "run", config(f"data.in_memory={where}"))
    assert_equal_runs(tmp_path / "run", run.folder)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(cache, run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "previous.ckpt", weights_only=True)["step"] == 2
    (tmp_path / "run" / "last.ckpt").write_bytes(b"cut off")
    train(cache, tmp_path / "run", config(), resume=True)
    assert_equal_runs(tmp_path / "run", run.folder)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"last\.ckpt is not a readable checkpoint"):
        train(cache, tmp_path / "run", config(), resume=True)


def test_a_loss_that_is_not_finite_leaves_its_step_out(cache, run, tmp_path, monkeypatch):
    calls, whole = [], stepping.losses

    def sick(*arguments, **options):
        terms = whole(*arguments, **options)
        calls.append(1)
        return terms | {"edge": terms["edge"] * (float("nan") if len(calls) in bad else 1)}

    monkeypatch.setattr(stepping, "losses", sick)
    bad, said = {2}, []
    train(cache, tmp_path / "one", config(), report=said.append)
    assert len(said) == 1
    assert "step 1 left out: edge, total, gradient_norm not finite for scene" in said[0]
    saved = torch.load(tmp_path / "one" / "bad_batch_1.pt", weights_only=True)
    assert saved["images"].dtype == torch.uint8
    weights = load_file(tmp_path / "one" / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    state = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)
    assert state["bad_steps"] == [1]
    assert {float(entry["step"]) for entry in state["optimiser"]["state"].values()} == {3.0}

    calls.clear()
    bad = {2, 3, 4}
    with pytest.raises(ValueError, match="in a row"):
        train(cache, tmp_path / "three", config("run.checkpoint_every=1"))
    kept = torch.load(tmp_path / "three" / "last.ckpt", weights_only=True)
    assert kept["step"] == 3
    calls.clear()
    bad = {2, 4}
    train(cache, tmp_path / "two", config(), report=said.append)


def test_a_finished_run_resumes_to_itself(cache, run):
    before = (run.folder / "weights.safetensors").read_bytes()
    assert train(cache, run.folder, config(), resume=True).last == run.last
    assert (run.folder / "weights.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "rate"), [("default", 3e-4), ("released", 1e-4)])
def test_overfitting_one_batch_lowers_every_term(cache, tmp_path, preset, rate):
    overrides = ["optimiser.steps=30", "optimiser.schedule=linear", f"optimiser.learning_rate={rate}"]
    overrides += ["run.validate_every=100"]
    train(cache, tmp_path / "run", config(*overrides, preset=preset), overfit=True)
    logged = [line for line in metrics(tmp_path / "run") if "loss/total" in line]
    first, last = logged[0], logged[-1]
    for term in ("detection", "descriptor", "relation", "wsc", "total"):
        assert last[f"loss/{term}"] < first[f"loss/{term}"], term
    assert last["loss/total"] < 0.8 * first["loss/total"]


def test_training_does_not_need_sam(cache, tmp_path):
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segment_anything":
            raise ImportError("segment_anything is not here")
sys.meta_path.insert(0, Blocked())
from samfeat.pipelines.config import learning_rate, load_config
from samfeat.pipelines.train import train
summary = train({str(cache)!r}, {str(tmp_path / "run")!r}, load_config("default", {[*SETTINGS, "optimiser.steps=1"]!r}))
assert not any(name in sys.modules for name in ("segment_anything", "samfeat.teacher_cache.teacher", "dask"))
print("trained", summary.steps)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained 1" in done.stdout


def test_what_does_not_fit_is_refused(cache, run, tmp_path):
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        train(cache, run.folder, config())
    with pytest.raises(ValueError, match=r"config\.optimiser\.learning_rate: 0\.001 there, 0\.5 asked for"):
        train(cache, run.folder, config("optimiser.learning_rate=0.5"), resume=True)
    other = tmp_path / "other"
    toy_store(other / "a.zarr", seed=1)
    with pytest.raises(ValueError, match="belongs to another run"):
        train(other, run.folder, config(), resume=True)
    with pytest.raises(FileNotFoundError, match="holds no store"):
        train(tmp_path, tmp_path / "run", config())
    toy_store(tmp_path / "bad" / "a.zarr", 2, broken=(0, 1))
    with pytest.raises(ValueError, match="nothing to train on"):
        train(tmp_path / "bad", tmp_path / "run", config())


def test_a_damaged_checkpoint_is_refused(cache, run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes((run.folder / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(cache, folder, config(), resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(cache, tmp_path):
    with pytest.raises(ValueError, match="no usable CUDA device"):
        train(cache, tmp_path / "run", config("run.accelerator=cuda"))


def test_a_loss_that_is_not_finite_stops_the_run(cache, tmp_path):
    with pytest.raises(ValueError, match=r"left out: .* not finite .* 3 in a row"):
        train(cache, tmp_path / "run", config("optimiser.learning_rate=1e30", "optimiser.steps=10"))


def test_learning_rate_schedules():
    base = load_config("default").optimiser
    linear = dataclasses.replace(base, warmup=0.1)
    rates = [learning_rate(linear, step, 100, 10) for step in range(100)]
    assert np.isclose(rates[0], base.learning_rate / 10)
    assert np.isclose(max(rates), base.learning_rate)
    assert np.isclose(rates[-1], base.learning_rate / 90)
    released = load_config("released").optimiser
    by_epoch = [learning_rate(released, 7 * epoch, 210, 7) for epoch in range(30)]
    assert by_epoch[0] == by_epoch[1] == 1e-3
    assert np.isclose(by_epoch[2], 1e-3 * (1 - 1 / 31))
    assert np.isclose(by_epoch[29], 9.68e-5, rtol=1e-3)  # the figure of the released schedule


def test_terms_with_weight_zero_are_not_computed_and_the_sum_is_weighted(cache):
    from samfeat.pipelines.training.batches import Item, Part, item_generators, make_batch, read_batch
    from samfeat.pipelines.training.cached import FromDisk
    from samfeat.teacher_cache.store import open_stores

    chosen = config("losses.wsc=0", "losses.edge=0.5")
    items = [Item(0, "real", 0), Item(0, "synthetic", 1)]
    raw = read_batch(FromDisk(open_stores(cache)), items, chosen.data, item_generators(0, 0, Part(0, 2, 2)))
    batch = make_batch(raw, chosen.data, torch.Generator().manual_seed(0))
    network = SAMFeatNetwork(chosen.network, generator=torch.Generator().manual_seed(0))
    terms = losses(network(batch.images), batch, chosen.losses, sampling=chosen.network.sampling)
    assert list(terms) == ["detection", "descriptor", "relation", "edge"]
    expected = sum(terms.values()) - 0.5 * terms["edge"]
    torch.testing.assert_close(total(terms, chosen.losses), expected)
