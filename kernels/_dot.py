"""Matrix products, as device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _upper(x):
    """The part of float32 x that TF32 holds."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b``, added to ``acc`` and in its dtype unless that is None; in the order of `tl.dot`.

    "tf32x3" is spelt out: Triton's own tests its sums for NaN, which takes half as many
    instructions again, and more registers. Tensor cores cut off what a sum has no room for, which
    over a long chain in one accumulator is a bias and no longer float32's accuracy; so the product
    has an accumulator of its own, where the small terms come first, and a plain addition, which
    rounds, adds it to ``acc``.
    """
    if PRECISION == "tf32x3":
        a_upper, b_upper = _upper(a), _upper(b)
        product = tl.dot(a - a_upper, b_upper, input_precision="tf32")
        product = tl.dot(a_upper, b - b_upper, product, input_precision="tf32")
        product = tl.dot(a_upper, b_upper, product, input_precision="tf32")
        return product if acc is None else acc + product
    elif acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
