"""Both attentions of a block between its two matrix products, without a copy.

    output = [MLKA(q_mlka, k_mlka, v_mlka) | LCA(q_lca, k_lca, v_lca)]

projected (B, N, 3C) holds [q_mlka | v_mlka | q_lca] as one product of the tokens leaves them; the
output (B, N, 2C) is what one product with both output maps takes. The kernels read and write these
by strides. The keys (2h, N, d) are MLKA's heads, then LCA's, as `prepare_key` leaves them; the
value (h, N, d) is LCA's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_fast.kernels import _launch, lca, mlka
from rlr_fast.kernels._autograd import register_gradients
from rlr_fast.kernels._launch import Geometry


def _split(rows: Tensor, heads: int, width: int) -> tuple[Tensor, ...]:
    """Views (B, h, N, d) of the parts of (B, N, parts·h·d)."""
    return rows.unflatten(2, (-1, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)


@torch.library.custom_op("rlr_fast::block_attention", mutates_args=())
def _forward(
    projected: Tensor, keys: Tensor, bound: Tensor, value: Tensor, grid: list[int],
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    projected, keys, value = map(_launch.addressable, (projected, keys, value))
    heads, tokens, width = value.shape
    batch, geometry = projected.shape[0], Geometry.of(grid, window)
    output = projected.new_empty((batch, tokens, 2 * heads * width))
    q_mlka, v_mlka, q_lca = _split(projected, heads, width)
    o_mlka, o_lca = _split(output, heads, width)
    k_mlka, k_lca = keys.chunk(2)
    b_mlka, b_lca = bound.chunk(2)
    lse = mlka.launch_forward(q_mlka, k_mlka, b_mlka, v_mlka, o_mlka, geometry, inside=False)
    saved = lca.launch_forward(q_lca, k_lca, b_lca, value, o_lca, geometry)
    return output, lse, saved


@_forward.register_fake
def _(
    projected: Tensor, keys: Tensor, bound: Tensor, value: Tensor, grid: list[int],
    window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, tokens, width = value.shape
    batch, exact = projected.shape[0], _launch.accumulator(projected.dtype)
    rows = (batch, heads, tokens)
    query = projected.new_empty((batch, heads, tokens, width))
    saves_nothing = lca.saves_nothing(query, Geometry.of(grid, window))
    return (
        projected.new_empty((batch, tokens, 2 * heads * width)),
        projected.new_empty(rows, dtype=exact),
        projected.new_empty((0,) if saves_nothing else rows, dtype=exact),
    )


@torch.library.custom_op("rlr_fast::block_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, projected: Tensor, keys: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    saved: Tensor, grid: list[int], window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, projected, keys, value = map(_launch.addressable, (grad, projected, keys, value))
    heads, _, width = value.shape
    geometry = Geometry.of(grid, window)
    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    q_mlka, v_mlka, q_lca = _split(projected, heads, width)
    dq_mlka, dv_mlka, dq_lca = _split(d_projected, heads, width)
    o_mlka, o_lca = _split(output, heads, width)
    do_mlka, do_lca = _split(grad, heads, width)
    k_mlka, k_lca = keys.chunk(2)
    dk_mlka, _ = mlka.launch_backward(
        do_mlka, q_mlka, k_mlka, v_mlka, o_mlka, lse, dq_mlka, dv_mlka, geometry, inside=False
    )
    dk_lca, dv_lca = lca.launch_backward(
        do_lca, q_lca, k_lca, value, o_lca, saved, dq_lca, geometry
    )
    d_keys = torch.cat((dk_mlka, dk_lca)).to(keys.dtype)
    return d_projected, d_keys, dv_lca.to(value.dtype, copy=True)


register_gradients(_forward, _backward)


def block_attention(
    projected: Tensor,
    keys: Tensor,
    bound: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
) -> Tensor:
    """Return (B, N, 2C) of projected (B, N, 3C), prepared keys (2h, N, d), value (h, N, d)."""
    return _forward(projected, keys, bound, value, list(grid), list(window))[0]
