"""The page of the benchmarks: the latest figure of every bar beside the run before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import figures
import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_hits_and_misses_are_shown_beside_the_run_before(tmp_path):
    for value in (2.5, 3.5):
        figures.record({"relation loss, fp32": value, "guidance, bf16": 10 * value}, beside=tmp_path / "relation.md")
    other = json.loads((tmp_path / "figures.jsonl").read_text().splitlines()[0])
    other |= {"processor": "another", "figures": {"cluster": 99.0}}
    lines = (tmp_path / "figures.jsonl").read_text()
    (tmp_path / "figures.jsonl").write_text(json.dumps(other) + "\n" + lines)
    (tmp_path / "relation.md").write_text("| loss | ms |\n|---|---|\n| <one> pass | 3 |\n")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "write_page.py", "--folder", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:7]] for cells in _rows(tmp_path / "report.md")}
    assert rows["relation loss, fp32"] == ["3.5 x", "at least 3 x", "hit", "2.5 x", "+40 %"]
    assert rows["guidance, bf16"] == ["35 %", "at most 12 %", "miss", "25 %", "+40 %"]
    assert rows["cluster"][0] == "not measured"
    page = (tmp_path / "report.html").read_text()
    assert "<td>one" not in page
    assert "Figures over the runs" in page
    assert page.count('class="best">hit') == 1


def test_a_figure_without_a_bar_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no bar is called speed"):
        figures.record({"speed": 1.0}, beside=tmp_path / "a.md")


def _rows(path: Path) -> list[list[str]]:
    return [line.split("|") for line in path.read_text().splitlines() if line.count("|") > 6]
