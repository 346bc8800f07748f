"""Arithmetic on registers: arrays with one element per thread, unsigned, as wide as a register."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
S = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
F = {16: np.float16, 32: np.float32, 64: np.float64}


class Inexact:
    """Whether results err as the hardware's may: the approximate instructions, and tensor cores.

    Off, both are rounded correctly.
    """

    on = True


def dtype_of(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a PTX type; bfloat16 is the bits of one."""
    if name == "pred":
        return np.dtype(np.bool_)
    if name == "bf16":
        return np.dtype(np.uint16)
    return np.dtype({"b": U, "u": U, "s": S, "f": F}[name[0]][int(name[1:])])


def bf16_to_f32(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """Round to nearest even."""
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush_denormals(x: Array) -> Array:
    tiny = np.abs(x) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """Round once; the sum in float64 may round once more, by half of 2**-29 of an ulp."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def widen(x: Array, bits: int) -> Array:
    """Return ``x`` as unsigned and as wide as a register, with the sign of a signed type."""
    if x.dtype == np.bool_:
        return x
    if x.dtype.kind == "f":
        x = x.view(U[x.dtype.itemsize * 8])
    if x.dtype.itemsize * 8 < bits:
        x = x.astype(S[bits] if x.dtype.kind == "i" else U[bits])
    elif x.dtype.itemsize * 8 > bits:
        x = x.astype(U[bits])
    return x.view(U[bits])


def div(a: Array, b: Array) -> Array:
    """Divide integers, toward 0."""
    if a.dtype.kind == "u":
        return a // np.maximum(b, 1)
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.maximum(np.abs(wide_b), 1)
    return np.where((wide_a < 0) != (wide_b < 0), -quotient, quotient).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return a - div(a, b) * b


def high_product(a: Array, b: Array) -> Array:
    """Return the upper half of the product of uint64."""
    low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> s, b & low, b >> s
    middle = a1 * b0 + (a0 * b0 >> s)
    carry = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> s) + (carry >> s)


def shift_left(a: Array, n: Array) -> Array:
    bits = a.dtype.itemsize * 8
    n = n.astype(np.uint32)
    shifted = a << np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), shifted)


def shift_right(a: Array, n: Array) -> Array:
    """Shift; a signed type keeps its sign."""
    bits = a.dtype.itemsize * 8
    n = n.astype(np.uint32)
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(n >= bits, a.dtype.type(0), shifted)


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """Return a field of bits (``bfe``); a signed type's is filled with its uppermost bit."""
    bits = a.dtype.itemsize * 8
    word, one = U[bits], U[bits](1)
    position, length = position.astype(np.uint32) & 0xFF, length.astype(np.uint32) & 0xFF
    unsigned = a.view(word)
    # Ones in the lowest ``length`` bits.
    short = (one << np.minimum(length, bits - 1).astype(word)) - one
    ones = np.where(length >= bits, ~word(0), short)
    found = shift_right(unsigned, position) & ones
    if a.dtype.kind == "i":
        top = np.minimum(position + length - 1, bits - 1).astype(word)
        sign = (unsigned >> top) & one
        found = np.where((length > 0) & (sign == 1), found | ~ones, found)
    return found.astype(word).view(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Return four bytes chosen from eight (``prmt``)."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    pool = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pool >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
    return result


def add_halves(a: Array, b: Array) -> Array:
    """Add two 16-bit integers in each 32 bits."""
    a, b = np.broadcast_arrays(a, b)
    a, b = np.ascontiguousarray(a).view(np.uint16), np.ascontiguousarray(b).view(np.uint16)
    return (a + b).view(np.uint32)


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, a: Array, b: Array) -> Array:
    """Compare as ``setp.<name>``: of floats, one with ``u`` behind it holds of NaN as well."""
    if a.dtype.kind == "f":
        nan = np.isnan(a) | np.isnan(b)
        if name == "num":
            return ~nan
        if name == "nan":
            return nan
        if name.endswith("u") and name[:-1] in _COMPARISONS:
            return _COMPARISONS[name[:-1]](a, b) | nan
        return _COMPARISONS[name](a, b) & ~nan
    return _COMPARISONS[name](a, b)


def approximate(x: Array, error: float) -> Array:
    """Return float32 of ``x`` with a relative error of +- ``error``, if results are `Inexact`.

    The error is the worst that is documented, and the bits of the result choose its sign.
    """
    x = x.astype(np.float64)
    if Inexact.on:
        bits = x.view(np.uint64)
        mixed = (bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63)
        x = x * (1 + np.where(mixed, error, -error))
    return x.astype(np.float32)
