"""The keys of the training configuration as a table: value, source and meaning.

The meanings come from the dataclasses' docstrings, so each key is described only once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from samfeat.pipelines.config import load_config

ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)
ROLE = re.compile(r":\w+:`([^`]*)`")


class Key(NamedTuple):
    """One key of the configuration.

    Attributes:
        name: dotted, as on the command line.
        value: the current value.
        source: where it was set: ``default``, the preset or the ``command line``.
        meaning: what it does, in one line; empty if the docstring does not say.
    """

    name: str
    value: Any
    source: str
    meaning: str


def configuration_keys(preset: str = "default", overrides: Sequence[str] = ()) -> list[Key]:
    """Every key of a preset with overrides, in the order of the dataclasses.

    Raises:
        ValueError: as :func:`samfeat.pipelines.config.load_config`.
    """
    default, of_preset = dict(_leaves(load_config())), dict(_leaves(load_config(preset)))
    config = load_config(preset, overrides)
    meanings = _meanings(config)
    keys = []
    for name, value in _leaves(config):
        source = preset if value != default[name] else "default"
        source = "command line" if value != of_preset[name] else source
        keys.append(Key(name, value, source, meanings.get(name, "")))
    return keys


def reference(preset: str = "default", overrides: Sequence[str] = ()) -> str:
    """:func:`configuration_keys` as a table in Markdown."""
    rows = [("key", "value", "source", "meaning"), ("---",) * 4]
    rows += [(key.name, _text(key.value), key.source, key.meaning) for key in configuration_keys(preset, overrides)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]  # as YAML writes them
    return str(list(value) if isinstance(value, tuple) else value)


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        found += _leaves(value, f"{prefix}{entry.name}.") if is_dataclass(value) else [(prefix + entry.name, value)]
    return found


def _meanings(config: Any, prefix: str = "") -> dict[str, str]:
    """Meaning by dotted name, from the section ``Attributes:`` of each dataclass."""
    section = (inspect.getdoc(type(config)) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    parts = ENTRY.split(section)[1:]
    found = {
        prefix + name: " ".join(ROLE.sub(r"\1", text).replace("``", "").split())
        for names, text in zip(parts[::2], parts[1::2])
        for name in names.split(", ")
    }
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            found |= _meanings(value, f"{prefix}{entry.name}.")
    return found
