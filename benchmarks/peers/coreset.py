"""PatchCore's coreset: the greedy k-centers of anomalib, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

# Points among which the next centers are looked for, and distances held at a time.
_POOL = 4096
_CHUNK = 2**26


def farthest_first(features: Tensor, count: int, first: int) -> list[int]:
    """Choose rows, each the one that is farthest from those chosen before.

    The distance of a row to its nearest center only falls. So the farthest of a pool of rows is the
    farthest of all for as long as it is farther than every row outside was when the pool was taken:
    centers are found in the pool, and the rows outside meet them later, many at a time, in one
    matrix product. The choice is that of a pass over all rows for each center, but for rounding.

    Args:
        features: Shape (N, C).
        count: Of rows to choose, 1 to N.
        first: The row to start with.

    Returns:
        The rows' indices, in the order of choice.
    """
    norms = features.square().sum(1)
    squares = torch.full_like(norms, torch.inf)
    chosen = new = [first]
    while True:
        _meet(squares, features, norms, new)
        if len(chosen) == count:
            return chosen
        pool, rows = squares.topk(min(_POOL, len(squares)))
        new = _choose(pool, features[rows], norms[rows], count - len(chosen))
        new = rows[new].tolist()
        chosen = chosen + new


def _meet(squares: Tensor, features: Tensor, norms: Tensor, centers: list[int]) -> None:
    """Lower the squared distances (N,) to those to the new centers."""
    rows = max(1, _CHUNK // len(centers))
    parts = zip(squares.split(rows), features.split(rows), norms.split(rows), strict=True)
    for nearest, part, norm in parts:
        products = torch.addmm(norms[centers], part, features[centers].T, alpha=-2)
        torch.minimum(nearest, products.amin(1) + norm, out=nearest)
    squares[centers] = -torch.inf  # none is chosen twice


def _choose(squares: Tensor, features: Tensor, norms: Tensor, count: int) -> list[int]:
    """Return up to `count` farthest rows of a pool, one at least, in the order of choice."""
    outside = squares[-1].item()
    new: list[int] = []
    while len(new) < count:
        row = int(squares.argmax())
        if new and squares[row] <= outside:
            break
        new.append(row)
        to_row = norms + norms[row] - 2 * (features @ features[row])
        squares = torch.minimum(squares, to_row)
        squares[row] = -torch.inf
    return new
