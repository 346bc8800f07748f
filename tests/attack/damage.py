"""Ways to damage a file: its bytes, its text, and the values of its JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Random = np.random.Generator

# What a program wrote, a disk lost or a person typed in place of a value.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 10**9, -(10**9), 10**400, 0.5, 1e300, 1e-300),
    *(float("inf"), float("nan"), "", "x", "0", "../../outside", "/outside", "a\0b", "=1+1"),
    *([], {}, [1], [[1]], [None], ["x"], [1e300] * 3, {"x": 1}, {"0.5": 1.0}, [0.5] * 1000),
)
DEEP = 100_000


def damaged(random: Random, data: bytes) -> bytes:
    """Return a file's bytes, damaged in one of the ways that disks, networks and people have."""
    size = max(len(data), 1)
    start = int(random.integers(size))
    stop = min(size, start + int(random.integers(1, 65)))
    block = data[start:stop]
    ways = (
        lambda: data[:start],
        lambda: data[start:],
        lambda: b"",
        lambda: flipped(random, data, int(random.integers(1, 9))),
        lambda: flipped(random, data, 1, first=min(size, 64)),
        lambda: data[:start] + random.bytes(len(block)) + data[stop:],
        lambda: data[:start] + bytes(len(block)) + data[stop:],
        lambda: data[:start] + b"\xff" * len(block) + data[stop:],
        lambda: data[:start] + data[stop:],
        lambda: data[:stop] + block + data[stop:],
        lambda: data[:start] + random.bytes(len(block)) + data[start:],
        lambda: random.bytes(size),
        lambda: data + data,
    )
    return bytes(ways[int(random.integers(len(ways)))]())


def flipped(random: Random, data: bytes, count: int, first: int | None = None) -> bytes:
    """Return the bytes with ``count`` of them changed, among the ``first`` if that is given."""
    changed = bytearray(data)
    for place in random.integers(first or max(len(data), 1), size=count if data else 0):
        changed[place] ^= int(random.integers(1, 256))
    return bytes(changed)


def damaged_text(random: Random, data: bytes) -> bytes:
    """Return a text with a word or number of it replaced, or with damaged bytes."""
    if random.random() < 0.4:
        return damaged(random, data)
    words = data.split()
    if not words:
        return b"x"
    word = words[int(random.integers(len(words)))]
    new = str(VALUES[int(random.integers(len(VALUES)))])[:500].encode()
    return data.replace(word, new, int(random.integers(1, 3)))


def damaged_json(random: Random, data: bytes) -> bytes:
    """Return JSON with one of its values, keys or lists replaced, or a damaged text."""
    way = random.random()
    if way < 0.35:
        return damaged_text(random, data)
    if way < 0.37:
        return b"[" * DEEP + b"]" * DEEP
    if way < 0.39:
        return b'{"a":' * DEEP + b"1" + b"}" * DEEP
    try:
        values = json.loads(data)
        places = list(_places(values))
    except (ValueError, TypeError):  # a plain text
        return damaged_text(random, data)
    node, key = places[int(random.integers(len(places)))]
    if isinstance(node, dict) and random.random() < 0.2:
        del node[key]
    else:
        node[key] = VALUES[int(random.integers(len(VALUES)))]
    return json.dumps(values).encode()


def _places(node: Any) -> Any:
    """Yield every list or object with each of its keys."""
    if not isinstance(node, (dict, list)):
        raise TypeError
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
