"""Levels of a backbone and windows of attention: how they are written and read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rlr_fast.config.rules import require

Window = tuple[int, int]
Level = int | tuple[int, ...]
"""A level of the backbone, or consecutive ones whose mean is taken as one."""
PER_LEVEL = ("hidden", "heads", "windows", "patches", "components")
"""The fields of `RLRConfig` that hold a value per level and are not fitted."""


def window_pair(window: int | Sequence[int], argument: str = "window") -> Window:
    """Return a window as (height, width).

    Args:
        window: Tokens: a side, or (height, width).
        argument: What an error calls it.

    Raises:
        ValueError: ``window`` is neither an odd positive integer nor a pair of them.
    """
    pair = (window, window) if isinstance(window, int) else window
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(v) is int for v in pair):
        raise ValueError(
            f"{argument} must be an odd integer or a pair of them, got {argument}={window!r}"
        )
    if any(side < 1 or side % 2 == 0 for side in pair):
        raise ValueError(f"{argument} must be odd and positive, got {argument}={window!r}")
    return pair[0], pair[1]


def short_windows(windows: Iterable[Any]) -> list[Any]:
    """Return windows as files hold them: a square one, given as side or as pair, is its side."""
    pairs = map(window_pair, windows)
    return [height if height == width else (height, width) for height, width in pairs]


def level_name(level: Level) -> str:
    """Return a level as the command line takes it: 3, or 2-5 for the mean of four."""
    first, last = (level, level) if isinstance(level, int) else (level[0], level[-1])
    return str(first) if first == last else f"{first}-{last}"


def read_level(text: str) -> Level:
    """Return the level of a `level_name`.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", text)
    members = tuple(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else ()
    if not members:
        raise ValueError(f"must be a level, or the first and the last such as 2-5, got {text!r}")
    return members if len(members) > 1 else members[0]


def level_groups(indices: int | Iterable[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Return for each level of ``out_indices`` those of the network whose mean it is.

    Raises:
        ValueError: There is none, they do not rise, or a group is not of consecutive ones.
    """
    given = (indices,) if isinstance(indices, int) else tuple(indices)
    groups = [(level,) if isinstance(level, int) else tuple(level) for level in given]
    for group in groups:
        require(
            len(group) > 0 and group == tuple(range(group[0], group[-1] + 1)),
            "out_indices",
            "levels, or consecutive ones such as (2, 3, 4, 5) for their mean",
            indices,
        )
    require(len(groups) > 0, "out_indices", "at least one level", indices)
    members = [level for group in groups for level in group]
    # The network gives its levels in this order, whatever the order in which they are asked for.
    is_rising = members[0] >= 0 and all(a < b for a, b in itertools.pairwise(members))
    require(is_rising, "out_indices", "levels from 0 on, each above the one before", indices)
    return groups


def level_values(argument: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Repeat a single value for every level; check the number of several."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(values) == 1:
        values = values * levels
    require(
        len(values) == levels, argument, f"one value, or one for each of {levels} levels", value
    )
    return values


Value = TypeVar("Value")


def per_level(values: Sequence[Value], levels: int) -> Sequence[Value]:
    """Return a value for each level; a single one stands for all."""
    return tuple(values) * levels if len(values) == 1 else values
