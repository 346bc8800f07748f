"""JSON files that are read back: a dataclass says what one must hold."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_NAMES: dict[Any, str] = {
    **{dict: "an object", list: "a list", str: "a text"},
    **{int: "an integer", float: "a finite number", type(None): "null"},
}
_SHOWN = 40  # characters of a wrong value


def read_record(cls: type[T], path: Path) -> T:
    """Return the content of a JSON file as ``cls``; fields that ``cls`` does not know are left out.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is no JSON, lacks a field without a default, or a value has another type; the
            message names the field.
    """
    return parse_record(cls, path.read_text(encoding="utf-8"))


def parse_record(cls: type[T], text: str) -> T:
    """Return the content of a JSON text; see `read_record`.

    Raises:
        ValueError: As `read_record`.
    """
    try:
        return typing.cast(T, _parsed(cls, json.loads(text), "it"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parsed(kind: Any, value: Any, name: str) -> Any:
    """Return a JSON value as ``kind``, a dataclass or what JSON has, called ``name`` in errors."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        choices = [part for part in arguments if _is(value, _json_type(part))]
        if not choices:
            raise _wrong(name, " or ".join(_NAMES[_json_type(part)] for part in arguments), value)
        return _parsed(choices[0], value, name)
    if not _is(value, _json_type(kind)):
        raise _wrong(name, _NAMES[_json_type(kind)], value)
    if isinstance(origin, type) and dataclasses.is_dataclass(origin):
        hints = typing.get_type_hints(origin)
        for field in dataclasses.fields(origin):
            is_needed = field.default is field.default_factory is dataclasses.MISSING
            if is_needed and field.name not in value:
                raise ValueError(f"{name} has no {field.name!r}")
        return origin(**{k: _parsed(hints[k], value[k], k) for k in hints if k in value})
    if origin is dict and arguments:
        return {k: _parsed(arguments[1], v, f"{k!r} of {name}") for k, v in value.items()}
    if origin is list and arguments:
        return [_parsed(arguments[0], v, f"an entry of {name}") for v in value]
    return value


def _json_type(kind: Any) -> Any:
    """Return the type of the JSON value that holds a ``kind``."""
    origin = typing.get_origin(kind) or kind
    return dict if dataclasses.is_dataclass(origin) else origin


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _wrong(name: str, rule: str, value: Any) -> ValueError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} …"
    return ValueError(f"{name} must be {rule}, got {shown}")
