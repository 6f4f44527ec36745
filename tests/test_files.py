import os

import pytest

from samfeat.files import write_bytes, write_json


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = write_bytes(tmp_path / "a", b"one")
        (tmp_path / "b").write_bytes(b"one")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == (tmp_path / "b").stat().st_mode & 0o777 == mode


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path):
    path = write_json(tmp_path / "new" / "folder" / "a.json", {"x": [1]})
    assert path.read_text() == '{\n  "x": [\n    1\n  ]\n}\n'
    with path.open("rb") as old:
        write_bytes(path, b"new")
        assert old.read().startswith(b"{")  # who reads the old file goes on reading it
    assert path.read_bytes() == b"new"
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
