"""Teachers and sources from outside the package: by module:Class, by entry point, and as CONTRIBUTING shows them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from samfeat import cli
from samfeat.teacher_cache.sources import SOURCES, open_source
from samfeat.teacher_cache.store import TeacherCache
from samfeat.teacher_cache.teachers import TEACHERS, make_teacher, parse_options
from samfeat.teacher_cache.teachers.classical import ClassicalTeacher

RECIPES = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
IMAGES = np.stack([skimage.data.chelsea()[k : k + 64, 100:196] for k in (0, 60, 120)])


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the recipes' files and their data, as the current one; nothing of it stays imported."""
    for program, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", RECIPES, re.DOTALL):
        (tmp_path / name).write_text(program)
    np.save(tmp_path / "frames.npy", IMAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("brightness", "frames", "mine"):
        sys.modules.pop(name, None)


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["samfeat-cli", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_recipes_make_a_store(outside, monkeypatch):
    words = ("teacher-cache", "--data", ".", "--source", "frames:Frames", "--cache", "cache", "--name", "toy")
    assert run(monkeypatch, *words, "--teacher", "brightness:Brightness", "--teacher-option", "level=90") == 0
    store = TeacherCache.open(outside / "cache" / "toy.zarr")
    assert store.provenance.teacher == {"name": "brightness", "level": 90}
    assert store.provenance.source == {"kind": "frames", "number": 3}
    for k, image in enumerate(IMAGES):
        bright = image.astype(float).sum(axis=2) > 270
        np.testing.assert_array_equal(store[k].image, image)
        np.testing.assert_array_equal(store[k].groups, bright)
        np.testing.assert_array_equal(store[k].edges, cv2.Canny(image, 100, 200))
    assert run(monkeypatch, "inspect-cache", "cache", "--verify") == 0


def test_worker_processes_know_a_teacher_from_outside(outside, monkeypatch):
    words = ("teacher-cache", "--data", ".", "--source", "frames:Frames", "--cache", "cache", "--name", "toy")
    assert run(monkeypatch, *words, "--teacher", "brightness:Brightness", "--workers", 1) == 0
    TeacherCache.open(outside / "cache" / "toy.zarr").require_complete()


def test_installed_packages_add_members_by_name(outside):
    info = outside / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[samfeat.teachers]\nbright = brightness:Brightness\n[samfeat.sources]\nvideo = frames:Frames\n"
    )
    sys.path.append(str(outside))
    assert make_teacher("bright", options={"level": 3}).provenance()["level"] == 3
    assert len(open_source(outside, kind="video")) == 3
    with pytest.raises(ValueError, match=r"choose one of classical, .*, bright, or give module:Class"):
        make_teacher("dark")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:Teacher", "there is no module 'absent_module', installed or in this folder"),
        ("brightness:Darkness", "the module 'brightness' has no 'Darkness'"),
        ("brightness:", "give module:Class, such as mine:Mine"),
        (":Brightness", "give module:Class, such as mine:Mine"),
        ("mine:Teacher", "No module named 'a_package_that_mine_needs'"),
    ],
)
def test_members_that_are_not_there(outside, name, message):
    (outside / "mine.py").write_text("import a_package_that_mine_needs\n")
    with pytest.raises((ValueError, ImportError), match=message):
        make_teacher(name)


def test_options_reach_the_teacher_and_wrong_ones_are_named(outside):
    assert make_teacher("classical", options={"min_area": 0.01}).min_area == 0.01
    with pytest.raises(ValueError, match="'classical' has no option 'level'; it has regions, min_area"):
        make_teacher("classical", options={"level": 1})
    with pytest.raises(ValueError, match="SAM has no option 'colour'; it has points_per_side"):
        make_teacher("sam_vit_b", options={"colour": 1}, checkpoint=outside / "sam.pth")
    with pytest.raises(ValueError, match="sam_vit_b needs SAM's weights"):
        make_teacher("sam_vit_b")


def test_words_become_options():
    words = ["level=0.5", "size=[3, 4]", "style=thinned", "on=true", "path=a=b"]
    assert parse_options(words) == {"level": 0.5, "size": [3, 4], "style": "thinned", "on": True, "path": "a=b"}
    for word in ("level", "=3", "a b=3"):
        with pytest.raises(ValueError, match="give key=value"):
            parse_options([word])
    with pytest.raises(ValueError, match="level is given twice"):
        parse_options(["level=1", "level=2"])


def test_a_teacher_with_other_parameters_is_made_again():
    teacher = ClassicalTeacher(min_area=0.01, scales=(1.0, 0.5, 2.0))
    assert ClassicalTeacher.rebuild(teacher.provenance()) == teacher


def test_every_name_leads_to_a_class():
    for name in TEACHERS:
        if name == "classical":
            assert make_teacher(name).name == name
        else:
            with pytest.raises(FileNotFoundError, match="absent"):
                make_teacher(name, checkpoint=Path("absent.pth"))
    assert list(SOURCES)[-1] == "folder"  # it recognises every folder
