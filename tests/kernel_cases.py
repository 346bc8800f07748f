"""What tests of the kernels share: dtypes, small tiles, the comparison with the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import results
from gpu import ON_GPU
from tolerances import assert_within_budget, rounded_terms
from torch import Tensor

from rlr_fast.kernels.tiles import RasterTiles

# A GPU multiplies no float64 here, and the interpreter no bfloat16.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.float64, marks=pytest.mark.skipif(ON_GPU, reason="float64 is for the interpreter")
    ),
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="bfloat16 needs a GPU")
    ),
]


def small_raster_tiles(blocks: int = 1) -> dict[str, RasterTiles]:
    """Tiles of 16, so that a small grid has many of them and ragged ends."""
    tiles = RasterTiles(16, 16, blocks, stages=1)
    return {name: tiles for name in ("raster_forward", "raster_key", "raster_query")}


def check(operator: Callable[..., Tensor], inputs: list[Tensor], *args: Any) -> dict[str, Tensor]:
    """Compare the kernels with the definition, forward and backward."""
    actual = results(operator, inputs, *args, backend="triton")
    exact = results(operator, [x.double() for x in inputs], *args, backend="dense")
    if inputs[0].dtype == torch.float64:
        for name in actual:
            torch.testing.assert_close(
                actual[name], exact[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        return actual
    eager = results(operator, inputs, *args, backend="dense")
    terms = rounded_terms(inputs)
    for name in actual:
        assert_within_budget(name, actual[name], eager[name], exact[name], terms[name])
    return actual
