"""LCA's forward kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch, mlka
from rlr_fast.kernels._choice import choose, problem_of, with_smaller_tiles
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.lca._halo import (
    constants_of,
    load_halo,
    one_hot_position,
    position_rows,
    powers,
    programs_of,
    row_pointers,
    saves_nothing,
)

# Where the powers of a row, taken without its maximum, have a sum in this range, none has
# overflowed, and what those below 2**-126 err by, or a hidden key's 2**-126 on the FMA units adds,
# is less than 2**-57 of the sum, all 2**8 keys together: exact to rounding.
_LEAST_SUM = tl.constexpr(2.0**-60)
_LARGEST_SUM = tl.constexpr(2.0**60)
# Share of the powers of two that the FMA units compute in bfloat16, of 8.
_FMA_EXP2_EIGHTHS = 1


@triton.jit
def _attend(
    q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b, choice,
    IMAGES: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
    LESS_MAXIMUM: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Store the output of images ``first … last - 1``; return whether all sums were in range."""
    in_range = tl.full(exists.shape, True, tl.int1)
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        p_a, p_b, row_sum = powers(
            q_tile, halo_a, halo_b, choice, HALO_B, PRECISION, LESS_MAXIMUM, FMA_EXP2_EIGHTHS
        )
        # NaN is in no range.
        in_range = in_range & (row_sum >= _LEAST_SUM) & (row_sum <= _LARGEST_SUM)
        out = dot(p_a.to(q_tile.dtype), halo_a[1], None, PRECISION)
        if HALO_B:
            out = dot(p_b.to(q_tile.dtype), halo_b[1], out, PRECISION)
        out = out * (1.0 / row_sum)[:, None]
        tl.store(o_pointers, out.to(o_pointers.dtype.element_ty), mask=row_mask)
        q_pointers += q_step
        o_pointers += o_step
    return tl.min(in_range.to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def forward_kernel(
    q, k, v, o, q_strides, k_strides, v_strides, o_strides, batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, IMAGES: tl.constexpr,
    HALO_A: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
    TRY_WITHOUT_MAXIMUM: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Output of the positions of one tile and ``chunk`` images; head fastest.

    Heads lie side by side in memory: at d = 16 a row is one sector, and the neighboring head's
    program takes the next. The halo is HALO_A + HALO_B keys, as powers of two fit it closer.

    With TRY_WITHOUT_MAXIMUM the softmax takes no maximum of a row, which is a fifth of the
    instructions and lets the FMA units take a share of the powers. A program that finds a row's sum
    out of range does its images again with it.
    """
    BLOCK_M: tl.constexpr = IMAGES * PH * PW
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    tiles: tl.constexpr = (H + PH - 1) // PH * tiles_x
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    tile = pid // heads % tiles
    i_c = pid // heads // tiles
    i_y, i_x = tile // tiles_x, tile % tiles_x
    image, token, exists = position_rows(i_y, i_x, PH, PW, H, W, BLOCK_M)
    halo_a = load_halo(
        k, v, k_strides, v_strides, i_h, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    halo_b = halo_a
    if HALO_B:
        halo_b = load_halo(
            k, v, k_strides, v_strides, i_h, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
    choice = one_hot_position(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    first = i_c * chunk
    last = tl.minimum(first + chunk, batch)
    q_pointers = row_pointers(q, q_strides, i_h, first + image, token, D)
    o_pointers = row_pointers(o, o_strides, i_h, first + image, token, D)
    q_step = tl.cast(IMAGES, tl.int64) * q_strides[0]
    o_step = tl.cast(IMAGES, tl.int64) * o_strides[0]
    done = False
    if TRY_WITHOUT_MAXIMUM:
        done = _attend(
            q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b,
            choice, IMAGES, HALO_B, PRECISION, False, FMA_EXP2_EIGHTHS,
        )  # fmt: skip
    if not done:
        _attend(
            q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b,
            choice, IMAGES, HALO_B, PRECISION, True, 0,
        )  # fmt: skip


@with_smaller_tiles
def launch_forward(
    q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, geometry: Geometry
) -> Tensor:
    """Write the output into ``o`` (B, h, N, d), of any strides but the last.

    Returns:
        What backward needs beside the arguments: nothing, or lse (B, h, N) of a large window.
    """
    batch, heads, _, width = q.shape
    if not saves_nothing(q, geometry):
        return mlka.launch_forward(q, k, bound, v, o, geometry, inside=True)
    saved = torch.empty((0,), dtype=_launch.accumulator(q.dtype), device=q.device)
    if batch == 0:
        return saved
    problem = problem_of("halo_forward", q, geometry)
    tile = choose(problem)
    if tile is None:
        mlka.launch_forward(q, k, bound, v, o, geometry, inside=True)
        return saved
    places, chunk, chunks = programs_of(q, geometry, tile)
    _launch.launch(
        forward_kernel, heads * places * chunks,
        q, k, v, o, q.stride()[:3], k.stride()[:2], v.stride()[:2], o.stride()[:3],
        batch, heads, chunk, problem=problem, tiles=tile,
        **constants_of(geometry, tile, width, q.dtype),
        # Float16 has no weight of 2**60. Float32's products, and the memory of wider heads, take
        # longer than the powers. Float64 tests in the interpreter what bfloat16 does on a GPU.
        TRY_WITHOUT_MAXIMUM=q.dtype in (torch.bfloat16, torch.float64) and width <= 32,
        # The cubic of exp2 is exact to bfloat16's rounding, not to float32's or float16's.
        FMA_EXP2_EIGHTHS=_FMA_EXP2_EIGHTHS if q.dtype == torch.bfloat16 else 0,
    )  # fmt: skip
    return saved
