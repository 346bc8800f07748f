"""What a product class is: how it is drawn, and how its material shows which defects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlr_fast.data.synthetic.canvas import Canvas
from rlr_fast.data.synthetic.noise import Stream

PART_DEFECTS = ("missing_part", "misplaced_part")
DEFECT_KINDS = ("scratch", "stain", "crack", "hole", "contamination", "colour_shift", *PART_DEFECTS)


def kinds_but(*missing: str) -> tuple[str, ...]:
    """Return all kinds of defects but those."""
    return tuple(kind for kind in DEFECT_KINDS if kind not in missing)


@dataclass(frozen=True)
class Fault:
    """One defect to make.

    Attributes:
        kind: one of `DEFECT_KINDS`.
        stream: of the defect alone, so that the rest of the picture stays as it was.
        severity: 0 (subtle) to 1 (obvious); scales sizes and contrasts.
    """

    kind: str
    stream: Stream
    severity: float

    def grow(self, low: float, high: float) -> float:
        """Return the value between ``low`` (subtle) and ``high`` (obvious)."""
        return low + (high - low) * self.severity

    def shift(self, low: float, high: float) -> tuple[float, float]:
        """Return how far (down, right) a part lies from its place, `grow` in some direction."""
        way = self.stream.uniform("way", 0, 2 * np.pi)
        distance = self.grow(low, high)
        return distance * float(np.sin(way)), distance * float(np.cos(way))


@dataclass(frozen=True)
class Product:
    """One class of the data set.

    Attributes:
        name: folder name.
        draw: fills a canvas from the picture's stream; handles the two part faults itself.
        kinds: the defects that this class can have.
        scratch: color code of freshly scratched material.
        inside: color code seen in a hole or crack.
        stains: color codes of what gets spilt on it.
        debris: color codes of particles and fibres found on it.
    """

    name: str
    draw: Callable[[Canvas, Stream, Fault | None], None]
    kinds: tuple[str, ...]
    scratch: str
    inside: str
    stains: tuple[str, ...]
    debris: tuple[str, ...]
