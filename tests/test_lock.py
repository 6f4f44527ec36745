"""Locks: real processes, killed ones, owners on other machines, clocks that are wrong."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading

import pytest
from killable import Killable
from killable_programs import hold_store
from upath import UPath

from samfeat.teacher_cache.store import lock as lock_module
from samfeat.teacher_cache.store.lock import lock_store


@pytest.fixture
def store(tmp_path):
    return UPath(tmp_path / "a.zarr")


@pytest.fixture
def holder(store):
    """Another process that holds the whole store."""
    process = Killable(hold_store, store)
    assert process.read() == "held"
    yield process
    process.kill()
    process.wait()


def files(store):
    return list((store.parent / f"{store.name}.locks").glob("*"))


def elsewhere(store, **changes):
    """The lock of an owner on another machine."""
    folder = store.parent / f"{store.name}.locks"
    folder.mkdir(exist_ok=True)
    owner = {"host": "elsewhere", "boot": "1", "pid": 7, "started": "1", "part": [0, 1], "beat": 0.1, "count": 0}
    lock_module._write(folder / "other.json", owner | changes)
    return folder / "other.json"


def test_the_second_is_told_who_the_first_is(store, holder):
    with pytest.raises(ValueError, match=f"process {holder.pid} on {socket.gethostname()}"), lock_store(store):
        pytest.fail("both hold the store")
    assert len(files(store)) == 1


def test_a_killed_owner_is_succeeded_at_once(store, holder, caplog):
    caplog.set_level("INFO", "samfeat")
    holder.kill()
    holder.wait()
    with lock_store(store):
        assert len(files(store)) == 1
    assert f"process {holder.pid}" in caplog.text
    assert not (store.parent / f"{store.name}.locks").exists()


def test_another_process_with_the_number_of_a_dead_one_is_not_it(store):
    here = lock_module._here()
    elsewhere(store, **here | {"started": "another time"})
    with lock_store(store):
        pass
    elsewhere(store, **here)
    with pytest.raises(ValueError, match=f"process {os.getpid()} "), lock_store(store):
        pytest.fail("held by this very process")


@pytest.mark.parametrize("moment", [0, 1, 4_000_000_000])
def test_an_owner_elsewhere_lives_while_its_number_grows_whatever_the_clocks_say(store, moment, caplog):
    caplog.set_level("INFO", "samfeat")
    path, stop = elsewhere(store, beat=0.4), threading.Event()

    def live():
        for count in itertools.count(1):
            if stop.wait(0.02):
                return
            elsewhere(store, beat=0.4, count=count)
            os.utime(path, (moment, moment))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on elsewhere"), lock_store(store):
            pytest.fail("both hold the store")
    finally:
        stop.set()
        thread.join()
    os.utime(path, (moment, moment))
    with lock_store(store):
        assert len(files(store)) == 1
    assert "process 7 on elsewhere" in caplog.text


def test_an_owner_whose_lock_cannot_be_read_for_a_moment_is_not_dead(store, monkeypatch):
    path = elsewhere(store)
    found = lock_module._read(path)
    looks = iter([None, None, found, found | {"count": 1}])
    monkeypatch.setattr(lock_module, "_read", lambda _: next(looks))
    assert lock_module._alive(path, found | {"beat": 0.001})
    looks = iter([None] * 5)
    assert not lock_module._alive(path, found | {"beat": 0.001})


def test_signs_of_life_are_given_and_released(store):
    with lock_store(store, beat=0.01):
        (path,) = files(store)
        seen = set()
        while len(seen) < 3:
            seen.add(json.loads(path.read_text())["count"])
    assert not (store.parent / f"{store.name}.locks").exists()
    with pytest.raises(RuntimeError), lock_store(store):
        raise RuntimeError
    assert not (store.parent / f"{store.name}.locks").exists()


@pytest.mark.parametrize("first", [(k, n) for n in (1, 2, 3, 4, 6) for k in range(n)])
def test_parts_that_share_a_shard_exclude_each_other(store, first):
    for other in [(k, n) for n in (1, 2, 3, 4, 6) for k in range(n)]:
        shared = set(range(first[0], 50, first[1])) & set(range(other[0], 50, other[1]))
        with lock_store(store, part=first):
            if shared:
                with pytest.raises(ValueError, match="is being written"), lock_store(store, part=other):
                    pytest.fail("both hold a shard")
            else:
                with lock_store(store, part=other):
                    assert len(files(store)) == 2


def test_rubbish_in_the_folder_is_ignored(store):
    folder = elsewhere(store).parent
    for name, text in (("a.json", ""), ("b.json", "{}"), ("c.json", "[1]"), ("d.txt", "hello")):
        (folder / name).write_text(text)
    (folder / "other.json").unlink()
    with lock_store(store):
        pass
