"""The documentation names commands, options, presets and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from samfeat import cli
from samfeat.pipelines.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "teacher_cache" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


def commands(page: Path) -> list[str]:
    """Lines of code blocks, indented or fenced, that call samfeat-cli or make."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and re.match(r"\s*(samfeat-cli|make)\b", line):
            lines.append(re.sub(r"\s+#.*$", "", line).strip())
    return lines


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


def test_every_page_is_read():
    assert {"README.md", "reproduce.md", "evaluation.md"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_and_options_exist(page, line, monkeypatch):
    monkeypatch.setattr("samfeat.student.weights.find_weights", Path)  # the weights of the examples are not here
    words = shlex.split(re.sub(r"\[[^\]]*\]", "", line))
    if words[0] == "make":
        verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        names = re.findall(r"^([A-Z]+)\s*\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words[1:]:
            assert word.split("=")[0] in (names if "=" in word else verbs), word
        return
    group = get_command(cli.app)
    name, command, rest = group.resolve_command(typer.Context(group), words[1:])
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(typer.Context(command), rest)
    with command.make_context(name, list(rest)) as context:
        preset, overrides = context.params.get("preset", "default"), context.params.get("overrides")
    if name == "train":
        load_config(preset, overrides or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
