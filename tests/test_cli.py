"""The command line as a user meets it: help in no time, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import ast
import errno
import importlib.util
import pickle
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import grimp
import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from toys import toy_store, tree_bytes

import samfeat
from samfeat import cli
from samfeat.student.extractor import SAMFeat
from samfeat.teacher_cache.sources import SOURCES
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers import TEACHERS

VERBS = (
    "sample", "prepare", "teacher-cache", "inspect-cache", "train", "ablate",
    "extract", "match", "match-pairs", "evaluate", "report", "export", "config",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in a folder of its own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samfeat-cli", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.app(prog_name="samfeat-cli")
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def fails(run):
    """Expect exit code 2 and one line; returns that line."""

    def call(*words: object) -> str:
        code, _, err = run(*words)
        assert code == 2, err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    return call


def photo(path, size=(100, 120), seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "RGBA": 4}.get(mode)
    shape = (10, 12) if channels is None else (10, 12, channels)
    coarse = rng.integers(0, 255, shape, dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def cache_of(tmp_path, *extra: object):
    return ("teacher-cache", "--data", tmp_path / "photos", "--cache", tmp_path / "cache", "--crop-size", 64, *extra)


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "Usage: samfeat-cli" in out


def test_help_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['samfeat-cli', '--help']\n"
        "from samfeat import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'zarr', 'cv2', 'dask', 'numpy', 'kornia', 'segment_anything'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_photographs_to_matches(run, tmp_path):
    for k in range(6):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    code, out, err = run(*cache_of(tmp_path, "--shard-images", 4, "--name", "toy"))
    assert (code, "6 of them new" in out) == (0, True), err
    code, out, err = run("inspect-cache", "cache", "--verify", "--recompute", 1, "--html", "gallery.html")
    assert code == 0, err
    assert "verified" in out
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<img") == 6 * 5
    assert "http" not in page  # self-contained
    for option, word in (("--image", "3.png"),):
        code, out, err = run("inspect-cache", "cache", option, word, "--out", "one.png")
        assert (code, Image.open(tmp_path / "one.png").width > 600) == (0, True), err
    settings = ["optimiser.steps=1", "optimiser.batch_size=2", "run.validation_pairs=1", "run.validation_images=1"]
    code, out, err = run("train", "--cache", "cache", "--out", "run", *settings)
    assert code == 0, err
    assert "MMA@3" in out
    assert "run/report.html" in out
    weights = tmp_path / "run" / "weights.safetensors"
    pictures = ("--out", "matches.png", "--maps", "maps.png")
    code, out, err = run("match", "photos/0.png", "photos/1.png", "--weights", weights, *pictures)
    assert (code, Image.open(tmp_path / "matches.png").width >= 200) == (0, True), err
    assert Image.open(tmp_path / "maps.png").width > 4 * 360  # keypoints, heat-map, attention, edges
    code, out, err = run("extract", "photos", "features.h5", "--weights", weights)
    assert (code, (tmp_path / "features.h5").exists()) == (0, True), err
    assert "features of 6 images" in out
    (tmp_path / "photos" / "6.png").write_bytes(b"")
    code, out, err = run("extract", "photos", "features.h5", "--weights", weights)
    assert (code, "6 already existed" in out, "6.png" in err) == (2, True, True), err


def test_parts_estimates_and_repairs(run, fails, tmp_path):
    for k in range(6):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    command = cache_of(tmp_path, "--shard-images", 2, "--name", "toy")
    code, out, err = run(*command, "--dry-run")
    assert (code, "6 images in 3 shards, 3 of them to make" in out) == (0, True), err
    assert not (tmp_path / "cache").exists()
    for wrong in ("0/2", "3/2", "2", "a/b"):
        assert "give K/N" in fails(*command, "--part", wrong)
    assert "give K/N" in fails(*command, "--shard", "0/2")  # its former name
    code, out, err = run(*command, "--part", "2/2")
    assert (code, "2 of them new" in out) == (0, True), err
    assert "2 of 3 shards are missing" in fails("train", "--cache", "cache", "--out", "run")
    code, out, err = run(*command, "--part", "1/2")
    assert (code, "4 of them new" in out) == (0, True), err
    damaged = tmp_path / "cache" / "toy.zarr" / "edges" / "c" / "1" / "0" / "0"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    assert "with --repair" in fails("inspect-cache", "cache", "--verify")
    code, out, err = run(*command, "--repair")
    assert (code, "shard 1 is made again" in out, "2 of them new" in out) == (0, True, True), err
    assert "no GPU '7' here" in fails(*command, "--repair", "--devices", "7")
    assert "choose one of" in fails(*command, "--devices", "7", "--workers", 2)
    (tmp_path / "photos" / "6.png").write_bytes(b"")
    assert "6.png" in fails(*command[:-1], "strict", "--strict")


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is here")
def test_a_url_whose_package_is_not_installed(fails):
    for command in (("teacher-cache", "--data", "gs://a/b"), ("train", "--cache", "gs://a/b", "--out", "run")):
        assert "gcsfs" in fails(*command)


def test_pairs_are_drawn_and_missing_ones_named(run, fails, tmp_path):
    toy_store(tmp_path / "cache" / "a.zarr", 2)
    code, out, _ = run("inspect-cache", "cache", "--pair", 1, "--out", "pair.png")
    assert code == 0
    assert "correspondences" in out
    assert Image.open(tmp_path / "pair.png").height > 600
    assert "there is no pair 7" in fails("inspect-cache", "cache", "--pair", 7)
    assert "no image" in fails("inspect-cache", "cache", "--image", "moon")
    toy_store(tmp_path / "photos" / "b.zarr", 2, paired=False)
    assert "homography pairs only" in fails("inspect-cache", "photos", "--pair", 0)


def test_features_for_hloc_colmap_and_other_programs(run, tmp_path):
    for k in range(3):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    SAMFeat("released", detection_threshold=0.0, max_keypoints=30).save(tmp_path / "w.safetensors")
    options = ("--weights", "w.safetensors", "--max-size", 64, "--multiscale", "--threads", 2)
    code, _, err = run("extract", "photos", "f.h5", *options)
    assert code == 0, err
    for output, more in (("m.h5", ()), ("d.db", ("--images", "photos", "--ratio", 0.9))):
        code, out, err = run("match-pairs", "f.h5", output, *more)
        assert (code, "of 3 pairs of 3 images" in out, (tmp_path / output).exists()) == (0, True, True), err
    for name in ("model.pt", "copy.safetensors"):
        code, out, err = run("export", "w.safetensors", name)
        assert (code, name in out) == (0, True), err
    assert SAMFeat.from_pretrained(tmp_path / "copy.safetensors").extraction.max_keypoints == 30


def test_exports_and_pairs_that_cannot_be(fails, tmp_path):
    SAMFeat("default").save(tmp_path / "w.safetensors")
    SAMFeat("paper").save(tmp_path / "paper.safetensors")
    (tmp_path / "no.h5").write_text("text")
    assert ".onnx, .pt or .safetensors" in fails("export", "w.safetensors", "w.txt")
    assert "edge_attention" in fails("export", "paper.safetensors", "w.pt")
    assert "no.h5 cannot be opened as HDF5" in fails("match-pairs", "no.h5", "m.h5")
    assert "nowhere.h5" in fails("match-pairs", "nowhere.h5", "m.h5")


# -- folders and stores ------------------------------------------------------------------------------------------------


def test_missing_and_empty_folders(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in fails("teacher-cache", "--data", "nowhere")
    assert "empty" in fails("teacher-cache", "--data", "empty")
    assert "nowhere" in fails("train", "--cache", "nowhere")
    assert "holds no store" in fails("train", "--cache", "empty")
    assert "holds no store" in fails("inspect-cache", "empty")
    assert "nowhere" in fails("extract", "nowhere", "out.h5", "--method", "sift")
    assert "nowhere.png" in fails("match", "nowhere.png", "nowhere.png", "--method", "sift")
    assert "nowhere" in fails("ablate", "V", "--cache", "nowhere")
    assert "nowhere" in fails("ablate", "V", "--cache", "empty", "--data", "nowhere")
    assert "unknown table 'XI': there are IV, V" in fails("ablate", "XI", "--cache", "empty")
    assert "nowhere" in fails("evaluate", "hpatches", "--data", "nowhere", "--method", "sift")
    assert "unknown evaluation 'aachen'" in fails("evaluate", "aachen", "--data", "empty", "--method", "sift")


def test_features_of_a_file_are_evaluated_and_wrong_methods_are_one_line(run, fails, tmp_path):
    for k in (1, 2):
        photo(tmp_path / "planes" / "wall" / f"{k}.png")
    np.savetxt(tmp_path / "planes" / "wall" / "H_1_2", np.eye(3))
    assert run("extract", "planes", "other.h5", "--method", "sift")[0] == 0
    evaluate = ("evaluate", "hpatches", "--data", "planes", "--out", "out")
    code, out, _ = run(*evaluate, "--method", "other.h5")
    assert code == 0
    assert "| other | all | 100.0 | 100.0 |" in out
    assert "| 100.0 | 100.0 |" not in (page := (tmp_path / "out" / "report.html").read_text())
    assert page.count("<img") == 4
    code, out, _ = run("report", "out", "--out", "all.html")
    assert (code, (tmp_path / "all.html").read_text()) == (0, page)
    assert "holds no table.json" in fails("report", "planes")
    assert "choose one of samfeat, sift" in fails(*evaluate, "--method", "surf")
    assert "needs its authors' weights" in fails(*evaluate, "--method", "disk")
    assert "no feature file absent.h5" in fails(*evaluate, "--method", "absent.h5")
    assert "computes none" in fails("match", "planes/wall/1.png", "planes/wall/2.png", "--method", "other.h5")
    assert "holds no groundTruth" in fails("evaluate", "edges", "--data", "planes", "--method", "canny")
    pose = ("evaluate", "pose", "--data", "planes", "--method", "sift")
    assert "lists no pair" in fails(*pose)
    assert "--ratio takes none or a number such as 0.8, got high" in fails(*pose, "--ratio", "high")
    assert "in (0, 1]" in fails(*pose, "--ratio", "none", "--ratio", "1.5")
    assert "has no option ratios" in fails(*evaluate, "--method", "sift", "--ratio", "0.8")


def test_a_store_of_another_version_and_an_unfinished_one(fails, tmp_path):
    toy_store(tmp_path / "cache" / "a.zarr", 4)
    group = zarr.open_group(tmp_path / "cache" / "a.zarr", mode="r+")
    group["done"][0] = 0
    assert "is unfinished: 1 of 2 shards are missing" in fails("train", "--cache", "cache")
    assert "problems found" in fails("inspect-cache", "cache", "--verify", "--recompute", 0)
    group.attrs["version"] = 9
    assert "format version 9, this program reads version 2" in fails("train", "--cache", "cache")


def test_a_store_goes_on_only_with_the_same_settings(run, fails, tmp_path):
    for k in range(2):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    assert run(*cache_of(tmp_path))[0] == 0
    assert "begun with other settings" in fails(*cache_of(tmp_path, "--seed", 3))


# -- images ------------------------------------------------------------------------------------------------------------


def test_bad_photos_are_skipped_named_and_cost_nothing_else(run, tmp_path):
    photos = tmp_path / "photos"
    good = photo(photos / "good.png")
    data = photo(photos / "x.jpg", seed=1).read_bytes()
    (photos / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (photos / "zero.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(photos / "pixel.png")
    code, _, err = run(*cache_of(tmp_path))
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert "3 of 5 images could not be used, the other 2 are stored" in err
    for name in ("truncated.jpg", "zero.jpg", "pixel.png"):
        assert name in err
    assert good.name not in err
    code, out, _ = run("inspect-cache", "cache", "--verify", "--recompute", 0)
    assert (code, "verified" in out) == (0, True)


def test_grey_alpha_deep_and_rotated_photos_are_used(run, tmp_path):
    photos = tmp_path / "photos"
    photo(photos / "grey.png", mode="L")
    photo(photos / "alpha.png", mode="RGBA")
    deep = (np.kron(np.random.default_rng(0).random((10, 12)), np.ones((10, 10))) * 65535).astype(np.uint16)
    Image.fromarray(deep).save(photos / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo(photos / "rotated.jpg")).save(photos / "rotated.jpg", exif=exif)
    code, out, err = run(*cache_of(tmp_path))
    assert (code, "4 images, 4 of them new" in out) == (0, True), err


def test_a_photo_that_cannot_be_matched(fails, tmp_path):
    photo(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no photo")
    assert "bad.jpg" in fails("match", "good.png", "bad.jpg", "--method", "sift")


# -- weights and checkpoints -------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return (open, ("touched", "w"))


def test_wrong_weights(fails, run, tmp_path):
    image = photo(tmp_path / "a.png")
    code, _, err = run("match", image, image, "--out", "m.png")  # without --weights, the student that ships
    assert (code, (tmp_path / "m.png").exists()) == (0, True), err
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious()))
    assert "evil.pt" in fails("match", image, image, "--weights", "evil.pt")
    torch.save({"model": Malicious()}, tmp_path / "evil2.pt")
    assert "evil2.pt" in fails("match", image, image, "--weights", "evil2.pt")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    assert "cut.safetensors" in fails("match", image, image, "--weights", "cut.safetensors")
    assert "takes no weights" in fails("match", image, image, "--method", "sift", "--weights", "cut.safetensors")
    SAMFeat("default", detection_threshold=1.0).save(tmp_path / "blind.safetensors")
    code, out, err = run("match", image, image, "--weights", "blind.safetensors")  # no keypoint is a normal result
    assert (code, "0 and 0 keypoints, 0 mutual matches" in out) == (0, True), err


def test_wrong_sam_checkpoints(fails, tmp_path):
    photo(tmp_path / "photos" / "a.png")
    sam = ("--teacher", "sam_vit_b", "--checkpoint")
    assert "absent.pth" in fails(*cache_of(tmp_path, *sam, "absent.pth"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Malicious()))
    assert "evil.pth" in fails(*cache_of(tmp_path, *sam, "evil.pth"))
    assert not (tmp_path / "touched").exists()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert "other.pth" in fails(*cache_of(tmp_path, *sam, "other.pth"))
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes((tmp_path / "other.pth").read_bytes())
    assert "sha256" in fails(*cache_of(tmp_path, *sam, "sam_vit_b_01ec64.pth"))
    assert "has no option 'checkpoint'" in fails(*cache_of(tmp_path, "--checkpoint", "other.pth"))
    assert not (tmp_path / "cache").exists()


# -- names of stores, dry runs, a look at a cache ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../esc", "a/b", "..", ".", "", " ", ".hidden", "/abs"])
def test_a_store_has_a_plain_name(fails, tmp_path, name):
    photo(tmp_path / "photos" / "a.png")
    assert "give a plain name without folders" in fails(*cache_of(tmp_path, "--name", name))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("cache", ["", "/", "x.zarr", "x.zarr/", "x.zarr.zip"])
def test_a_cache_is_a_folder_for_stores(fails, tmp_path, cache):
    photo(tmp_path / "photos" / "a.png")
    assert "--cache" in fails("teacher-cache", "--data", "photos", "--cache", cache, "--crop-size", 64)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_zipped_store_is_read(run, fails, tmp_path):
    store = toy_store(tmp_path / "cache" / "a.zarr", 2)
    for name, root in (("plain", store.path), ("inside", store.path.parent)):
        shutil.make_archive(str(tmp_path / f"{name}.zarr"), "zip", root)
        zipped = TeacherCache.open(tmp_path / f"{name}.zarr.zip")
        assert zipped.names == store.names
        np.testing.assert_array_equal(zipped[1].embedding, store[1].embedding)
        np.testing.assert_array_equal(zipped.masks(1).stack, store.masks(1).stack)
        code, out, err = run("inspect-cache", f"{name}.zarr.zip", "--verify", "--recompute", 0)
        assert (code, "everything in order" in out) == (0, True), err
        with pytest.raises(ValueError, match="unzip it first"):
            TeacherCache.open(tmp_path / f"{name}.zarr.zip", writable=True)
    (tmp_path / "other.zip").write_bytes(b"PK no archive")
    assert "is not a teacher cache" in fails("inspect-cache", "other.zip")


def test_a_password_in_a_url_is_not_repeated(run):
    code, out, err = run("teacher-cache", "--data", "memory://ann:secret@host/photos")
    assert code == 2
    assert "memory://***@host/photos" in err
    assert "secret" not in out + err


def test_a_dry_run_fetches_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: pytest.fail("it downloads"))
    photo(tmp_path / "photos" / "a.png")
    code, out, err = run(*cache_of(tmp_path, "--teacher", "sam_vit_h", "--dry-run"))
    assert code == 0, err
    assert "1 images; a run would first download https://dl.fbaipublicfiles.com/" in out
    assert "(2.6 GB)" in out
    assert not (tmp_path / "cache").exists()


def test_images_and_pairs_by_number_or_name(run, fails, tmp_path):
    store = toy_store(tmp_path / "cache" / "a.zarr", 4)
    for which in ("3", store.names[3], "001.png#1"):
        code, out, err = run("inspect-cache", "cache", "--image", which)
        assert (code, store.names[3] in out) == (0, True), err
    for which in ("2", store.names[4], store.names[5], "002.png"):
        code, out, err = run("inspect-cache", "cache", "--pair", which)
        assert (code, f"{store.names[4]} and {store.names[5]}" in out) == (0, True), err
    assert "has 8 images, numbered from 0: there is no image 8" in fails("inspect-cache", "cache", "--image", "8")
    assert "has 4 pairs, numbered from 0: there is no pair 4" in fails("inspect-cache", "cache", "--pair", "4")
    assert "2 pairs of a.zarr" in fails("inspect-cache", "cache", "--pair", "scene0")
    assert "no pairs of a.zarr with an image called 'x'" in fails("inspect-cache", "cache", "--pair", "x")


def test_verification_comes_before_the_summary_and_names_the_command(run, tmp_path):
    store = toy_store(tmp_path / "cache" / "a.zarr", 4)
    for name in ("failure/zarr.json", "keypoint_count/c/1"):
        (store.path / name).unlink()
    code, _, err = run("inspect-cache", "cache", "--verify")
    assert code == 2
    assert all(f"a.zarr: {name} is missing" in err for name in ("failure/zarr.json", "keypoint_count/c/1"))
    command = "samfeat-cli teacher-cache --data DATA --cache cache --name a --repair"
    assert "2 problems found" in err
    assert command in err


# -- settings, disks, devices ------------------------------------------------------------------------------------------


def test_unknown_keys_presets_and_values(fails, tmp_path):
    toy_store(tmp_path / "cache" / "a.zarr", 2)
    train = ("train", "--cache", "cache")
    assert "did you mean 'optimiser.batch_size'" in fails(*train, "optimiser.batchsize=3")
    assert "unknown preset 'big'" in fails(*train, "--preset", "big")
    assert "choose never or auto" in fails(*train, "--resume", "yes")
    assert "optimiser.steps" in fails(*train, "optimiser.steps=soon")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(fails, tmp_path):
    image = photo(tmp_path / "photos" / "a.png")
    toy_store(tmp_path / "stores" / "a.zarr", 2)
    SAMFeat("default").save(tmp_path / "w.safetensors")
    assert "CUDA" in fails("train", "--cache", "stores", "run.accelerator=cuda")
    assert "GPU" in fails("match", image, image, "--weights", "w.safetensors", "--device", "cuda")


def test_a_full_disk(fails, run, tmp_path, monkeypatch):
    for k in range(4):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", full)
        assert "no space left" in fails(*cache_of(tmp_path)).lower()
    assert run(*cache_of(tmp_path))[0] == 0  # the same command goes on


def test_a_folder_that_may_not_be_written(fails, tmp_path, monkeypatch):
    photo(tmp_path / "photos" / "a.png")

    def refused(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    assert "no permission" in fails(*cache_of(tmp_path))


def test_an_interruption_says_that_nothing_is_lost(run, tmp_path, monkeypatch):
    photo(tmp_path / "photos" / "a.png")

    def interrupted(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr("samfeat.teacher_cache.teachers.classical.ClassicalTeacher.__call__", interrupted)
    code, _, err = run(*cache_of(tmp_path))
    assert code == 75
    assert err == "interrupted: finished work is kept, run the same command again to resume\n"


def no_credentials():
    from botocore.exceptions import NoCredentialsError

    raise NoCredentialsError


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def gone():
    raise ConnectionError("process 1: another process of the run is gone")


@pytest.mark.parametrize(
    ("fail", "code", "said"),
    [
        (no_credentials, 2, "error: Unable to locate credentials"),
        (no_gpu_memory, 2, "error: not enough free GPU memory"),
        (gone, 75, "interrupted: process 1"),
    ],
)
def test_errors_of_services_and_devices_are_one_line(run, tmp_path, monkeypatch, fail, code, said):
    monkeypatch.setattr("samfeat.pipelines.config.load_config", lambda *arguments: fail())
    ended, _, error = run("train", "--cache", tmp_path)
    assert ended == code
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_the_traceback_is_there_when_asked_for(tmp_path):
    program = (
        "import sys; sys.argv = ['samfeat-cli', 'train', '--cache', 'nowhere']; from samfeat import cli; cli.main()"
    )
    for value, expected in (("", False), ("1", True)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"SAMFEAT_TRACEBACK": value, "PATH": "/usr/bin:/bin"},
        )
        assert ("Traceback" in done.stderr) == expected


def test_the_console_script_is_installed():
    script = shutil.which("samfeat-cli", path=str(Path(sys.executable).parent))
    assert script is not None


# -- outputs and inputs ------------------------------------------------------------------------------------------------


def test_outputs_never_replace_inputs(run, fails, tmp_path):
    for k in range(3):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    SAMFeat("default", detection_threshold=0.0, max_keypoints=30).save(tmp_path / "w.safetensors")
    assert run("extract", "photos", "f.h5", "--weights", "w.safetensors")[0] == 0
    (tmp_path / "pairs.h5").write_text("0.png 1.png\n")
    (tmp_path / "list.txt").write_text("photos/0.png\n")
    toy_store(tmp_path / "cache" / "a.zarr", 2)
    (tmp_path / "link.png").symlink_to(tmp_path / "photos" / "0.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "photos" / "0.png")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "cache" / "a.zarr")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    before = tree_bytes(tmp_path)
    pair = ("match", "photos/0.png", "photos/1.png", "--method", "sift")
    weights = ("--weights", "w.safetensors")
    commands = [
        ("match-pairs", "f.h5", "f.h5", "--overwrite"),
        ("match-pairs", "f.h5", "pairs.h5", "--pairs", "pairs.h5", "--overwrite"),
        (*pair, "--out", "photos/0.png"),
        (*pair, "--out", "link.png"),
        (*pair, "--out", "hard.png"),
        (*pair, "--out", "linked/1.png"),
        (*pair, "--maps", "photos/1.png"),
        (*pair, "--out", "m.png", "--maps", "m.png"),
        ("extract", "photos", "photos/0.png", *weights, "--overwrite"),
        ("extract", "photos", "hard.png", *weights, "--overwrite"),
        ("extract", "list.txt", "list.txt", *weights, "--overwrite"),
        ("extract", "list.txt", "photos/0.png", *weights, "--overwrite"),
        ("extract", "photos", "w.safetensors", *weights, "--overwrite"),
        ("export", "w.safetensors", "w.safetensors"),
        ("inspect-cache", "cache", "--html", "cache/a.zarr/zarr.json"),
        ("inspect-cache", "cache", "--image", "0", "--out", "link.zarr/zarr.json"),
        ("train", "--cache", "cache", "--out", "cache"),
        ("train", "--cache", "cache", "--out", "cache/a.zarr/run"),
        ("ablate", "--cache", "cache", "--out", "cache"),
        ("prepare", "photos", "photos"),
        ("prepare", "photos", "linked/out"),
        ("evaluate", "hpatches", "--data", "photos", "--out", "photos/out", "--method", "sift"),
        ("report", "photos", "--out", "photos/0.png"),
        ("benchmark", "speed", *weights, "--out", "w.safetensors"),
    ]
    for command in commands:
        message = fails(*command)
        assert "choose" in message, command
        assert tree_bytes(tmp_path) == before, command


def test_an_output_beside_its_inputs_is_fine(run, tmp_path):
    for k in range(2):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    for command in (
        ("extract", "photos", "photos/f.h5", "--method", "sift"),
        ("extract", "photos", "photos", "--method", "sift", "--format", "d2net"),
        ("match", "photos/0.png", "photos/1.png", "--method", "sift", "--out", "photos/m.csv"),
    ):
        code, _, err = run(*command)
        assert code == 0, err


# -- names, packages, knobs --------------------------------------------------------------------------------------------


def test_names_with_markup_are_kept(run, tmp_path):
    first, second = photo(tmp_path / "q[red].png"), photo(tmp_path / "a[/b].png", seed=1)
    code, out, err = run("match", first, second, "--method", "sift", "--out", tmp_path / "m[/x].png")
    assert code == 0, err
    assert "m[/x].png" in out
    assert (tmp_path / "m[/x].png").is_file()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "e[bold].png").write_bytes(b"")
    code, _, err = run("extract", tmp_path / "bad", "f[/].h5", "--method", "sift")
    assert (code, "skipped e[bold].png" in err) == (2, True)


def test_a_name_that_is_not_utf8_is_named(run, tmp_path):
    photo(tmp_path / "photos" / "a.png").rename(tmp_path / "photos" / "caf\udce9.png")
    photo(tmp_path / "photos" / "b.png")
    code, out, err = run("extract", "photos", "f.h5", "--method", "sift")
    assert (code, "wrote features of 1 images" in out) == (2, True)
    assert "skipped caf\\udce9.png: its name is not UTF-8" in err


@pytest.mark.parametrize(
    ("module", "extra", "words"),
    [
        ("s3fs", "[s3]", ("train", "--cache", "s3://a/b")),
        ("s3fs", "[s3]", ("teacher-cache", "--data", "s3://a/b")),
        (
            "segment_anything",
            "",
            ("teacher-cache", "--data", ".", "--source", "folder", "--teacher", "sam_vit_b", "--checkpoint", "a.png"),
        ),
        ("pycolmap", "", ("teacher-cache", "--data", "colmap")),
        ("onnxruntime", "[onnx]", ("export", "w.safetensors", "w.onnx")),
        ("pycolmap", "", ("match", "a.png", "a.png")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(fails, tmp_path, monkeypatch, module, extra, words):
    SAMFeat("default").save(tmp_path / "w.safetensors")
    photo(tmp_path / "a.png")
    for name in ("cameras", "images", "points3D"):
        (tmp_path / "colmap" / "sparse").mkdir(parents=True, exist_ok=True)
        (tmp_path / "colmap" / "sparse" / f"{name}.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=find_spec: None if name == module else find(name)
    )
    monkeypatch.setattr("samfeat.student.onnx.find_spec", importlib.util.find_spec)
    message = fails(*words)
    assert module in message
    assert f"pip install 'samfeat{extra}'" in message


def test_wrong_words_are_one_line(fails):
    assert "No such option: --colour" in fails("match", "a", "b", "--colour", 3)
    assert "Missing argument" in fails("match", "a")
    assert "No such command" in fails("macth")
    assert "No such option" in fails("--colour")
    assert "'tpu'" in fails("match", "a", "b", "--device", "tpu")
    assert "--max-keypoints" in fails("match", "a", "b", "--max-keypoints", 10**12)
    assert "--crop-size" in fails("teacher-cache", "--data", ".", "--crop-size", 1_000_000)


def test_the_version_and_every_key_of_the_configuration(run, fails, tmp_path):
    assert run("--version") == (0, f"samfeat {samfeat.__version__}\n", "")
    code, out, _ = run("config", "sample", "losses.wsc=0.5")
    assert code == 0
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in out.splitlines()[2:]]
    found = {name: (value, source) for name, value, source, _ in rows}
    assert len(found) == len(rows) > 40
    assert found["losses.wsc"] == ("0.5", "command line")
    assert found["losses.edge"] == ("10.0", "sample")
    assert found["optimiser.clip_norm"] == ("5.0", "default")
    assert [row[0] for row in rows if not row[3]] == []  # every key is explained
    assert "losses has detection, descriptor" in fails("config", "default", "losses.foo=1")
    assert "unknown preset" in fails("config", "mine")


# -- interruptions -----------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, select, signal, sys, time
from samfeat import cli

def stand_in(*arguments, **options):
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        print("saving", flush=True)
        while not select.select([sys.stdin], [], [], 0.02)[0]:  # takes until the test has sent all signals
            pass  # in short waits: a signal just before a long one would only be handled after it
        print("saved", flush=True)

import samfeat.pipelines.match as place
place.match_images = stand_in
sys.argv = ["samfeat-cli", "match", "a.png", "a.png", "--method", "sift"]
cli.main()
"""


@pytest.mark.parametrize("sent", [[signal.SIGTERM] * 2, [signal.SIGINT] * 2, [signal.SIGTERM]])
def test_signals_end_in_75_and_a_second_one_does_not_disturb_the_saving(tmp_path, sent):
    """``match`` imports pycolmap, which brings a handler of SIGTERM of its own."""
    photo(tmp_path / "a.png")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "started\n"
    first, *others = sent
    process.send_signal(first)
    assert process.stdout.readline() == "saving\n"
    seen = []
    for number in others:
        process.send_signal(number)
        seen.append(process.stderr.readline().rstrip())
    out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, "saved" in out) == (75, True), err
    lines = ["already stopping: finished work is being saved"] * (len(sent) - 1)
    assert seen == lines
    assert err.splitlines() == ["interrupted: finished work is kept, run the same command again to resume"]


def test_every_command_that_may_load_pycolmap_takes_the_signals_back():
    """Statically, by the graph of imports; training stays clear of pycolmap."""
    graph = grimp.build_graph("samfeat", include_external_packages=True, cache_dir=None)
    for registry, members in (("sources", SOURCES), ("teachers", TEACHERS)):  # imported by name
        for member in members.values():
            graph.add_import(importer=f"samfeat.teacher_cache.{registry}", imported=member.split(":")[0])
    for command in ast.parse(Path(cli.__file__).read_text()).body:
        if not isinstance(command, ast.FunctionDef) or not command.decorator_list or command.name == "train":
            continue
        imports = [node for node in ast.walk(command) if isinstance(node, ast.ImportFrom)]
        modules = {node.module for node in imports}
        modules |= {f"{node.module}.{name.name}" for node in imports for name in node.names}
        reached = any(graph.chain_exists(importer=name, imported="pycolmap") for name in modules & graph.modules)
        called = {getattr(node.func, "id", "") for node in ast.walk(command) if isinstance(node, ast.Call)}
        assert reached == ("_import_pycolmap" in called), command.name


def test_an_interruption_ends_cleanly_while_threads_are_at_work(tmp_path):
    photo(tmp_path / "a.png")
    program = (
        "import sys, threading, time\nfrom samfeat import cli\n"
        "def work():\n    while True: sum(range(1000))\n"
        "def stand_in(*a, **o):\n"
        "    threading.Thread(target=work).start()\n    raise KeyboardInterrupt\n"
        "import samfeat.pipelines.match as place\nplace.match_images = stand_in\n"
        "sys.argv = ['samfeat-cli', 'match', 'a.png', 'a.png', '--method', 'sift']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr


def test_tracebacks_of_threads_and_destructors_are_not_shown(tmp_path):
    photo(tmp_path / "a.png")
    program = (
        "import sys, threading\nfrom samfeat import cli\n"
        "class Writer:\n    def __del__(self): raise OSError(28, 'No space left on device')\n"
        "def write(): raise OSError(28, 'No space left on device')\n"
        "def stand_in(*a, **o):\n"
        "    thread = threading.Thread(target=write); thread.start(); thread.join(); Writer()\n"
        "    import warnings; warnings.warn('noise')\n"
        "    raise OSError(28, 'No space left on device', 'run/metrics.jsonl')\n"
        "import samfeat.pipelines.match as place\nplace.match_images = stand_in\n"
        "sys.argv = ['samfeat-cli', 'match', 'a.png', 'a.png', '--method', 'sift']\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run/metrics.jsonl: no space left on the disk")
    assert done.stderr.count("\n") == 1
