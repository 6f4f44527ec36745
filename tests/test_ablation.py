"""Ablations on a toy store: every configuration once, whatever stops it, and figures that are those of the run."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
from killable import Killable
from killable_programs import study_on
from toy_runs import EXTRACTION, TABLES, leave_out_charts, metrics, run_study
from toys import toy_store

import samfeat.pipelines.ablation as ablation
from samfeat.pipelines.ablation import VALIDATION
from samfeat.pipelines.evaluate import evaluate
from samfeat.pipelines.evaluation.hpatches import HPatches
from samfeat.pipelines.features.methods import load_method
from samfeat.pipelines.training.ablation_tables import AblationTable, Row

pytestmark = pytest.mark.usefixtures("without_charts")
KILLS = int(os.environ.get("SAMFEAT_KILLS", 4))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    toy_store(folder / "a.zarr", 8, paired=False)
    return folder


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """One sequence: a texture, and the same one moved by (4, 3) pixels."""
    folder = tmp_path_factory.mktemp("data") / "moved"
    (folder / "v_one").mkdir(parents=True)
    large = np.kron(np.random.default_rng(0).integers(0, 255, (12, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    cv2.imwrite(str(folder / "v_one" / "1.png"), large[:64, :64])
    cv2.imwrite(str(folder / "v_one" / "2.png"), large[3:67, 4:68])
    np.savetxt(folder / "v_one" / "H_1_2", [[1, 0, -4], [0, 1, -3], [0, 0, 1]])
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The folders that training was asked for."""
    asked = []
    original = ablation.train

    def train(cache, folder, config, **options):
        asked.append(str(folder.relative_to(folder.parents[2])))
        return original(cache, folder, config, **options)

    monkeypatch.setattr(ablation, "train", train)
    return asked


@pytest.fixture(scope="module")
def study(cache, sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    seen: list[tuple[float, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        leave_out_charts(patch)
        summary = run_study(cache, folder, data=sequences, progress=lambda done, total: seen.append((done, total)))
    return folder, summary, seen


def table(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_every_configuration_is_trained_once_a_seed(study):
    folder, summary, seen = study
    assert (summary.runs, summary.failures) == (6, {})
    a, b = table(folder, "A")["rows"], table(folder, "B")["rows"]
    assert a["no wsc"]["key"] == b["same"]["key"]
    assert a["whole"]["key"] == a["gain"]["key"] != a["no wsc"]["key"] != b["other"]["key"]
    assert len(list(folder.glob("runs/*/seed?"))) == 6
    done = [part for part, _ in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 6)
    assert {total for _, total in seen} == {6}
    assert any(part % 1 for part in done)


def test_figures_are_those_of_the_last_step_of_the_run(study):
    folder, _, _ = study
    for row in table(folder, "A")["rows"].values():
        if row["extraction"]:
            continue
        for seed, figures in row["figures"][VALIDATION].items():
            last = metrics(folder / "runs" / row["key"] / f"seed{seed}")[-1]
            assert {f"validation/{name}": value for name, value in figures.items()} | {"step": 3} == last
            assert last["step"] == 3
            first = metrics(folder / "runs" / row["key"] / f"seed{seed}")[0]
            assert {f"validation/{name}": v for name, v in row["untrained"][seed].items()} | {"step": 0} == first


def test_options_at_test_time_are_measured_on_the_same_views(study, cache, tmp_path, trained):
    folder, _, _ = study
    rows = table(folder, "A")["rows"]
    assert rows["gain"]["figures"][VALIDATION] != rows["whole"]["figures"][VALIDATION]
    as_trained = {
        "A": AblationTable("a", rows={"x": Row(), "y": Row(extraction={"edge_gain": 0.0, "max_keypoints": 40})})
    }
    again = shutil.copytree(folder, tmp_path / "out")  # the student of these rows is trained already
    run_study(cache, again, tables=as_trained, seeds=1)
    assert trained == []
    x, y = (row["figures"][VALIDATION]["0"] for row in table(again, "A")["rows"].values())
    assert x == pytest.approx(y)


def test_sequences_are_measured_as_by_evaluate(study, sequences, tmp_path):
    folder, _, _ = study
    row = table(folder, "A")["rows"]["gain"]
    weights = folder / "runs" / row["key"] / "seed1" / "weights.safetensors"
    method = load_method("samfeat", weights=weights, device="cpu", **EXTRACTION, edge_gain=5.0)
    results = evaluate(HPatches(), sequences, tmp_path, method=method)
    figures = row["figures"]["moved sequences"]["1"]
    assert [figures[f"mma@{t}"] for t in (1, 3, 5)] == [results.mma["all"][t - 1] for t in (1, 3, 5)]
    assert figures["matches"] == results.matches["all"] > 0
    assert figures["keypoints"] == results.features.mean <= 30


def test_what_is_finished_is_not_repeated(study, cache, sequences, tmp_path, trained, caplog):
    first, summary, _ = study
    folder = shutil.copytree(first, tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    caplog.set_level("INFO", "samfeat")
    again = run_study(cache, folder, data=sequences)
    assert trained == []
    assert again == dataclasses.replace(summary, report=folder / "ablations.md")
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before
    assert "6 training runs, 6 of them finished" in caplog.messages[0]
    run_study(cache, folder, data=sequences, tables={"A": TABLES["A"]}, seeds=3)
    assert sorted(place.rpartition("/")[2] for place in trained) == ["seed2", "seed2"]


def test_the_page_shows_every_table_of_the_folder(study):
    folder, summary, _ = study
    text = summary.report.read_text()
    assert text.index("## First") < text.index("## Second")
    for name in ("A", "B"):
        assert f"![{name}]({name}.png)" in text
        assert cv2.imread(str(folder / f"{name}.png")).std() > 0
    assert "preset `sample`" in text
    assert "a.zarr (8 images, toy teacher)" in text


def test_seeds_come_one_after_the_other_so_that_tables_are_whole_early(study):
    written = sorted((path.stat().st_mtime_ns, path.parent.name) for path in study[0].glob("runs/*/*/figures.json"))
    assert [seed for _, seed in written[:6]] == ["seed0"] * 3 + ["seed1"] * 3


def test_an_interrupted_study_goes_on_where_it_stopped(study, cache, tmp_path, trained):
    folder, _, _ = study

    def cut(done, total):
        if done > 1.3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_study(cache, tmp_path, tables={"A": TABLES["A"]}, progress=cut)
    (half,) = [path.parent for path in tmp_path.glob("runs/*/*/last.ckpt")]
    assert (tmp_path / "ablations.md").exists()
    trained.clear()
    run_study(cache, tmp_path, tables={"A": TABLES["A"]})
    assert len(trained) == 3
    assert trained[0] == str(half.relative_to(tmp_path))
    for label, row in table(tmp_path, "A")["rows"].items():
        assert row["figures"][VALIDATION] == table(folder, "A")["rows"][label]["figures"][VALIDATION], label


@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_moments(cache, study, tmp_path, kills):
    moments, deaths = random.Random(0), 0
    for _ in range(kills):
        process = Killable(study_on, cache, tmp_path)
        for _ in range(moments.randint(1, 8)):  # of the 17 messages of a whole study
            process.read()
        time.sleep(moments.uniform(0, 0.2))  # into whatever follows the message
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
    assert deaths
    run_study(cache, tmp_path, tables={"A": TABLES["A"]})
    rows, expected = (table(folder, "A")["rows"] for folder in (tmp_path, study[0]))
    for label in rows:
        for seed, figures in rows[label]["figures"][VALIDATION].items():
            assert figures == pytest.approx(expected[label]["figures"][VALIDATION][seed])


def test_a_row_that_fails_is_named_and_the_others_go_on(cache, tmp_path, caplog):
    features = {"losses.relation_form": "features"}  # of 256 channels; the toy teacher has 8
    tables = {"V": AblationTable("Five", rows={"DSFD": Row(None, features), "ASRD": Row()})}
    caplog.set_level("INFO", "samfeat")
    summary = run_study(cache, tmp_path, tables=tables, seeds=1)
    (reason,) = summary.failures.values()
    assert "256 channels" in reason
    assert "the others continue" in caplog.text
    assert table(tmp_path, "V")["rows"]["ASRD"]["figures"][VALIDATION].keys() == {"0"}
    assert "| DSFD (failed) |" in summary.report.read_text()


def test_step_times_are_taken_in_turns(cache, tmp_path, trained, monkeypatch):
    for name, value in {"ROUNDS": 2, "WARM_STEPS": 1, "TIMED_STEPS": 2}.items():
        monkeypatch.setattr(ablation, name, value)
    tables = {
        "T": AblationTable("Time", "step_time", "hours", rows={"all": Row(6.0), "less": Row(3.0, {"losses.wsc": 0})})
    }
    summary = run_study(cache, tmp_path, tables=tables)
    assert summary.runs == 0
    assert trained[:2] == trained[2:]
    assert len(set(trained)) == 2
    rows = table(tmp_path, "T")["rows"]
    for row in rows.values():
        assert [len(steps) for steps in row["seconds"]] == [2, 2]
        assert min(min(steps) for steps in row["seconds"]) > 0
    assert sorted(path.name for path in (tmp_path / "times").glob("*/*")) == ["round0.json"] * 2 + ["round1.json"] * 2
    trained.clear()
    run_study(cache, tmp_path, tables=tables)
    assert trained == []


def test_what_cannot_be_done_is_refused_before_anything_is_trained(cache, tmp_path, trained):
    with pytest.raises(ValueError, match="unknown table 'C': there are A, B"):
        run_study(cache, tmp_path, names=["C"])
    with pytest.raises(ValueError, match=r"did you mean 'optimiser\.steps'"):
        run_study(cache, tmp_path, overrides=["optimiser.step=1"])
    with pytest.raises(ValueError, match=r"run\.seed cannot be changed here"):
        run_study(cache, tmp_path, overrides=["run.seed=3"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run_study(cache, tmp_path, seeds=0)
    with pytest.raises(ValueError, match="holds no sequence"):
        run_study(cache, tmp_path, data=cache)
    toy_store(tmp_path / "few" / "a.zarr", 2, paired=False)
    with pytest.raises(ValueError, match="too few images"):
        run_study(tmp_path / "few", tmp_path)
    assert trained == []
