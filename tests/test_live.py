"""What the command line prints, on a terminal and elsewhere."""

import ast
import io
import logging
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from samfeat.pipelines import live

ROOT = Path(__file__).parents[1]
NAMES = ["m[/x].png", "q[red].png", "[bold]a[/bold]", "a\\", "b\\\\", "[link=x]", ":smile:", "{brace}"]


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None, highlight=False)
    monkeypatch.setattr(live, "console", console)
    return console.file


@pytest.mark.parametrize("name", NAMES)
def test_names_with_markup_are_shown_as_they_are(capsys, name):
    live.say("[bold]{name}[/]: {count} images, {error:.2f}", name=name, count=3, error=1.234)
    live.complain("[red]error: {name}[/]", name=name)
    live.note(name)
    out, err = capsys.readouterr()
    assert out == f"{name}: 3 images, 1.23\n{name}\n"
    assert err == f"error: {name}\n"


def test_bytes_and_control_characters_are_escaped(capsys):
    live.say("{name}", name="caf\udce9\x1b[31m\nnext")
    assert capsys.readouterr().out == "caf\\udce9\\x1b[31m\\nnext\n"


def test_long_lines_are_not_broken_without_a_terminal(capsys):
    live.say("{name}", name="x" * 300)
    live.show_table("| a | b |\n| --- | --: |\n| " + "y" * 200 + " | 2 |\n")
    assert max(map(len, capsys.readouterr().out.splitlines())) == 300


def test_tables_are_drawn_on_a_terminal_only(capsys, terminal):
    live.show_table("| method | MMA |\n| --- | --: |\n| sift | 41.5 |\n")
    assert "---" not in terminal.getvalue()
    assert re.search(r"sift\s+41\.5", terminal.getvalue())


def test_log_messages_are_lines(capsys):
    live.log_to_console()
    live.log_to_console()
    logging.getLogger("samfeat.pipelines.somewhere").info("shard %s", "[red]3")
    logging.getLogger("samfeat.pipelines.somewhere").warning("lost")
    assert capsys.readouterr() == ("shard [red]3\n", "lost\n")


def test_a_line_now_and_then_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL", 0.05)
    with live.progress_bar("matches[/]", rate="pairs/s") as bar:
        time.sleep(0.12)
        assert capsys.readouterr().out == ""  # nothing is known yet
        bar(100, 200)
        time.sleep(0.01)
        bar(150, 200)
        deadline = time.monotonic() + 5
        while not (out := capsys.readouterr().out) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert re.match(r"matches\[/\]: 150/200, [\d.e+]+ pairs/s, 0:00:0\d left\n", out)
    time.sleep(0.15)
    assert capsys.readouterr().out == ""  # it ends with the block


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a", 50, 200, 25, 10, False, "images/s"), "a: 50/200, 2.5 images/s, 0:01:00 left"),
        (("a", 2.5, 10, 2.5, 3600), "a: 2.5/10, 0.000694/s, 3:00:00 left"),
        (("a", 5e6, 375e6, 5e6, 2, True), "a: 5.0/375.0 MB, 2.5 MB/s, 0:02:28 left"),
        (("a", 0, 10, 0, 30), "a: 0/10"),
        (("a", 60, None, 50, 10, False, "frames/s"), "a: 60, 5 frames/s"),
    ],
)
def test_a_line_of_progress(arguments, line):
    assert live.progress_line(*arguments) == line


def test_a_terminal_gets_a_bar(terminal):
    with live.progress_bar("[red]x", rate="images/s") as bar:
        bar(1, 4)
        bar(4, 4)
    assert "[red]x" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_a_bar_without_an_end(terminal):
    with live.progress_bar("camera 0", rate="frames/s") as bar:
        bar(1, None)
        bar(2, None)
    assert "2/?" in terminal.getvalue()


def test_all_output_goes_through_templates():
    """Foreign strings cannot be read as markup: no f-string is printed, and only live.py owns consoles."""
    printers = {"say", "complain"}
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.parts[0] in ("tests", "build", "docs") or any(part.startswith(".") for part in place.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in printers and place.name != "live.py":
                assert isinstance(node.args[0], ast.Constant), (
                    f"{place}:{node.lineno} prints a string that is put together"
                )
            if place.name != "live.py":
                assert name not in ("print", "Console"), f"{place}:{node.lineno} prints by itself"
