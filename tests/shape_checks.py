"""What jaxtyping's import hook calls a type checker: holds arguments and results to their shapes, and nothing else.

Other annotations are mypy's to check; their violations at run time have errors, and tests, of their own.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from typing import Any

from jaxtyping import AbstractArray


def check_arrays(function: Any) -> Any:
    """A function that raises TypeError where an array is not what its annotation says."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _hold(name, value, hints.get(name))
        result = function(*args, **kwargs)
        _hold("return", result, hints.get("return"))
        return result

    return checked


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    """Annotations as objects; names that exist for the type checker alone are left out."""
    found = {}
    for name, hint in inspect.get_annotations(function).items():
        try:
            found[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except NameError:
            continue
    return found


def _hold(name: str, value: Any, hint: Any) -> None:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    arrays = [choice for choice in choices if inspect.isclass(choice) and issubclass(choice, AbstractArray)]
    if arrays and not isinstance(value, choices):
        raise TypeError(f"{name} is {value!r}, not {hint}")
    if typing.get_origin(hint) is tuple and isinstance(value, tuple) and Ellipsis not in typing.get_args(hint):
        for part, element in zip(value, typing.get_args(hint), strict=True):
            _hold(name, part, element)
