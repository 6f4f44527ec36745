"""Run the documentation's fenced code blocks, page by page, on what `make demo` left behind.

    python tests/run_docs.py [--demo demo] [page ...]

Blocks of a page are run in order, in a folder of its own that holds the demo: `bash` blocks each in a shell with the
variables of those before, `python` blocks each in an interpreter. Lines that install packages are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("hloc-and-colmap", "toolboxes", "gallery")))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that can be run."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r"^pip install.*\n", "", text, flags=re.MULTILINE)) for language, text in found]


def run_page(page: Path, demo: Path) -> int:
    """Run a page's blocks; returns how many failed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    variables, failed = "", 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(demo.resolve())
        (Path(folder) / "hubconf.py").symlink_to(ROOT / "hubconf.py")
        for language, text in blocks(page):
            first = text.strip().splitlines()[0] if text.strip() else "(nothing)"
            print(f"== {page.name}: {first}", flush=True)
            if language == "bash":
                variables += "".join(re.findall(r"^[A-Z]+=.*\n", text, re.MULTILINE))
                command = ["bash", "-euc", variables + text]
            else:
                command = [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=folder, env=environment)
            failed += done.returncode != 0
    return failed


def main() -> None:
    """Run the pages, and say how many blocks failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "demo")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    options = parser.parse_args()
    if not (options.demo / "run" / "weights.safetensors").is_file():
        sys.exit(f"{options.demo} holds no trained student: run `make demo` first")
    failed = sum(run_page(page, options.demo) for page in options.pages)
    sys.exit(f"{failed} blocks failed" if failed else 0)


if __name__ == "__main__":
    main()
