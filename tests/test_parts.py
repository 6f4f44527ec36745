import h5py
import numpy as np
import pytest

from samfeat.pipelines.features.parts import Parts, open_hdf5


def test_parts_last_until_they_are_packed(tmp_path):
    output = tmp_path / "out.h5"
    parts = Parts(output, {"a": 1})
    parts.add("x/y", {"values": np.arange(3)})
    again = Parts(output, {"a": 1})
    assert "x/y" in again
    assert "x" not in again
    with again.packed() as file:
        file["values"] = again["x/y"]["values"]
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]
    with Parts(output, {"a": 2}).packed() as file:
        file["more"] = 1
    with h5py.File(output) as file:
        assert sorted(file) == ["more", "values"]


def test_parts_of_another_configuration_are_refused_until_discarded(tmp_path):
    output = tmp_path / "out.h5"
    Parts(output, {"a": 1}).add("x", {})
    with pytest.raises(ValueError, match="a 1 there, 2 here"):
        Parts(output, {"a": 2})
    Parts.discard(output)
    assert "x" not in Parts(output, {"a": 2})


def test_an_unfinished_removal_leaves_nothing_that_another_configuration_would_take(tmp_path):
    parts = Parts(tmp_path / "out.h5", {"a": 1})
    parts.add("x", {})
    (parts.folder / "config.json").unlink()
    assert "x" not in Parts(tmp_path / "out.h5", {"a": 2})


def test_what_is_no_hdf5_is_one_line(tmp_path):
    (tmp_path / "text.h5").write_text("text")
    for name, error in (("text.h5", OSError), ("absent.h5", FileNotFoundError)):
        with pytest.raises(error, match=name) as caught, open_hdf5(tmp_path / name):
            pass
        assert "\n" not in str(caught.value)
