"""The flags that several verbs share, as types of their parameters.

The settings of model, recipe and execution are the fields of the dataclasses in `rlr_fast.config`:
names, types, defaults and help texts stand there. A verb gets those that were given, by name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import docstring_parser
from cyclopts import CoercionError, Group, Parameter, Token

from rlr_fast import config

_PRESETS = ", ".join(f"{name} ({preset.about})" for name, preset in config.PRESETS.items())
_GROUPS = {
    title: Group(title, sort_key=place)
    for place, title in enumerate(("Model", "Recipe", "Execution"), 1)
}


def _whole(text: str) -> int:
    try:
        return int(text)  # the library would round 3.5
    except ValueError:
        raise ValueError(f"must be a whole number, got {text!r}") from None


def _side(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"must be a side in pixels, or height and width such as 512 1024, got {text!r}"
        ) from None


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ValueError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ValueError(f"must be above 0 and below 1, got {text!r}")
    return value


def _window(text: str) -> config.Window:
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(f"must be a side, or height x width such as 5x7, got {text!r}")
    return sides[0], sides[-1]


def _sides(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"must be a side, or height x width such as 512x1024, got {text!r}")
    return int(sides[0]), int(sides[-1])


def pair(flag: str, sides: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a flag that takes one side or both.

    Raises:
        ValueError: There are more, or one is no side of a picture.
    """
    if len(sides) > 2:
        raise ValueError(f"{flag} takes one side, or height and width, got {len(sides)} values")
    for side in sides:
        if not 0 < side <= config.LARGEST:
            raise ValueError(f"{flag} must be from 1 to {config.LARGEST}, got {side}")
    return sides[0], sides[-1]


def _value(read: Callable[[str], object], token: Token) -> object:
    """Return what a word says; an error names its flag, and the file where it stands in one."""
    try:
        return read(token.value)
    except ValueError as error:
        source = "" if token.source == "cli" else f" (from {token.source})"
        raise CoercionError(msg=f"{error}{source}", token=token) from error


def _one(read: Callable[[str], object]) -> Parameter:
    """Return how a flag is read that takes one word, whatever its type."""
    return Parameter(n_tokens=1, converter=lambda _, tokens: _value(read, tokens[0]))


def _several(read: Callable[[str], object]) -> Parameter:
    """Return how a flag is read that takes one word or more."""
    return Parameter(
        n_tokens=-1, converter=lambda _, tokens: tuple(_value(read, token) for token in tokens)
    )


# How fields are read whose types the library reads otherwise, or not at all.
_WHOLES = Annotated[tuple[int, ...], _several(_whole)]
_SIDES = Annotated[tuple[int, ...], _several(_side)]
_HINTS: dict[Any, Any] = {
    int: Annotated[int, _one(_whole)],
    int | None: Annotated[int, _one(_whole)],
    tuple[int, ...]: _WHOLES,
    tuple[config.Level, ...]: Annotated[tuple[str, ...], _several(config.read_level)],
    tuple[int, int]: _SIDES,  # a single number stands for both sides
    tuple[int, int] | None: Annotated[int, _one(_sides)],
    tuple[config.Window, ...]: Annotated[tuple[int, ...], _several(_window)],
}


# Flags that a command in use may name otherwise, and what they are called now.
OLDER_NAMES = {"--piece": "--micro-batch-size"}


def _settings(cls: type, group: str, *, without: Sequence[str] = ()) -> Any:
    """Return the type of a verb's parameter that takes the fields of a dataclass as flags.

    Args:
        cls: The dataclass; docstrings, its own and inherited, say what each field means.
        group: Title of the flags in the help.
        without: Fields that have no flag here.
    """
    about = {
        entry.arg_name: " ".join((entry.description or "").split())
        for base in reversed(cls.__mro__[:-1])
        for entry in docstring_parser.parse(base.__doc__ or "").params
    }
    hints = typing.get_type_hints(cls)
    older = {name: old for old, name in OLDER_NAMES.items()}
    fields = {}
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        default = field.default
        if isinstance(default, tuple):
            values = config.short_windows(default) if field.name == "windows" else default
            default = " ".join(map(str, values))
        hint = _HINTS.get(hints[field.name], hints[field.name])
        told = Parameter(
            help=about[field.name],
            alias=older.get(f"--{field.name.replace('_', '-')}"),
            show_default=False if default is None or default is False else str(default),
        )
        fields[field.name] = Annotated[hint, told]
    settings = TypedDict(cls.__name__, fields, total=False)  # type: ignore
    return Annotated[settings, Parameter(name="*", group=_GROUPS[group])]


# Settings that were given, by name. The others are those of a preset, a run or the dataclass.
if TYPE_CHECKING:
    Model = dict[str, Any]
    Recipe = dict[str, Any]
    Place = dict[str, Any]
    Execution = dict[str, Any]
    TrainExecution = dict[str, Any]
    InferenceExecution = dict[str, Any]
    Preset = str
    Sides = tuple[int, int]
    Level = config.Level
else:
    Model = _settings(config.RLRConfig, "Model")
    Recipe = _settings(config.TrainConfig, "Recipe")
    Place = _settings(config.ExecutionConfig, "Execution", without=["compile", "workers"])
    Execution = _settings(config.ExecutionConfig, "Execution", without=["compile"])
    TrainExecution = _settings(config.TrainExecution, "Execution")
    InferenceExecution = _settings(config.InferenceExecution, "Execution")
    Preset = Annotated[
        Literal[tuple(config.PRESETS)],
        Parameter(help=f"Where the settings start: {_PRESETS}.", show_default="paper"),
    ]
    Sides = Annotated[int, _one(_sides)]
    Level = Annotated[str, _one(config.read_level)]

NONE_GIVEN: dict[str, Any] = {}

Data = Annotated[Path, Parameter(help="Root folder of the data set.")]
Layout = Annotated[
    Literal["auto", "mvtec", "visa", "visa-converted", "loco", "btad", "folder"],
    Parameter(help="Layout of the data set; auto finds out which it is."),
]
Classes = Annotated[tuple[str, ...] | None, Parameter(help="Only these classes.")]
Whole = Annotated[int, _one(_whole)]
Positive = Annotated[int, _one(_positive)]
Pixels = _SIDES
Out = Annotated[Path, Parameter(help="Folder of the results.")]
Checkpoint = Annotated[
    str, Parameter(help="Folder of a run, or OWNER/NAME or OWNER/NAME@REVISION on the hub.")
]
BackboneWeights = Annotated[
    str,
    Parameter(
        help="Where to take the backbone's weights from now, if not from where training did."
    ),
]
Scale = Annotated[
    tuple[float, float],
    Parameter(
        help="Scores of the first color and of three quarters; by default from the run's images."
    ),
]
Alpha = Annotated[
    float,
    _one(_share),
    Parameter(
        help="Share of normal images that may be called anomalous; see calibrate.",
        show_default="0.05",
    ),
]
Pool = Annotated[
    bool,
    Parameter(
        help="Decide by all classes' calibration images together: alpha holds over their mix.",
        show_default=False,
        negative=(),
    ),
]
Class = Annotated[str, Parameter(name="--class", help="Class of the images.")]
Config = Annotated[
    Path, Parameter(help="YAML file of flags, such as 'workers: 2'; flags given here win.")
]
Switch = Annotated[bool, Parameter(show_default=False)]
Report = Annotated[Switch, Parameter(help="Write report.html, a page for a browser.", negative=())]
Quiet = Annotated[Switch, Parameter(help="Show no progress bars, and of training no plan.")]
