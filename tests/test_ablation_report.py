"""Tables and plots of ablations: the statistics are those of the standard library."""

from __future__ import annotations

import io
import json
import statistics

import numpy as np
import pytest
from PIL import Image

from samfeat.pipelines.training.ablation_report import paired, spread, write_report

BASE, BETTER = (0.50, 0.40, 0.60), (0.55, 0.43, 0.66)


def figures(*values):
    return {str(seed): {"mma@1": v / 2, "mma@3": v, "mma@5": min(1, v * 1.5)} for seed, v in enumerate(values)}


def accuracy(**changes):
    return {
        "title": "Table V",
        "measure": "accuracy",
        "paper": "MMA@3 on HPatches [%]",
        "reference": "DSFD",
        "protocol": {
            "preset": "sample",
            "overrides": ["optimiser.steps=5"],
            "seeds": 3,
            "steps": 5,
            "epochs": 30,
            "batch_size": 4,
            "data": None,
            "stores": [{"name": "a.zarr", "images": 8, "teacher": "classical"}],
        },
        "rows": {
            "DSFD": {"paper": 76.9, "failed": [], "untrained": {}, "figures": {"held-out views": figures(*BASE)}},
            "ASRD": {"paper": 78.6, "failed": [], "untrained": {}, "figures": {"held-out views": figures(*BETTER)}},
            **changes,
        },
    }


def cells(page, row):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {row}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_spread_is_the_sample_deviation():
    values = [3.0, 4.5, 9.0]
    mean, deviation, number = spread(values)
    assert (mean, number) == (statistics.mean(values), 3)
    assert deviation == pytest.approx(statistics.stdev(values))
    assert spread([2.0]) == (2.0, None, 1)
    assert spread([]) is None


def test_differences_are_taken_seed_by_seed():
    assert paired({"0": 5.0, "2": 7.0}, {"0": 4.0, "1": 1.0, "2": 6.5}) == [1.0, 0.5]


def test_a_table_of_accuracies(tmp_path):
    page = write_report(tmp_path, {"V": accuracy()}).read_text()
    assert "Before training" not in page
    differences = [100 * (b - a) for a, b in zip(BASE, BETTER)]
    expected = [
        "ASRD",
        f"{statistics.mean(BETTER) * 50:.1f} ± {statistics.stdev(BETTER) * 50:.1f}",
        f"{statistics.mean(BETTER) * 100:.1f} ± {statistics.stdev(BETTER) * 100:.1f}",
        f"{statistics.mean(BETTER) * 150:.1f} ± {statistics.stdev(BETTER) * 150:.1f}",
        f"{statistics.mean(differences):.1f} ± {statistics.stdev(differences):.1f}",
        "78.6",
        "+1.7",
    ]
    assert cells(page, "ASRD") == expected
    assert cells(page, "DSFD")[4] == "0.0 ± 0.0"
    assert "5 steps of 4 pairs, 3 of 3 seeds; preset `sample` `optimiser.steps=5`" in page
    summary = json.loads((tmp_path / "V.json").read_text())["summary"]
    assert summary["ASRD"]["held-out views: MMA@3"]["deviation"] == pytest.approx(statistics.stdev(BETTER) * 100)


def test_untrained_students_are_told(tmp_path):
    row = {"paper": 78.6, "failed": [], "untrained": figures(0.1, 0.2), "figures": {"held-out views": figures(*BASE)}}
    page = write_report(tmp_path, {"V": accuracy(ASRD=row)}).read_text()
    assert f"Before training: 15.0 ± {statistics.stdev([10, 20]):.1f} at 3 pixels" in page


def test_what_is_not_there_yet_is_a_dash(tmp_path):
    own = {"paper": None, "failed": ["diverged"], "untrained": {}, "figures": {}}
    part = {
        "paper": None,
        "failed": [],
        "untrained": {},
        "figures": {"held-out views": figures(0.4), "real": figures(0.3)},
    }
    page = write_report(tmp_path, {"V": accuracy(own=own, part=part)}).read_text()
    assert cells(page, "own") == ["own (failed)"] + ["–"] * 10
    assert "Failed: own: diverged" in page
    assert cells(page, "part")[2] == "40.0"
    assert cells(page, "part")[6] == "30.0"
    assert cells(page, "part")[8:] == ["–"] * 3
    assert cells(page, "ASRD")[5:8] == ["–"] * 3


def test_a_table_of_step_times(tmp_path):
    table = accuracy() | {
        "measure": "step_time",
        "rows": {
            "DSFD": {"paper": 2.0, "failed": [], "seconds": [[0.1, 0.2, 0.3], [0.4, 0.4, 0.4]]},
            "ASRD": {"paper": 3.0, "failed": [], "seconds": [[0.3, 0.3, 0.9], [0.8, 0.7, 0.8]]},
        },
    }
    page = write_report(tmp_path, {"VIII": table}).read_text()
    ratios = 0.3 / 0.2, 0.8 / 0.4
    spread_of_ratios = f"{statistics.mean(ratios):.2f} ± {statistics.stdev(ratios):.2f}"
    assert cells(page, "ASRD") == ["ASRD", "750.0", "300.0", spread_of_ratios, "3.0", "1.50"]
    assert "12 steps timed in turns" in page


def test_earlier_tables_stay_on_the_page(tmp_path):
    write_report(tmp_path, {"V": accuracy() | {"title": "An old one"}})
    page = write_report(tmp_path, {"relation": accuracy(), "IV": accuracy() | {"title": "The first"}}).read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## The first",
        "## An old one",
        "## Table V",
    ]


def test_plots_show_what_changes(tmp_path):
    def picture(**changes):
        write_report(tmp_path, {"V": accuracy(**changes)})
        return np.asarray(Image.open(io.BytesIO((tmp_path / "V.png").read_bytes())).convert("RGB")).astype(int)

    whole = picture()
    assert min(whole.shape[:2]) > 200
    row = {"paper": 78.6, "failed": [], "untrained": {}, "figures": {"held-out views": figures(0.7, 0.7, 0.7)}}
    assert (picture(ASRD=row) != whole).any()
    assert picture(third={"paper": None, "failed": [], "untrained": {}, "figures": {}}).shape[0] > whole.shape[0]
