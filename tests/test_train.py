"""Stage two on a toy store: it learns, resumes to the bit, refuses what does not fit, and never needs SAM."""

from __future__ import annotations

import dataclasses
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
from killable import Killable
from killable_programs import train_on
from safetensors.torch import load_file
from toy_runs import SETTINGS, SMALL_WINDOWS, config, metrics
from toys import toy_store

import samfeat.pipelines.train as training
from samfeat.pipelines.config import learning_rate, load_config
from samfeat.pipelines.train import new_state, train
from samfeat.pipelines.training.checkpoint import load_state, save_state
from samfeat.pipelines.training.objective import losses, total
from samfeat.pipelines.training.processes import connect
from samfeat.pipelines.training.report import validated
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork
from samfeat.student.weights import find_weights

pytestmark = pytest.mark.usefixtures("without_charts")  # but in the run that is looked at, which is of the module
KILLS = int(os.environ.get("SAMFEAT_KILLS", 6))


@pytest.fixture(scope="module")
def cache(toy_cache):
    return toy_cache


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
    weights = {"detection": 1, "position": 1, "descriptor": 1, "relation": 1, "edge": 5, "wsc": 0.1}  # of the default
    for line in logged:
        parts = [weight * line[f"loss/{name}"] for name, weight in weights.items()]
        assert np.isclose(sum(parts), line["loss/total"], rtol=1e-5)
    student = SAMFeat.from_pretrained(run.folder / "weights.safetensors")
    assert student.provenance["step"] == 4
    assert student.provenance["stores"][0]["teacher"] == {"name": "toy", "strength": 1.0}
    assert student.provenance["config"]["optimiser"]["batch_size"] == 2
    state = torch.load(run.folder / "last.ckpt", weights_only=True)
    saved = load_file(run.folder / "weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in state["average"].items())  # the average is saved
    assert not torch.equal(state["network"]["conv_des.weight"], state["average"]["conv_des.weight"])
    assert run.last["held_out"] == 1
    assert "Validated on held-out images" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_is_the_undisturbed_run_to_the_bit(cache, run, tmp_path, monkeypatch, number):
    def cut(state):
        if state.step == 3:
            os.kill(os.getpid(), number)

    def save(folder, state):  # the second Ctrl-C comes while the checkpoint is being written
        os.kill(os.getpid(), number)
        save_state(folder, state)

    monkeypatch.setattr("samfeat.pipelines.training.run_folder.save_state", save)
    before = signal.getsignal(number)
    with pytest.raises(
        KeyboardInterrupt, match=r"saved after step 3 in .*, the same command with --resume auto continues"
    ):
        train(cache, tmp_path / "cut", config(), progress=cut)
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["step"] == 3
    resumed = train(cache, tmp_path / "cut", config(), resume=True)
    assert_equal_runs(tmp_path / "cut", run.folder)
    assert resumed.first == run.first
    assert resumed.last == run.last
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (tmp_path / "cut", run.folder)]
    for part in ("network", "average"):
        assert all(torch.equal(states[0][part][name], value) for name, value in states[1][part].items())


def assert_equal_runs(folder, other):
    expected, got = (load_file(place / "weights.safetensors") for place in (other, folder))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "waiting")} for row in metrics(f)]
        for f in (other, folder)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_steps(cache, tmp_path, kills):
    steps = 10 * kills
    settings = [f"optimiser.steps={steps}", f"run.validate_every={steps}", "run.checkpoint_every=2", "run.log_every=1"]
    moments, deaths = random.Random(0), 0
    for _ in range(kills):
        process = Killable(train_on, cache, tmp_path / "cut", settings)
        for _ in range(moments.randint(1, 5)):  # steps
            process.read()
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
    assert deaths >= max(1, kills // 2)
    train(cache, tmp_path / "cut", config(*settings), resume=True)
    whole = train(cache, tmp_path / "whole", config(*settings))
    assert_equal_runs(tmp_path / "cut", whole.folder)


@pytest.mark.parametrize("where", ["host", "device"])
def test_training_from_memory_is_the_same_to_the_bit(cache, run, tmp_path, where):
    train(cache, tmp_path / "run", config(f"data.in_memory={where}"))
    assert_equal_runs(tmp_path / "run", run.folder)


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def poison(path):
    """A checkpoint that is whole, but for weights that are NaN."""
    state = torch.load(path, weights_only=True)
    state.pop("version")
    state["average"] = {name: torch.full_like(value, torch.nan) for name, value in state["average"].items()}
    path.unlink()
    save_state(path.parent, state)


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_a_checkpoint_is_found(run, tmp_path, caplog, seed):
    rng = random.Random(seed)
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copy(run.folder / name, tmp_path)
    assert load_state(tmp_path, torch.device("cpu"))["step"] == 4
    flip_a_bit(tmp_path / "last.ckpt", rng)
    caplog.clear()
    assert load_state(tmp_path, torch.device("cpu"))["step"] == 2
    assert caplog.messages[0].endswith("its SHA-256 does not match: resuming from previous.ckpt")
    flip_a_bit(tmp_path / "previous.ckpt", rng)
    with pytest.raises(ValueError, match=r"last\.ckpt is not a readable checkpoint: its SHA-256 does not match"):
        load_state(tmp_path, torch.device("cpu"))


def test_a_checkpoint_of_nan_is_refused(run, tmp_path):
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copy(run.folder / name, tmp_path)
    poison(tmp_path / "last.ckpt")
    assert load_state(tmp_path, torch.device("cpu"))["step"] == 2
    (tmp_path / "previous.ckpt").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt holds weights that are not finite: delete it") as error:
        load_state(tmp_path, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(cache, run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "last.ckpt", random.Random(9))
    train(cache, tmp_path / "run", config(), resume=True)
    assert_equal_runs(tmp_path / "run", run.folder)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"last\.ckpt is not a readable checkpoint"):
        train(cache, tmp_path / "run", config(), resume=True)


def test_a_second_run_in_the_same_folder_is_refused(cache, tmp_path):
    process = Killable(train_on, cache, tmp_path / "run", ["optimiser.steps=100000", "run.log_every=1"])
    assert process.read() == 1
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on ") as error:
        train(cache, tmp_path / "run", config(), resume=True)
    assert "\n" not in str(error.value)
    process.kill()
    process.wait()
    assert (tmp_path / "run.locks").exists()  # a killed run leaves its lock, and the next one takes over
    settings = ["optimiser.steps=100000", "run.log_every=1"]
    again = Killable(train_on, cache, tmp_path / "run", settings)
    assert again.read() >= 1
    again.kill(signal.SIGTERM)
    again.wait()
    assert not (tmp_path / "run.locks").exists()


def test_fine_tuning_starts_at_the_given_weights(cache, run, tmp_path):
    init = f"run.init={run.folder / 'weights.safetensors'}"
    chosen = config(init)
    weights = load_file(run.folder / "weights.safetensors")
    for student in (new_state(chosen, connect(chosen.run)).student, new_state(chosen, connect(chosen.run)).average):
        assert all(torch.equal(weights[name], value) for name, value in student.state_dict().items())
    shipped = new_state(config("run.init=samfeat"), connect(chosen.run)).student.state_dict()
    assert all(torch.equal(shipped[name], value.float()) for name, value in load_file(find_weights("samfeat")).items())
    tuned = train(cache, tmp_path / "tuned", config(init, "optimiser.steps=1"))
    assert (run.last["initialised"], tuned.first["initialised"]) == (0, 1)
    assert tuned.first == run.last | {"initialised": 1}
    assert "which its initial weights may have seen" in (tuned.folder / "report.html").read_text()
    with pytest.raises(ValueError, match=r"has network\.widths=\(16, 32, 64, 128\) and this run") as error:
        train(cache, tmp_path / "slim", config(init, "network.widths=[32, 64, 96, 128]"))
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        train(cache, tmp_path / "none", config(f"run.init={tmp_path / 'none.safetensors'}"))


def test_a_store_without_anything_to_spare_is_validated_on_training_images_and_says_so(tmp_path):
    toy_store(tmp_path / "cache" / "a.zarr", 1)
    summary = train(tmp_path / "cache", tmp_path / "run", config("optimiser.steps=1"))
    assert summary.last["held_out"] == 0
    assert validated(metrics(summary.folder)) == "training images"
    page = (summary.folder / "report.html").read_text()
    assert "training images" in page
    assert "held-out" not in page


def test_a_loss_that_is_not_finite_leaves_its_step_out(cache, run, tmp_path, monkeypatch, caplog):
    calls, whole = [], training.losses

    def sick(*arguments, **options):
        terms = whole(*arguments, **options)
        calls.append(1)
        return terms | {"edge": terms["edge"] * (float("nan") if len(calls) in bad else 1)}

    monkeypatch.setattr(training, "losses", sick)
    bad = {2}
    train(cache, tmp_path / "one", config())
    (said,) = [record.getMessage() for record in caplog.records if record.name == "samfeat.pipelines.train"]
    assert "step 1 left out: edge, total, gradient_norm not finite for scene" in said
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
    train(cache, tmp_path / "two", config())


def test_a_finished_run_resumes_to_itself(cache, run):
    before = (run.folder / "weights.safetensors").read_bytes()
    assert train(cache, run.folder, config(), resume=True).last == run.last
    assert (run.folder / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("preset", "rate", "steps", "left"),
    [
        ("default", 3e-4, 10, 0.95),
        pytest.param("default", 3e-4, 30, 0.8, marks=pytest.mark.slow),
        pytest.param("released", 1e-4, 30, 0.8, marks=pytest.mark.slow),
    ],
)
def test_overfitting_one_batch_lowers_every_term(cache, tmp_path, preset, rate, steps, left):
    overrides = [f"optimiser.steps={steps}", "optimiser.schedule=linear", f"optimiser.learning_rate={rate}"]
    overrides += ["run.validate_every=100"]
    train(cache, tmp_path / "run", config(*overrides, preset=preset), overfit=True)
    logged = [line for line in metrics(tmp_path / "run") if "loss/total" in line]
    first, last = logged[0], logged[-1]
    for term in ("detection", "descriptor", "relation", "wsc", "total"):
        assert last[f"loss/{term}"] < first[f"loss/{term}"], term
    assert last["loss/total"] < left * first["loss/total"]


def test_training_does_not_need_sam(cache, tmp_path):
    settings = [*SETTINGS, SMALL_WINDOWS, "optimiser.steps=1"]
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segment_anything":
            raise ImportError("segment_anything is not here")
sys.meta_path.insert(0, Blocked())
from samfeat.pipelines.config import load_config
from samfeat.pipelines.train import train
summary = train({str(cache)!r}, {str(tmp_path / "run")!r}, load_config("default", {settings!r}))
assert not any(name in sys.modules for name in ("segment_anything", "samfeat.teacher_cache.teachers.sam", "dask"))
print("trained", summary.steps)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained 1" in done.stdout


def test_what_does_not_fit_is_refused(cache, run, tmp_path):
    with pytest.raises(ValueError, match="is not empty: choose another --out"):
        train(cache, run.folder, config())
    with pytest.raises(ValueError, match=r"config\.optimiser\.learning_rate: 0\.0015 there, 0\.5 asked for"):
        train(cache, run.folder, config("optimiser.learning_rate=0.5"), resume=True)
    other = tmp_path / "other"
    toy_store(other / "a.zarr", seed=1)
    with pytest.raises(ValueError, match="belongs to another run"):
        train(other, run.folder, config(), resume=True)
    with pytest.raises(ValueError, match="needs a teacher with 128 channels, such as aliked"):
        train(cache, tmp_path / "distilled", config("losses.distillation=1"))
    assert not (tmp_path / "distilled" / "config.yaml").exists()
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
    linear = dataclasses.replace(base, schedule="linear", warmup=0.1)
    rates = [learning_rate(linear, step, 100, 10) for step in range(100)]
    assert np.isclose(rates[0], base.learning_rate / 10)
    assert np.isclose(max(rates), base.learning_rate)
    assert np.isclose(rates[-1], base.learning_rate / 90)
    cosine = dataclasses.replace(base, schedule="cosine", warmup=0.1)
    rates = [learning_rate(cosine, step, 100, 10) / base.learning_rate for step in range(100)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10)
    assert np.allclose(rates[10:], 0.5 + 0.5 * np.cos(np.pi * np.arange(90) / 90))
    released = load_config("released").optimiser
    by_epoch = [learning_rate(released, 7 * epoch, 210, 7) for epoch in range(30)]
    assert by_epoch[0] == by_epoch[1] == 1e-3
    assert np.isclose(by_epoch[2], 1e-3 * (1 - 1 / 31))
    assert np.isclose(by_epoch[29], 9.68e-5, rtol=1e-3)  # the figure of the released schedule


def test_terms_with_weight_zero_are_not_computed_and_the_sum_is_weighted(cache):
    from samfeat.pipelines.training.batches import make_batch
    from samfeat.pipelines.training.loader import BatchPart, FromDisk, Item, item_generators, read_batch
    from samfeat.teacher_cache.store import open_stores

    chosen = config("losses.wsc=0", "losses.edge=0.5", "losses.detection_form=paper")
    items = [Item(0, "real", 0), Item(0, "synthetic", 1)]
    raw = read_batch(FromDisk(open_stores(cache)), items, chosen.data, item_generators(0, 0, BatchPart(0, 2, 2)))
    batch = make_batch(raw, chosen.data, torch.Generator().manual_seed(0))
    network = SAMFeatNetwork(chosen.network, generator=torch.Generator().manual_seed(0))
    terms = losses(network(batch.images), batch, chosen.losses, sampling=chosen.network.sampling)
    assert list(terms) == ["detection", "descriptor", "relation", "edge"]
    expected = sum(terms.values()) - 0.5 * terms["edge"]
    torch.testing.assert_close(total(terms, chosen.losses), expected)
