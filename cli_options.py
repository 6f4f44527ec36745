"""What more than one file of the command line uses."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")]


def must_exist(*paths: Path) -> None:
    """Refuse a path that is not there.

    Raises:
        FileNotFoundError: naming it.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
