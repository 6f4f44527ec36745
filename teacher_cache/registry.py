"""Look up plugins by name: built-in ones, those of installed packages, and any ``module:Class``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


def load_member(family: str, name: str, members: Mapping[str, str]) -> Any:
    """Look up the object with a name, importing its module.

    Args:
        family: kind of member, such as ``teacher``. Installed packages add members as entry points of the group
            ``samfeat.<family>s``.
        name: one of ``members``, an entry point, or ``module:Class``, where the module may also be in the current
            folder.
        members: ``module:Class`` of the built-in members, by name.

    Raises:
        ValueError: there is no such member.
    """
    if name not in members and ":" not in name:
        members = all_members(family, members)
        if name not in members:
            raise ValueError(f"unknown {family} {name!r}: choose one of {', '.join(members)}, or give module:Class")
    module, _, attribute = members.get(name, name).partition(":")
    if not (module and attribute):
        raise ValueError(f"{family} {name!r}: give module:Class, such as mine:Mine for the class Mine of mine.py")
    if name not in members and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not error.name or f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{family} {name!r}: there is no module {module!r}, installed or in this folder") from None
        raise
    except AttributeError:
        raise ValueError(f"{family} {name!r}: the module {module!r} has no {attribute!r}") from None


def all_members(family: str, members: Mapping[str, str]) -> dict[str, str]:
    """``members``, and those of installed packages: ``module:Class`` by name."""
    return {**members, **{point.name: point.value for point in entry_points(group=f"samfeat.{family}s")}}


def check_options(factory: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> None:
    """Raise ``ValueError`` unless ``factory`` accepts all ``options`` by name; ``what`` is its name in the message."""
    unknown = sorted(set(options) - set(accepted(factory, options)))
    if unknown:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        known = [each.name for each in inspect.signature(factory).parameters.values() if each.kind in kinds]
        raise ValueError(f"{what} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")


def accepted(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The subset of ``options`` that ``factory`` accepts by name."""
    parameters = inspect.signature(factory).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}
