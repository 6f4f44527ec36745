import errno
from collections import namedtuple

import pycolmap
import pytest

from samfeat.pipelines.colmap_database import database_errors


def open_it(path):
    with database_errors(path), pycolmap.Database.open(path) as database:
        return database.num_images()


def test_a_good_database_opens(tmp_path):
    assert open_it(tmp_path / "new.db") == 0


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "a.db").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"a\.db cannot be used as a COLMAP database .* remove it") as error:
        open_it(tmp_path / "a.db")
    assert "\n" not in str(error.value)


def test_a_place_that_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "absent" / "a.db"):
        with pytest.raises(ValueError, match="give a file in a folder that exists"):
            open_it(path)


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 30, 1 << 30, 0))
    (tmp_path / "a.db").write_bytes(b"cut")
    with pytest.raises(OSError, match="No space left") as error:
        open_it(tmp_path / "a.db")
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "a.db")
