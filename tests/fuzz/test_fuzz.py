"""Damaged inputs for every command, in process.

Whatever an input holds, a command ends with exit code 0, 2 or 75 and, for 2, exactly one line that begins with
``error:``; there is no traceback, and inputs stay as they were. ``SAMFEAT_FUZZ=1000 pytest tests/fuzz`` tries 1,000
damaged inputs and prints how many of each command ended how; a case is made again by its number alone.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import toy_store, tree_bytes
from typer.testing import CliRunner

from samfeat import cli
from samfeat.pipelines.config import load_config
from samfeat.pipelines.config_reference import configuration_keys
from samfeat.student.export import save_checkpoint
from samfeat.student.extractor import SAMFeat
from samfeat.student.network import SAMFeatNetwork, network_preset

LONG = int(os.environ.get("SAMFEAT_FUZZ", "0"))
CASES = LONG or 40
BESIDE = (
    "skipped ",
    "left out ",
    "photos: left out ",
    "warning: ",
    "image ",
    "pair ",
    "shard ",
)  # lines that may stand beside the error
EXIT_CODES = (0, 2, 75)
KEYS = [key.name for key in configuration_keys()]

spec = importlib.util.spec_from_file_location("damage", Path(__file__).with_name("damage.py"))
assert spec is not None
assert spec.loader is not None
damage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(damage)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """One healthy input of every kind."""
    folder = tmp_path_factory.mktemp("healthy")
    rng = np.random.default_rng(0)
    for k in range(3):
        image = Image.fromarray(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)).resize(
            (80, 64), Image.Resampling.NEAREST
        )
        for place in (f"photos/{k}.{'png' if k else 'jpg'}", f"planes/wall/{k + 1}.ppm"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / place)
    for k in (2, 3):
        np.savetxt(folder / "planes" / "wall" / f"H_1_{k}", np.eye(3))
    network = SAMFeatNetwork(network_preset("slim"))
    SAMFeat("slim", network=network, detection_threshold=0.0, max_keypoints=20).save(folder / "w.safetensors")
    save_checkpoint(folder / "w.pt", SAMFeatNetwork(network_preset("released")))
    (folder / "photos" / "pairs.txt").write_text("0.jpg 1.png\n1.png 2.png\n")
    (folder / "photos" / "list.txt").write_text("0.jpg\n1.png\n2.png\n")
    (folder / "mine.yaml").write_text(
        "network_preset: slim\noptimiser:\n  steps: 7\n  learning_rate: 1e-3\nlosses: {wsc: 0}\n"
    )
    toy_store(folder / "cache" / "a.zarr", 2)
    run = CliRunner()
    for source, name in (("photos", "f.h5"), ("planes", "planes.h5")):
        words = ["extract", str(folder / source), str(folder / name), "--method", "sift", "--max-keypoints", "20"]
        made = run.invoke(cli.app, words)
        assert made.exit_code == 0, made.output
    words = [
        "evaluate",
        "hpatches",
        "--data",
        str(folder / "planes"),
        "--out",
        str(folder / "evaluation"),
        "--method",
        "sift",
    ]
    assert run.invoke(cli.app, words).exit_code == 0
    return folder


def pick(rng: random.Random, folder: Path, pattern: str = "**/*") -> Path:
    """A file below a folder."""
    return rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))


# Each recipe damages inputs in a copy of the healthy folder and returns the words of a command.


def images(rng: random.Random, here: Path) -> list[str]:
    damage.damage_file(pick(rng, here, "photos/*.*g"), rng)
    return rng.choice(
        [
            ["extract", "photos", "out/f.h5", "--method", "sift", *rng.choice([[], ["--max-size", "40"]])],
            ["extract", "photos/list.txt", "out/f.h5", "--method", "orb"],
            ["extract", "photos", "out/d", "--format", "d2net", "--method", "sift"],
            [
                "match",
                "photos/0.jpg",
                "photos/1.png",
                "--method",
                "sift",
                "--out",
                rng.choice(["out/m.png", "out/m.csv"]),
            ],
            ["teacher-cache", "--data", "photos", "--cache", "out", "--crop-size", "64", "--threads", "1"],
            ["prepare", "photos", "out/p"],
        ]
    )


def weights(rng: random.Random, here: Path) -> list[str]:
    name = rng.choice(["w.safetensors", "w.pt"])
    kind = rng.random()
    if kind < 0.4:
        damage.damage_file(here / name, rng)
    elif name == "w.pt":
        damage.damage_checkpoint(here / name, rng)
    else:
        damage.damage_safetensors(here / name, rng)
    return rng.choice(
        [
            ["export", name, rng.choice(["out/e.safetensors", "out/e.pt"])],
            ["extract", "photos", "out/f.h5", "--weights", name, "--max-size", "32"],
            ["match", "photos/0.jpg", "photos/1.png", "--weights", name, "--out", "out/m.npz"],
        ]
    )


def features(rng: random.Random, here: Path) -> list[str]:
    name = rng.choice(["f.h5", "f.h5", "planes.h5"])
    if rng.random() < 0.5:
        damage.damage_file(here / name, rng)
    else:
        damage.damage_hdf5(here / name, rng)
    if name == "planes.h5":
        return ["evaluate", "hpatches", "--data", "planes", "--out", "out/e", "--method", name]
    return rng.choice(
        [
            ["match-pairs", "f.h5", "out/m.h5"],
            ["match-pairs", "f.h5", "out/m.h5", "--ratio", "0.8", "--pairs", "photos/pairs.txt"],
            ["match-pairs", "f.h5", "out/d.db", "--images", "photos"],
            ["match", "photos/0.jpg", "photos/1.png", "--method", "f.h5", "--out", "out/m.png"],
        ]
    )


def lists(rng: random.Random, here: Path) -> list[str]:
    name = rng.choice(["pairs", "list"])
    path = here / "photos" / f"{name}.txt"
    path.write_bytes(damage.damage_text(path.read_text(), rng))
    if name == "pairs":
        return ["match-pairs", "f.h5", "out/m.h5", "--pairs", str(path.relative_to(here))]
    return ["extract", "photos/list.txt", "out/f.h5", "--method", "sift"]


def settings(rng: random.Random, here: Path) -> list[str]:
    preset = rng.choice(["default", "sample", "mine.yaml"])
    words: list[str] = []
    if preset == "mine.yaml" and rng.random() < 0.8:
        path = here / "mine.yaml"
        path.write_bytes(
            damage.damage_text(path.read_text(), rng)
            if rng.random() < 0.7
            else damage.damage_bytes(path.read_bytes(), rng)
        )
    else:
        key = rng.choice(
            [rng.choice(KEYS), rng.choice(KEYS).rpartition(".")[0], "x", "losses.x", "", ".", "a b", "[red]"]
        )
        words = [f"{key}={damage.damage_value(rng)}"]
    if rng.random() < 0.3:
        return ["ablate", "no-such-table", "--cache", "cache", "--out", "out/a", "--file", "mine.yaml"]
    return rng.choice(
        [["config", preset, *words], ["train", "--cache", "photos", "--out", "out/r", "--preset", preset, *words]]
    )


def stores(rng: random.Random, here: Path) -> list[str]:
    store = here / "cache" / "a.zarr"
    path = pick(rng, store)
    if path.name == "zarr.json" and rng.random() < 0.7:
        path.write_text(damage.damage_json(path.read_text(), rng))
    else:
        damage.damage_file(path, rng)
    return rng.choice(
        [
            ["inspect-cache", "cache"],
            ["inspect-cache", "cache", "--verify", "--recompute", "0"],
            ["inspect-cache", "cache", "--image", "0", "--out", "out/i.png"],
            ["inspect-cache", "cache", "--pair", "0", "--out", "out/i.png"],
            ["inspect-cache", "cache", "--html", "out/g.html", "--gallery", "1"],
        ]
    )


def evaluations(rng: random.Random, here: Path) -> list[str]:
    kind = rng.random()
    if kind < 0.4:
        damage.damage_file(pick(rng, here, "planes/wall/*"), rng)
        return ["evaluate", "hpatches", "--data", "planes", "--out", "out/e", "--method", "sift"]
    path = pick(rng, here, rng.choice(["evaluation/**/*.json", "evaluation/*.md", "evaluation/**/*"]))
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(damage.damage_json(path.read_text(), rng))
    else:
        damage.damage_file(path, rng)
    return ["report", "evaluation", "--out", "out/r.html"]


def names(rng: random.Random, here: Path) -> list[str]:
    name = rng.choice(damage.NAMES)
    if "/" not in name:
        (here / "photos" / "0.jpg").rename(here / "photos" / f"{name}.jpg")
    return rng.choice(
        [
            ["extract", "photos", f"out/{name}.h5", "--method", "sift"],
            ["match", f"photos/{name}.jpg", "photos/1.png", "--method", "sift", "--out", f"out/{name}.png"],
            ["match-pairs", "f.h5", f"out/{name}.h5"],
            ["export", f"{name}.safetensors", "out/x.pt"],
            ["inspect-cache", name],
            ["inspect-cache", "cache", "--image", name, "--out", "out/i.png"],
            ["evaluate", name, "--data", "planes", "--method", "sift"],
            ["evaluate", "hpatches", "--data", "planes", "--out", f"out/{name}", "--method", "sift", "--name", name],
            ["train", "--cache", "cache", "--preset", name],
            ["report", name, "--out", "out/r.html"],
            ["teacher-cache", "--data", name, "--cache", "out"],
        ]
    )


def words(rng: random.Random, here: Path) -> list[str]:
    """Options with values that nobody means."""
    options = {
        "extract photos out/f.h5": ["--max-keypoints", "--max-size", "--threads", "--method", "--device", "--format"],
        "match photos/0.jpg photos/1.png --out out/m.png": ["--ratio", "--verify", "--estimator", "--method", "--maps"],
        "match-pairs f.h5 out/m.h5": ["--ratio", "--pairs", "--images"],
        "inspect-cache cache": ["--image", "--pair", "--gallery", "--recompute"],
        "train --cache cache": ["--preset", "--resume", "--devices"],
        "teacher-cache --data photos --cache out": [
            "--crop-size",
            "--labels",
            "--shard-images",
            "--seed",
            "--scheduler",
            "--devices",
        ],
        "benchmark speed": ["--size", "--repeats", "--batch"],
        "export w.safetensors": ["--max-keypoints", "--x"],
    }
    command = rng.choice(sorted(options))
    values = ["-1", "1" + "0" * 30, "nan", "x", "", "[red]", "../x", "é", "0x0", "-", "\x00"]
    return [*command.split(), rng.choice(options[command]), rng.choice(values)]


RECIPES: list[Callable[[random.Random, Path], list[str]]] = [
    images,
    weights,
    features,
    lists,
    settings,
    settings,
    stores,
    evaluations,
    names,
    words,
]


def inputs_of(here: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(here).items() if not name.startswith("out")}


def fault(number: int, healthy: Path, here: Path, counts: Counter[tuple[str, int]]) -> str:
    """What is wrong with how a case ends; nothing where it ends as it should."""
    rng = random.Random(number)
    recipe = RECIPES[number % len(RECIPES)]
    shutil.copytree(healthy, here, symlinks=True)
    arguments = recipe(rng, here)
    before = inputs_of(here)
    os.chdir(here)
    limit = sys.getrecursionlimit()
    result = CliRunner().invoke(cli.app, arguments)
    sys.setrecursionlimit(limit)
    counts[recipe.__name__, result.exit_code] += 1
    said = f"case {number}: {' '.join(map(repr, arguments))}\n  exit code {result.exit_code}: {result.stderr[-600:]}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        trace = traceback.extract_tb(result.exception.__traceback__)[-1]
        return f"{said}\n  {type(result.exception).__name__}: {result.exception} at {trace.filename}:{trace.lineno}"
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "interrupted: "))]
    others = [line for line in result.stderr.splitlines() if not line.startswith(("error: ", "interrupted: ", *BESIDE))]
    if result.exit_code not in EXIT_CODES or len(errors) != (result.exit_code != 0) or "Traceback" in result.output:
        return said
    if others and arguments[0] != "inspect-cache":  # which lists all problems of a store
        return f"{said}\n  more than one line: {others[:3]}"
    if inputs_of(here) != before:
        return f"{said}\n  changed an input"
    return ""


def test_damaged_inputs_end_in_one_line(healthy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # and back, whatever the cases do
    counts: Counter[tuple[str, int]] = Counter()
    faults, seconds = [], {}
    for number in range(CASES):
        start = time.perf_counter()
        found = fault(number, healthy, tmp_path / "case", counts)
        os.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
        seconds[number] = time.perf_counter() - start
        if found:
            faults.append(found)
    if LONG:
        with capsys.disabled():
            print(f"\n{CASES} cases, {len(faults)} faults")
            slowest = sorted(seconds, key=seconds.__getitem__)[-5:]
            print("  slowest: " + ", ".join(f"{number} ({seconds[number]:.0f} s)" for number in slowest))
            for (recipe, code), count in sorted(counts.items()):
                print(f"  {recipe:12} exit code {code}: {count}")
    assert load_config().optimiser.steps is None  # nothing of a case is left behind
    assert not faults, "\n".join(faults)
