"""Rules that settings obey, and the errors of those that break them."""

from __future__ import annotations

import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

LARGEST = 2**16
"""Of a side in pixels or a width: more is a slip, and no machine has the memory."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which names exist, and which of them was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def require_number(argument: str, value: float, least: float = -math.inf) -> None:
    """Check that a value is a finite number, and not below the least one."""
    rule = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
    # Not isfinite: a whole number may be too large for a float.
    is_finite = abs(value) <= sys.float_info.max
    require(is_finite and value >= least, argument, rule, value)


def require(ok: bool, argument: str, rule: str, value: object) -> None:
    """Raise the ValueError of a broken rule: the argument must be *rule*."""
    if not ok:
        raise ValueError(f"{argument} must be {rule}, got {argument}={value!r}")


def require_choice(argument: str, value: object, choices: Any) -> None:
    """Check that a value is one of a ``Literal``'s."""
    known = typing.get_args(choices)
    if value not in known:
        raise ValueError(f"{argument} has no choice {value!r}; {suggest(str(value), known)}")


def check_types(config: object) -> None:
    """Check that every field of a dataclass's instance has its type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _has_type(value, hint):
            raise ValueError(f"{name} must be of type {_type_name(hint)}, got {value!r}")


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if origin is Literal:  # the class itself names the choices where it is none of them
        return isinstance(value, str)
    if origin is tuple:  # a single value stands for every level
        part = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return all(_has_type(v, part) for v in value)
        return _has_type(value, part)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
