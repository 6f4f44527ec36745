"""The command line as a user meets it: help in no time, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from toys import toy_store

from samfeat import cli
from samfeat.student.extractor import SAMFeat

VERBS = (
    "sample", "prepare", "teacher-cache", "inspect-cache", "train", "ablate",
    "extract", "match", "match-pairs", "evaluate", "report", "export",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in a folder of its own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samfeat-cli", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
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
    assert (code, "6 of them written now" in out) == (0, True), err
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
    assert "6 images written" in out
    (tmp_path / "photos" / "6.png").write_bytes(b"")
    code, out, err = run("extract", "photos", "features.h5", "--weights", weights)
    assert (code, "6 there before" in out, "6.png" in err) == (2, True, True), err


def test_parts_estimates_and_repairs(run, fails, tmp_path):
    for k in range(6):
        photo(tmp_path / "photos" / f"{k}.png", seed=k)
    command = cache_of(tmp_path, "--shard-images", 2, "--name", "toy")
    code, out, err = run(*command, "--dry-run")
    assert (code, "6 images in 3 shards, 3 of them to make" in out) == (0, True), err
    assert not (tmp_path / "cache").exists()
    for wrong in ("0/2", "3/2", "2", "a/b"):
        assert "give K/N" in fails(*command, "--shard", wrong)
    code, out, err = run(*command, "--shard", "2/2")
    assert (code, "2 of them written now" in out) == (0, True), err
    assert "2 of 3 shards are missing" in fails("train", "--cache", "cache", "--out", "run")
    code, out, err = run(*command, "--shard", "1/2")
    assert (code, "4 of them written now" in out) == (0, True), err
    damaged = tmp_path / "cache" / "toy.zarr" / "edges" / "c" / "1" / "0" / "0"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    assert "with --repair" in fails("inspect-cache", "cache", "--verify")
    code, out, err = run(*command, "--repair")
    assert (code, "shard 1 is made again" in out, "2 of them written now" in out) == (0, True, True), err
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
    SAMFeat("default", detection_threshold=0.0, max_keypoints=30).save(tmp_path / "w.safetensors")
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
    assert "holds no table.md" in fails("report", "planes")
    assert "choose one of samfeat, sift" in fails(*evaluate, "--method", "surf")
    assert "needs its authors' weights" in fails(*evaluate, "--method", "disk")
    assert "no feature file absent.h5" in fails(*evaluate, "--method", "absent.h5")
    assert "computes none" in fails("match", "planes/wall/1.png", "planes/wall/2.png", "--method", "other.h5")
    assert "holds no groundTruth" in fails("evaluate", "edges", "--data", "planes", "--method", "canny")
    assert "lists no pair" in fails("evaluate", "pose", "--data", "planes", "--method", "sift")


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
    assert "3 of 5 images could not be used; all others are stored" in err
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
    assert (code, "4 images, 4 of them written now" in out) == (0, True), err


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
    assert "needs trained weights" in fails("match", image, image)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious()))
    assert "evil.pt" in fails("match", image, image, "--weights", "evil.pt")
    torch.save({"model": Malicious()}, tmp_path / "evil2.pt")
    assert "evil2.pt" in fails("match", image, image, "--weights", "evil2.pt")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    assert "cut.safetensors" in fails("match", image, image, "--weights", "cut.safetensors")
    assert "takes no weights" in fails("match", image, image, "--method", "sift", "--weights", "cut.safetensors")
    SAMFeat("default").save(tmp_path / "blind.safetensors")
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
    assert "has no weights" in fails(*cache_of(tmp_path, "--checkpoint", "other.pth"))
    assert not (tmp_path / "cache").exists()


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

    monkeypatch.setattr("samfeat.teacher_cache.classical.ClassicalTeacher.__call__", interrupted)
    code, _, err = run(*cache_of(tmp_path))
    assert code == 75
    assert "the same command goes on" in err


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
        (no_gpu_memory, 2, "error: the GPU has not enough free memory"),
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
