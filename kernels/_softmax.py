"""Powers of two and softmax steps, as device functions. Scores are in log2 units throughout."""

from __future__ import annotations

import triton
import triton.language as tl

# A row maximum starts here: finite, so that a row without keys gives exp2(-inf) = 0 and never NaN.
NO_MAXIMUM = tl.constexpr(-1e30)


@triton.jit
def exp2_on_fma(x):
    """``2**x`` for finite float32 x in [-126, 127] on the FMA units; relative error 7.5e-5.

    Adding 1.5·2²³ rounds x to an integer in the low bits of a float; a cubic covers the remaining
    [-½, ½], and the integer goes straight into its exponent.
    """
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    power = tl.fma(f, 0.055171669, 0.242611122)
    power = tl.fma(power, f, 0.693260985)
    power = tl.fma(power, f, 0.999928074)
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, FMA_EXP2_EIGHTHS: tl.constexpr, CLAMP: tl.constexpr = False):  # (M, N)
    """``2**x``, with FMA_EXP2_EIGHTHS of every eight column groups on the FMA units.

    The rest is on the MUFU. With CLAMP the FMA units take x of any size, as if it were the nearest
    number in [-126, 126].

    The special-function unit gives 16 powers a clock and multiprocessor, the FMA units 128
    operations: splitting the work lets both run. Columns go in groups of eight because a thread
    then knows at compile time which of its registers belong to which unit (a matrix fragment holds
    two neighboring columns of each group), and the unused half of the choice is never computed.
    """
    if FMA_EXP2_EIGHTHS == 0:
        return tl.exp2(x)
    group = tl.arange(0, x.shape[1]) // 8
    # Stride 3 spreads the groups, so that the two units alternate.
    on_fma = (group * 3) % 8 < FMA_EXP2_EIGHTHS
    bounded = tl.minimum(tl.maximum(x, -126.0), 126.0) if CLAMP else x
    return tl.where(on_fma[None, :], exp2_on_fma(bounded), tl.exp2(x))
