"""The notebook runs from top to bottom, at small sizes, and its 3-D points lie where Middlebury measured them."""

import runpy
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from samfeat import SAMFeat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "two-photographs-to-a-model.py"
SIZES, SMALL = "STEPS, CROP_SIZE = 20, 256", "STEPS, CROP_SIZE = 2, 96"


def test_the_notebook_runs(tmp_path, monkeypatch):
    source = NOTEBOOK.read_text()
    assert SIZES in source
    monkeypatch.chdir(tmp_path)
    Path("notebook.py").write_text(source.replace(SIZES, SMALL))
    mpl.use("agg")
    found = runpy.run_path("notebook.py")
    assert len(found["model"]) > 1000
    assert np.median(found["errors"]) < 0.01  # of the depth
    assert found["angle"] < 0.1  # degrees: the cameras are parallel
    shipped, tuned = (student.network.state_dict() for student in (SAMFeat.from_pretrained(), found["tuned"]))
    assert any(not torch.equal(shipped[name], values) for name, values in tuned.items())
    assert len(found["tuned_matches"]["matches"]) > 1000
