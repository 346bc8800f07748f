"""Groups of a network's levels, each averaged to one: ``2-5 6-9`` of a ViT's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from rlr_fast.models.backbone import Backbone

T = TypeVar("T")


def group(text: str) -> range:
    """Return the levels of ``"3"`` or ``"2-5"``; ValueError for anything else."""
    first, _, last = text.partition("-")
    levels = range(int(first), int(last or first) + 1)
    if not levels:
        raise ValueError(f"a group's first level must not be above its last, got {text!r}")
    return levels


class GroupedBackbone(Backbone):
    """A backbone that gives the mean of each group of the network's levels as one level.

    Args:
        name: As of `Backbone`, like all that is not said here.
        weights: As of `Backbone`.
        groups: Levels in rising order.
        image_size: As of `Backbone`.

    Attributes:
        levels: The levels of all groups.

    Raises:
        ValueError: Levels that do not rise, or a group of levels of unlike sizes.
    """

    groups: tuple[range, ...] = ()

    def __init__(
        self, name: str, weights: str, groups: Sequence[range], image_size: tuple[int, int]
    ) -> None:
        levels = tuple(level for members in groups for level in members)
        if any(low >= high for low, high in pairwise(levels)):
            raise ValueError(f"levels: must rise, got {levels}")
        super().__init__(name, weights, levels, image_size)
        self.levels, self.groups = levels, tuple(groups)
        sizes = self._grouped(zip(self.channels, self.grids, strict=True))
        for members, found in zip(groups, sizes, strict=True):
            if len(set(found)) > 1:
                raise ValueError(
                    f"levels: those of a group must have one size; {members[0]}-{members[-1]} of "
                    f"{name!r} have (channels, grid) {found}"
                )
        self.channels = tuple(found[0][0] for found in sizes)
        self.grids = tuple(found[0][1] for found in sizes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the mean map of each group; before there are groups, the map of each level."""
        maps = super().forward(images)
        if not self.groups:
            return maps
        return [torch.stack(m).mean(0) if len(m) > 1 else m[0] for m in self._grouped(maps)]

    def _grouped(self, values: Iterable[T]) -> list[list[T]]:
        """Split one value for each level into those of each group."""
        rest = iter(values)
        return [list(islice(rest, len(members))) for members in self.groups]
