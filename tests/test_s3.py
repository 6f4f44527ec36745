"""Stage one and two from and into an object store: a real S3 server on this machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from PIL import Image
from toys import LABELS, ToySource, ToyTeacher, toy_store, tree_bytes
from upath import UPath

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.sources import open_source
from samfeat.teacher_cache.store import TeacherCache, open_stores
from samfeat.teacher_cache.store.lock import lock_store
from samfeat.teacher_cache.store.verify import Problem, verify

moto = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "toy",
        "AWS_SECRET_ACCESS_KEY": "toy",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("photos-and-targets")
        yield "s3://photos-and-targets"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL with its content."""
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    prefix = url.removeprefix("s3://").rstrip("/") + "/"
    return {name.removeprefix(prefix): system.cat_file(name) for name in system.find(prefix)}


def test_a_store_in_a_bucket_has_the_bytes_of_a_local_one(bucket, tmp_path):
    local = toy_store(tmp_path / "a.zarr", 6)
    url = f"{bucket}/cache/a.zarr"
    settings = {"labels": LABELS, "shard_images": 4, "workers": Workers(threads=2)}
    assert build_cache(url, ToySource(6), ToyTeacher(), **settings).written == 12
    there, here = objects(url), tree_bytes(tmp_path / "a.zarr")
    for files in (there, here):  # a bucket checks its own content
        files.pop("zarr.json")
    assert there == {name: content for name, content in here.items() if not name.startswith("done/sha256/")}
    assert objects(f"{bucket}/cache/a.zarr.locks") == {}
    assert build_cache(url, ToySource(6), ToyTeacher(), **settings).written == 0
    with pytest.raises(ValueError, match="begun with other settings"):
        build_cache(url, ToySource(6), ToyTeacher(2.0), **settings)

    (remote,) = open_stores(f"{bucket}/cache")
    assert not any(isinstance(found, Problem) for found in verify(remote))
    for mine, theirs in zip(remote[3], local[3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert {**remote.stored_bytes(), "done": 0} == {**local.stored_bytes(), "done": 0}
    with pytest.raises(FileNotFoundError, match="no such"):
        open_stores(f"{bucket}/nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        TeacherCache.create(url, remote.spec, remote.provenance)


def test_photographs_in_a_bucket(bucket, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(5):
        pixels = np.kron(rng.integers(0, 255, (12, 14, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        (tmp_path / "in" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / str(k % 2) / f"{k}.png")
    fsspec.filesystem("s3").put(str(tmp_path / "in"), f"{bucket}/in", recursive=True)
    here, there = open_source(tmp_path / "in", crop_size=64), open_source(f"{bucket}/in", crop_size=64)
    assert here.provenance() == there.provenance()
    for k in range(5):
        np.testing.assert_array_equal(here.item(k).images[0], there.item(k).images[0])


def test_a_bucket_can_be_locked(bucket):
    store = UPath(f"{bucket}/locked.zarr")
    with lock_store(store), pytest.raises(ValueError, match=f"process {os.getpid()} on "), lock_store(store):
        pytest.fail("both hold the store")
    assert objects(f"{bucket}/locked.zarr.locks") == {}


@pytest.mark.slow
def test_workers_that_die_while_they_write_to_a_bucket(bucket, tmp_path):
    toy_store(tmp_path / "a.zarr", 10)
    url = f"{bucket}/killed/a.zarr"
    command = [sys.executable, str(TESTS / "build_toy_store.py"), url, "items=10", "pause=0.1", "workers=2"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("started" in line for line in process.stdout)
    time.sleep(0.3)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
    random.Random(0).choice(workers).send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    there, here = objects(url), tree_bytes(tmp_path / "a.zarr")
    for files in (there, here):  # a bucket checks its own content
        files.pop("zarr.json")
    assert there == {name: content for name, content in here.items() if not name.startswith("done/sha256/")}
