"""Stage one when things go wrong. However it ends, the same command leads to the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from killable import Killable
from killable_programs import build_store
from PIL import Image
from toys import LABELS, ToySource, ToyTeacher, tree_bytes

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.verify import Problem, verify

TESTS = Path(__file__).parent
ITEMS = 40
KILLS = 20


def start(path: Path, pause: float = 0.0, **options: int) -> Killable:
    return Killable(partial(build_store, path=path, items=ITEMS, pause=pause, **options))


def said(process: Killable, word: str) -> bool:
    """Wait until a process says a word; False where it ends without."""
    return any(word in text for text in iter(process.read, None))


def build(path: Path, **options):
    settings = {"labels": LABELS, "shard_images": 4, "workers": Workers(threads=2)} | options
    return build_cache(path, ToySource(ITEMS), ToyTeacher(), **settings)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "a.zarr"
    build(path)
    return tree_bytes(path)


def restore(path: Path, whole: dict[str, bytes]) -> None:
    """Write the files of a store."""
    for name, content in whole.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def nothing_half_written_counts(path: Path, whole: dict[str, bytes]) -> int:
    """Every image of a shard that is done is that of the undisturbed run; returns the number of such shards."""
    cache = TeacherCache.open(path)
    missing = set(cache.missing())
    for found in verify(cache):
        assert not (isinstance(found, Problem) and found.image >= 0), found
    for shard in set(range(cache.spec.shards)) - missing:
        for name in ("image", "embedding", "groups", "edges", "keypoints"):
            files = [key for key in whole if key.startswith(f"{name}/c/{shard}/")]
            assert files
            assert all((path / key).read_bytes() == whole[key] for key in files)
    return cache.spec.shards - len(missing)


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, undisturbed, kills):
    moments, path, deaths = random.Random(1), tmp_path / "a.zarr", 0
    for _ in range(kills):
        process = start(path, pause=0.02)
        assert said(process, "started")
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
        nothing_half_written_counts(path, undisturbed)
    assert deaths >= kills / 2
    build(path)
    assert tree_bytes(path) == undisturbed


@pytest.mark.parametrize(("most", "least"), [(1, 1), pytest.param(KILLS, 3, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments(tmp_path, undisturbed, most, least):
    moments, path, kills = random.Random(2), tmp_path / "a.zarr", 0
    process = start(path, pause=0.1, workers=2)
    assert said(process, "started")
    while process.running and kills < most:
        time.sleep(moments.uniform(0.05, 0.3))
        family = psutil.Process(process.pid).children(recursive=True) if process.running else []
        workers = [child for child in family if "spawn_main" in " ".join(_command(child))]
        if workers:
            moments.choice(workers).kill()
            kills += 1
    assert process.wait() == 0
    assert kills >= least
    assert tree_bytes(path) == undisturbed


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_interrupted(tmp_path, undisturbed):
    path = tmp_path / "a.zarr"
    for _ in range(3):
        process = start(path, pause=0.1)
        assert said(process, "started")
        time.sleep(0.1)
        process.kill(signal.SIGINT)
        assert process.wait(60) not in (0, -signal.SIGKILL)
        assert not (tmp_path / "a.zarr.locks").exists()
        nothing_half_written_counts(path, undisturbed)
    build(path)
    assert tree_bytes(path) == undisturbed


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="makes a small file system of its own, which needs unshare and user namespaces",
)
@pytest.mark.parametrize(
    "size", [pytest.param("100k", marks=pytest.mark.slow), "300k", pytest.param("600k", marks=pytest.mark.slow)]
)
def test_a_full_disk(tmp_path, undisturbed, size):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size={size} none {disk} && "$@"; code=$?; rm -rf {disk}/a.zarr.locks; '
        f"cp -r {disk} {kept}; exit $code"
    )
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, str(TESTS / "build_toy_store.py")]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [*command, str(disk / "a.zarr"), f"items={ITEMS}"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode != 0
    assert "No space left" in done.stderr
    if (kept / "a.zarr").exists():
        nothing_half_written_counts(kept / "a.zarr", undisturbed)
    build(kept / "a.zarr")
    assert tree_bytes(kept / "a.zarr") == undisturbed


def test_moved_and_continued(tmp_path, undisturbed):
    process = start(tmp_path / "a.zarr", pause=0.1)
    assert said(process, "started")
    time.sleep(0.3)
    process.kill()
    process.wait()
    moved = tmp_path / "other" / "b.zarr"
    moved.parent.mkdir()
    shutil.move(tmp_path / "a.zarr", moved)
    build(moved)
    assert tree_bytes(moved) == undisturbed


def test_two_runs_of_one_store(tmp_path, undisturbed):
    process = start(tmp_path / "a.zarr", pause=0.1)
    assert said(process, "started")
    with pytest.raises(ValueError, match=f"is being written by process {process.pid} on "):
        build(tmp_path / "a.zarr")
    assert process.wait() == 0
    assert tree_bytes(tmp_path / "a.zarr") == undisturbed


def test_parts_by_independent_processes(tmp_path, undisturbed):
    processes = [start(tmp_path / "a.zarr", part=k, parts=3) for k in range(3)]
    for process in processes:
        assert process.wait() == 0
    assert tree_bytes(tmp_path / "a.zarr") == undisturbed


@pytest.mark.parametrize("name", ["image", "embedding", "groups", "edges", "masks", "keypoints", "name", "pair_points"])
def test_a_flipped_bit_is_found_and_repaired(tmp_path, undisturbed, name, caplog):
    path = tmp_path / "a.zarr"
    restore(path, undisturbed)
    file = max(
        (path / name).rglob("c/3/*" if name not in ("name",) else "c/*"), key=lambda f: f.is_file() and f.stat().st_size
    )
    if file.is_dir():
        file = next(f for f in sorted(file.rglob("*")) if f.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    assert any(isinstance(found, Problem) for found in verify(TeacherCache.open(path)))
    caplog.set_level("INFO", "samfeat")
    summary = build(path, repair=True)
    assert 0 < summary.written <= 8
    assert "made again" in caplog.text
    assert tree_bytes(path) == undisturbed


def test_a_photo_that_turns_unreadable_is_listed_and_later_tried_again(tmp_path, undisturbed):
    class Sick(ToySource):
        def item(self, k):
            if k == 7:
                raise OSError(5, "Input/output error", "photo7.jpg")
            return super().item(k)

    summary = build_cache(
        tmp_path / "a.zarr", Sick(ITEMS), ToyTeacher(), labels=LABELS, shard_images=4, workers=Workers(threads=2)
    )
    assert [name for name, _ in summary.failures] == ["unreadable#7.0", "unreadable#7.1"]
    assert "Input/output error" in summary.failures[0][1]
    summary = build(tmp_path / "a.zarr")
    assert (summary.written, summary.failures) == (4, [])
    assert tree_bytes(tmp_path / "a.zarr") == undisturbed
    with pytest.raises(OSError, match="Input/output error"):
        build_cache(tmp_path / "b.zarr", Sick(ITEMS), ToyTeacher(), labels=LABELS, shard_images=4, strict=True)


def test_a_bomb_and_a_giant_among_good_photographs(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(photos / f"{k}.jpg")
    Image.new("1", (20_000, 20_000)).save(photos / "giant.png")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 2_000_000, 2_000_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (photos / "bomb.png").write_bytes(bomb)
    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    source = open_source(photos, crop_size=64)
    before = psutil.Process().memory_info().rss
    summary = build_cache(
        tmp_path / "a.zarr", source, ToyTeacher(), labels=LABELS, shard_images=4, workers=Workers(threads=1)
    )
    assert psutil.Process().memory_info().rss - before < 200e6
    assert sorted(reason.split(" is ")[0].rpartition("/")[2] for _, reason in summary.failures) == [
        "bomb.png",
        "cut.jpg",
        "giant.png",
    ]
    assert len(TeacherCache.open(tmp_path / "a.zarr")) == 7
