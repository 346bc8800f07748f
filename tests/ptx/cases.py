"""What the machine runs: every kernel, on grids, windows and inputs that take it another way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

DTYPES = ("bf16", "fp16", "fp32")
ARCHES = ("80", "90")


@dataclass(frozen=True)
class Attention:
    """One of the attention operators, forward and backward.

    Attributes:
        operator: ``"mlka"`` or ``"lca"``.
        grid: (H, W) in tokens.
        window: Height and width.
        width: d of a head.
        heads: h.
        batch: B.
        scale: Of the queries: large ones leave MLKA's bound of scores.
        mixed: Whether only every other image has large queries.
        offset: Of the size of what all keys have in common, which moves every score alike.
        programs: That a launch over the batch aims at: few walk over several images each.
        strided: Whether query, key, value and output gradient lie between others in memory.
        shared_value: Whether MLKA's value is without a batch.
        tf32: Whether float32 may be multiplied as TF32; such a case is for float32 alone.
        deterministic: Whether PyTorch's deterministic algorithms are asked for.
    """

    operator: str
    grid: tuple[int, int]
    window: int
    width: int
    heads: int = 2
    batch: int = 3
    scale: float = 1.0
    mixed: bool = False
    offset: float = 0.0
    programs: int | None = None
    strided: bool = False
    shared_value: bool = False
    tf32: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Block:
    """Both operators of a block at once, with their shared preparation of keys."""

    deterministic: bool = False


@dataclass(frozen=True)
class Distance:
    """The distance of tokens of so many channels; ``strided``: that lie otherwise in memory."""

    channels: int
    strided: bool = False


Case = Attention | Block | Distance


@dataclass(frozen=True)
class _Shape:
    """An attention case before operator and mode: see `Attention`."""

    grid: tuple[int, int]
    window: int
    width: int
    operators: tuple[str, ...] = ("mlka", "lca")
    more: dict[str, object] = field(default_factory=dict)


def _shape(
    grid: tuple[int, int], window: int, width: int, *operators: str, **more: object
) -> _Shape:
    return _Shape(grid, window, width, operators or ("mlka", "lca"), more)


_SHAPES = {
    "16x16-w5-d64": _shape((16, 16), 5, 64),
    "16x16-w5-d64-online": _shape((16, 16), 5, 64, scale=12.0),
    "16x16-w5-d64-mixed": _shape((16, 16), 5, 64, scale=12.0, mixed=True),
    "16x16-w5-d64-chunks": _shape((16, 16), 5, 64, heads=1, batch=21, programs=2),
    "9x13-w5-d16": _shape((9, 13), 5, 16),
    "9x13-w5-d16-online": _shape((9, 13), 5, 16, scale=24.0),
    "9x13-w5-d16-chunks": _shape((9, 13), 5, 16, batch=20, programs=4, strided=True),
    "8x8-w11-d16": _shape((8, 8), 11, 16),
    "5x5-w11-d16": _shape((5, 5), 11, 16),
    "24x24-w11-d16": _shape((24, 24), 11, 16, batch=2),
    "24x24-w11-d16-mixed": _shape((24, 24), 11, 16, "mlka", batch=2, scale=12.0, mixed=True),
    "32x32-w7-d32": _shape((32, 32), 7, 32, batch=2),
    "16x16-w5-d128": _shape((16, 16), 5, 128, heads=1, batch=2),
    "9x13-w5-d32-online": _shape((9, 13), 5, 32, scale=16.0),
    "9x13-w5-d128-online": _shape((9, 13), 5, 128, heads=1, scale=10.0),
    "20x20-w17-d16-raster": _shape((20, 20), 17, 16, "lca"),
    "11x37-w15-d64-raster": _shape((11, 37), 15, 64, "lca", heads=1, batch=2),
    "9x13-w5-d16-shared": _shape(
        (9, 13), 5, 16, "mlka", batch=5, programs=4, shared_value=True
    ),
    "9x13-w5-d64-tf32": _shape((9, 13), 5, 64, tf32=True),
    "16x16-w11-d64": _shape((16, 16), 11, 64, heads=1, batch=2),
    "31x37-w7-d32": _shape((31, 37), 7, 32, heads=1, batch=2),
    "3x1-w13-d16-offset": _shape((3, 1), 13, 16, "mlka", batch=2, strided=True, offset=20.0),
}  # fmt: skip


def _cases() -> Iterator[tuple[str, Case]]:
    for label, shape in _SHAPES.items():
        for operator in shape.operators:
            for mode in ("", "-deterministic"):
                yield (
                    f"{operator}-{label}{mode}",
                    Attention(
                        operator, shape.grid, shape.window, shape.width,
                        deterministic=bool(mode), **shape.more,  # type: ignore[arg-type]
                    ),
                )  # fmt: skip
    yield "block", Block()
    yield "block-deterministic", Block(deterministic=True)
    for channels, strided in ((64, False), (100, True), (37, False), (256, False)):
        yield f"distance-{channels}{'-strided' if strided else ''}", Distance(channels, strided)


CASES: dict[str, Case] = dict(_cases())

# What the tests run, by architecture and dtype: every kernel on both, with atomic and with
# deterministic sums, with and without a row's maximum, and in each dtype on one at least.
_BOTH = (
    "mlka-9x13-w5-d16-chunks", "lca-9x13-w5-d16-chunks", "lca-20x20-w17-d16-raster-deterministic",
)  # fmt: skip
CHOICE = {
    "80": {
        "bf16": (*_BOTH, "lca-16x16-w11-d64"),
        "fp16": ("mlka-9x13-w5-d16-chunks", "lca-9x13-w5-d16-chunks"),
        "fp32": (
            "mlka-9x13-w5-d16", "lca-9x13-w5-d16-deterministic",
            "distance-37", "distance-100-strided",
        ),
    },
    "90": {
        "bf16": (*_BOTH, "block", "mlka-16x16-w5-d64-mixed", "distance-37"),
        "fp32": (
            "block-deterministic", "mlka-9x13-w5-d16", "mlka-3x1-w13-d16-offset", "distance-37",
        ),
    },
}  # fmt: skip


def random_case(random: np.random.Generator) -> Attention:
    """Return an attention case on a grid of up to 18 × 18 tokens; the rest is random, too."""
    grid = (int(random.integers(1, 19)), int(random.integers(1, 19)))
    operator = str(random.choice(["mlka", "lca"]))
    chunks = random.random() < 0.3
    return Attention(
        operator,
        grid,
        window=2 * int(random.integers(0, 8)) + 1,
        width=int(random.choice([16, 32, 64, 128])),
        heads=int(random.integers(1, 3)),
        batch=int(random.integers(6, 12) if chunks else random.integers(1, 4)),
        # Products of query and key up to a thousand: nearly all the weight lies on one key.
        scale=float(10 ** random.uniform(-3, 2)),
        mixed=bool(random.random() < 0.3),
        offset=float(10 ** random.uniform(0, 2)) if random.random() < 0.3 else 0.0,
        programs=int(random.integers(1, 5)) if chunks else None,
        strided=bool(random.random() < 0.5),
        shared_value=operator == "mlka" and bool(random.random() < 0.2),
        deterministic=bool(random.random() < 0.5),
    )


def applies(case: Case, dtype: str) -> bool:
    """Return whether a case is for a dtype."""
    return dtype == "fp32" or not getattr(case, "tf32", False)
