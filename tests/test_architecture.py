"""The house rules as tests: who may import whom, what may not stand in a file, what the format page promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from samfeat.teacher_cache.schema import POINTS, StoreSpec

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
SOURCES = [ROOT / name for name in TRACKED if name.endswith(".py") and not name.startswith("tests/")]


def test_import_contracts_hold():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("segment_anything", ["teacher_cache/teachers/sam.py"]),
        ("zarr", ["teacher_cache/store/zarr_arrays.py"]),
        ("dask", ["pipelines/workers.py"]),
        ("typer", ["cli.py"]),
    ],
)
def test_one_room_a_library(library, home):
    pattern = re.compile(rf"^\s*(import|from) {library}\b", re.MULTILINE)
    users = [str(path.relative_to(ROOT)) for path in SOURCES if pattern.search(path.read_text())]
    assert users == home


def test_the_student_knows_torch_itself_and_readers_and_writers_of_files():
    pattern = re.compile(r"^\s*(?:import|from) samfeat\.(\w+)", re.MULTILINE)
    for path in (ROOT / "student").glob("*.py"):
        assert set(pattern.findall(path.read_text())) <= {"student", "images", "files"}, path


def test_importing_the_package_is_light_and_its_names_are_there():
    program = (
        "import sys, samfeat\n"
        "assert not {'torch', 'zarr', 'cv2'} & set(sys.modules)\n"
        "assert all(getattr(samfeat, name) for name in samfeat.__all__)\n"
        "from samfeat import SAMFeat, TeacherCache, match"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_machine():
    allowed = {
        "github.com",
        "zarr-specs.readthedocs.io",
        "dl.fbaipublicfiles.com",
        "www.apache.org",
        "arxiv.org",
        "huggingface.co",
    }
    assert "README.md" in TRACKED
    for path in (ROOT / name for name in TRACKED):
        text = path.read_text(errors="replace")
        assert not re.search(r"(?<![\w.])/(work|root|tmp|home)/\w", text), path
        if path.name != "LICENSE":
            hosts = set(re.findall(r"https?://([\w.-]+\w)", text))
            assert {host for host in hosts if not host.startswith("127.")} <= allowed, (path, hosts)


def test_every_array_of_the_format_is_described():
    text = (ROOT / "teacher_cache" / "README.md").read_text()
    spec = StoreSpec(images=2, paired=True, image_size=(400, 400), embedding=(256, 64, 64), shard_images=2)
    for array in spec.arrays():
        row = next((line for line in text.splitlines() if line.startswith(f"| `{array.name}` |")), None)
        assert row is not None, array.name
        assert f"| {array.dtype} |" in row
        if array.dimensions[0] == "pair":
            assert str(POINTS) in row


def test_tests_import_no_tests():
    pattern = re.compile(r"^\s*(?:import|from) (?:tests\.)?test_\w+", re.MULTILINE)
    helpers_and_tests = [ROOT / name for name in TRACKED if name.startswith("tests/") and name.endswith(".py")]
    assert {str(path): found for path in helpers_and_tests if (found := pattern.findall(path.read_text()))} == {}
