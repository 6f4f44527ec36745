"""Any file of a store may be damaged in any way: --verify names it, and --repair brings the same bytes back."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr
from toys import LABELS, ToySource, ToyTeacher, toy_store, tree_bytes

from samfeat.pipelines.build_cache import build_cache
from samfeat.pipelines.workers import Workers
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.store.verify import Problem, verify_path

ITEMS = 3  # shards of two pairs and of one
DAMAGE = ("truncated", "deleted", "zeros", "flipped")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return tree_bytes(toy_store(tmp_path_factory.mktemp("whole") / "a.zarr", ITEMS).path)


def lay_out(store: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(store, ignore_errors=True)
    for name, content in files.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)


def damage(file: Path, how: str, rng: np.random.Generator) -> None:
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: int(rng.integers(len(data)))])
    elif how == "zeros":
        file.write_bytes(bytes(len(data)))
    else:
        bit = int(rng.integers(8 * len(data)))
        file.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])


def texts(store: Path) -> list[str]:
    return [found.text for found in verify_path(store) if isinstance(found, Problem)]


def repair(store: Path) -> None:
    settings = {"labels": LABELS, "shard_images": 4, "workers": Workers(threads=1)}
    build_cache(store, ToySource(ITEMS), ToyTeacher(), **settings, repair=True)


def check(store: Path, whole: dict[str, bytes], name: str, how: str, rng: np.random.Generator) -> None:
    damage(store / name, how, rng)
    assert any(text.startswith(f"{name} is ") for text in texts(store)), (name, how, texts(store))
    repair(store)
    assert tree_bytes(store) == whole, (name, how)
    assert texts(store) == []


@pytest.mark.parametrize("how", DAMAGE)
def test_any_damaged_file_is_named_and_mended(tmp_path, whole, how):
    """A few files; the slow test below takes them all."""
    rng = np.random.default_rng(DAMAGE.index(how))
    names = [name for name in sorted(whole) if not name.endswith("/zarr.json")]
    chosen = ["zarr.json", "edges/zarr.json", *rng.choice(names, 3, replace=False)]
    store = tmp_path / "a.zarr"
    lay_out(store, whole)
    for name in chosen:
        check(store, whole, name, how, rng)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_every_damaged_file_is_named_and_mended(tmp_path, whole, how):
    rng, store = np.random.default_rng(10 + DAMAGE.index(how)), tmp_path / "a.zarr"
    lay_out(store, whole)
    for name in sorted(whole):
        check(store, whole, name, how, rng)


def test_every_bit_of_the_marks_and_the_attributes_counts(tmp_path, whole):
    store = tmp_path / "a.zarr"
    lay_out(store, whole)
    rng = np.random.default_rng(5)
    bits = [("done/c/0", bit) for bit in range(8)]
    bits += [("zarr.json", int(bit)) for bit in rng.integers(8 * len(whole["zarr.json"]), size=20)]
    for name, bit in bits:
        data = whole[name]
        (store / name).write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert any(text.startswith(f"{name} is ") for text in texts(store)), (name, bit)
        (store / name).write_bytes(data)
    assert texts(store) == []


def test_everything_that_is_wrong_is_listed_in_one_pass(tmp_path, whole):
    store = tmp_path / "a.zarr"
    lay_out(store, whole)
    damaged = ["zarr.json", "groups/zarr.json", "done/c/1", "image/c/0/0/0/0", "mask_count/c/0", "keypoints/c/1/0/0"]
    for name in damaged[1:]:
        damage(store / name, "truncated", np.random.default_rng(0))
    found = " / ".join(texts(store))
    assert all(f"{name} is " in found for name in ("groups/zarr.json", "image/c/0/0/0/0", "mask_count/c/0"))
    (store / "zarr.json").unlink()
    found = " / ".join(texts(store))
    assert all(f"{name} is " in found for name in ("zarr.json", "image/c/0/0/0/0", "keypoints/c/1/0/0"))
    repair(store)
    assert tree_bytes(store) == whole


def test_the_digests_are_those_of_coreutils_and_of_the_readme(tmp_path, whole):
    store = tmp_path / "a.zarr"
    lay_out(store, whole)
    for shard in (0, 1):
        manifest = store / "done" / "sha256" / str(shard)
        lines = [line for line in manifest.read_text().splitlines() if not line.startswith("#")]
        listed = {line.split("  ")[1] for line in lines}
        there = {name for name in whole if f"/c/{shard}" in name and not name.startswith("done/")}
        assert listed == {name for name in there if name.split("/c/")[1].split("/")[0] == str(shard)}
        done = subprocess.run(["sha256sum", "--check", "--strict", f"done/sha256/{shard}"], cwd=store)
        assert done.returncode == 0
    group = json.loads(whole["zarr.json"])
    digests = group["attributes"]["checksums"]
    assert digests["edges/zarr.json"] == hashlib.sha256(whole["edges/zarr.json"]).hexdigest()
    own = digests.pop("zarr.json")
    assert own == hashlib.sha256(json.dumps(group, sort_keys=True).encode()).hexdigest()


def test_a_store_without_digests_is_still_checked_and_mended(tmp_path, whole):
    """As stores were written before: no digests of files, and a compressed mark."""
    store = tmp_path / "a.zarr"
    lay_out(store, {name: content for name, content in whole.items() if not name.startswith("done/sha256/")})
    group = json.loads(whole["zarr.json"])
    del group["attributes"]["checksums"], group["attributes"]["shard_checksums"]
    (store / "zarr.json").write_text(json.dumps(group))
    opened = zarr.open_group(store, mode="r+")
    opened.create_array("done", shape=(2,), chunks=(1,), dtype="uint8", overwrite=True)[:] = 1
    assert texts(store) == []
    before = tree_bytes(store)
    for name in ("image/c/1/0/0/0", "done/c/1", "keypoint_count/c/1"):
        (store / name).write_bytes((store / name).read_bytes()[:9])
        assert texts(store) != []
        repair(store)
        assert tree_bytes(store) == before


def test_metadata_that_another_version_of_zarr_wrote_is_mended_too(tmp_path, whole):
    store, group = tmp_path / "a.zarr", json.loads(whole["zarr.json"])
    lay_out(store, whole)
    other = json.dumps(json.loads(whole["edges/zarr.json"])).encode()  # the same in another layout
    assert other != whole["edges/zarr.json"]
    checksums = group["attributes"]["checksums"]
    checksums["edges/zarr.json"] = hashlib.sha256(other).hexdigest()
    del checksums["zarr.json"]
    checksums["zarr.json"] = hashlib.sha256(json.dumps(group, sort_keys=True).encode()).hexdigest()
    (store / "zarr.json").write_text(json.dumps(group))
    (store / "edges" / "zarr.json").write_bytes(b"{")
    assert "edges/zarr.json is damaged" in texts(store)
    repair(store)
    assert texts(store) == []


def test_damaged_attributes_are_not_mended_by_another_command(tmp_path, whole):
    store = tmp_path / "a.zarr"
    lay_out(store, whole)
    (store / "zarr.json").write_bytes(b"")
    before = tree_bytes(store)
    with pytest.raises(ValueError, match="not those of this command: repeat the command that wrote the store"):
        build_cache(store, ToySource(ITEMS + 1), ToyTeacher(), labels=LABELS, shard_images=4, repair=True)
    assert tree_bytes(store) == before


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"images": "6"}},
        {"spec": {"image_size": 64}},
        {"spec": {"image_size": [64, "64"]}},
        {"spec": {"embedding": [8, 8]}},
        {"spec": {"paired": 1}},
        {"spec": {"shard_images": 4.0}},
        {"spec": []},
        {"provenance": {"teacher": "toy"}},
        {"provenance": {"seed": "0"}},
        {"provenance": None},
    ],
)
def test_attributes_of_other_types_are_one_line(tmp_path, whole, change):
    store, group = tmp_path / "a.zarr", json.loads(whole["zarr.json"])
    lay_out(store, whole)
    for key, value in change.items():
        old = group["attributes"][key]
        group["attributes"][key] = old | value if isinstance(value, dict) else value
    (store / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match=r"attributes are damaged .* with --repair") as error:
        TeacherCache.open(store)
    assert "\n" not in str(error.value)
    assert texts(store) == ["zarr.json is damaged"]
    repair(store)
    assert tree_bytes(store) == whole
