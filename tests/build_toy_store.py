"""Stage one over toy crops as a command, for tests that need an interpreter of its own: STORE [option=value ...]

Options: those of :func:`killable_programs.build_store`, which says what is printed.
"""

from __future__ import annotations

import sys
from functools import partial

from killable_programs import build_store


def main(path: str, *options: str) -> None:
    given = dict(option.split("=") for option in options)
    numbers = {name: float(value) if name == "pause" else int(value) for name, value in given.items()}
    build_store(partial(print, flush=True), path, **numbers)


if __name__ == "__main__":
    main(*sys.argv[1:])
