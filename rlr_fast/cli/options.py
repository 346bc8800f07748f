"""Command-line options from dataclass fields and YAML files: flags over file over preset."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from rlr_fast.config import RLRConfig, TrainConfig, Window, from_dict, short_windows, suggest


class UsageError(Exception):
    """A mistake of the user: shown in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint about an unknown flag or choice says what exists."""

    def __init__(self, **options: Any) -> None:
        # Abbreviations would turn a mistyped flag into another one silently.
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` instead of printing and leaving."""
        raise UsageError(f"{message}\nSee {self.prog} --help")

    def flags(self) -> list[str]:
        """Return every flag of this parser."""
        return [flag for action in self._actions for flag in action.option_strings]


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, False) or "default" in text:
            return text
        value = action.default
        if isinstance(value, (tuple, list)):
            value = " ".join(map(str, value))
        return f"{text} (default: {value})".replace("%", "%%")


def flag(name: str) -> str:
    """Return a field's flag: ``batch_size`` → ``--batch-size``."""
    return "--" + name.replace("_", "-")


def add_fields(parser: argparse.ArgumentParser, cls: type[RLRConfig] | type[TrainConfig]) -> None:
    """Add a flag for each field of a configuration dataclass; what is not given is absent."""
    group = parser.add_argument_group("model" if cls is RLRConfig else "recipe")
    hints, texts = typing.get_type_hints(cls), _attributes(cls)
    for item in dataclasses.fields(cls):
        default: Any = item.default
        if item.name == "windows":
            default = tuple(short_windows(default))
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        text = f"{texts[item.name]} (paper: {default})".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        hint = hints[item.name]
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "type": _reader(typing.get_args(hint)[0])}
            options["metavar"] = item.name.upper()
        else:
            kind = _reader(hint)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(flag(item.name), dest=item.name, **options)


def _attributes(cls: type) -> dict[str, str]:
    """Return what a dataclass's docstring says of each field."""
    section = inspect.getdoc(cls).partition("Attributes:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {n: " ".join(t.split()) for n, t in zip(entries[::2], entries[1::2], strict=True)}


def _reader(hint: Any) -> Any:
    if hint == Window:
        return window
    return str if typing.get_origin(hint) is typing.Literal else hint


def window(text: str) -> Window:
    """Read a window: ``5``, or ``5x7`` (height x width)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0], sides[-1]


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def sides(text: str) -> tuple[int, int]:
    """Read pixels: ``1024``, or ``512x1024`` (height x width), of at least 0."""
    values = [int(side) for side in text.lower().split("x")]
    if len(values) > 2 or min(values) < 0:
        raise argparse.ArgumentTypeError(
            f"must be a side, or height x width such as 512x1024, got {text!r}"
        )
    return values[0], values[-1]


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of flags, ``batch-size: 16`` or ``batch_size: 16``.

    Raises:
        UsageError: It is missing, broken, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config: {path!r} is not UTF-8 text") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        reason = " ".join(str(error).split())
        raise UsageError(f"--config: {path!r} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config: {path!r} must hold flags and values, e.g. 'epochs: 20'")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse ``argv``; values of a ``--config`` file stand where a flag is not given.

    Raises:
        UsageError: An unknown flag, or a value that does not fit.
    """
    args, rest = parser.parse_known_args(argv)
    chosen = getattr(args, "parser", parser)
    for word in rest:
        if word.startswith("--"):
            raise UsageError(f"unknown flag {word.split('=')[0]}; {suggest(word, chosen.flags())}")
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}\nSee {chosen.prog} --help")
    if getattr(args, "config", None) is not None:
        _apply_file(chosen, args, argv)
    for name in getattr(args, "needs", ()):
        if getattr(args, name) is None:
            raise UsageError(f"{flag(name)} is needed\nSee {chosen.prog} --help")
    return args


def _apply_file(parser: Parser, args: argparse.Namespace, argv: Sequence[str]) -> None:
    known = {action.dest: action for action in parser._actions if action.option_strings}
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    for name, value in read_yaml(args.config).items():
        if name not in known or name in ("help", "config"):
            names = [flag(n)[2:] for n in known if n not in ("help", "config")]
            raise UsageError(f"--config: unknown flag {name!r}; {suggest(name, names)}")
        action = known[name]
        if given.isdisjoint(action.option_strings):
            setattr(args, name, _checked(action, value))


def _checked(action: argparse.Action, value: Any) -> Any:
    """Hold a file's value to its flag's type and choices."""
    name = action.option_strings[0]
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    values = value if isinstance(value, (list, tuple)) else [value]
    if not many and len(values) != 1:
        raise UsageError(f"--config: {name} takes one value, got {value!r}")
    wanted = action.nargs if isinstance(action.nargs, int) and action.nargs > 0 else None
    if many and (not values or (wanted is not None and len(values) != wanted)):
        count = "one value or more" if wanted is None else f"{wanted} values"
        raise UsageError(f"--config: {name} takes {count}, got {value!r}")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"--config: {name} is true or false, got {value!r}")
        return value
    read = action.type if callable(action.type) else str
    try:
        result = [tuple(v) if isinstance(v, list) else read(str(v)) for v in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"--config: {name} does not take {value!r}") from error
    if action.choices is not None and any(v not in action.choices for v in result):
        raise UsageError(f"--config: {name} has no choice {value!r}; {_choices(action.choices)}")
    return result if many else result[0]


def _choices(choices: Iterable[Any]) -> str:
    return "known: " + ", ".join(map(str, choices))


T = TypeVar("T", RLRConfig, TrainConfig)


def config_from(args: argparse.Namespace, cls: type[T], base: Mapping[str, Any] | T) -> T:
    """Return the configuration of ``cls``: ``base`` with the flags that were given.

    Raises:
        UsageError: A field breaks its rule.
    """
    given = {
        item.name: getattr(args, item.name)
        for item in dataclasses.fields(cls)
        if hasattr(args, item.name)
    }
    try:
        start = from_dict(cls, base) if isinstance(base, Mapping) else base
        return from_dict(cls, given, start)
    except ValueError as error:
        raise UsageError(f"{error}") from error
