"""Matrix fragments as the PTX ISA lays them out in registers and shared memory.

Products are exact, their sum with the accumulator is exact to float64 and then cut off to float32
(toward 0), as tensor cores do; they cut off the addends as well, which is not imitated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx.alu import Array, Inexact, bf16_to_f32
from tests.ptx.findings import Unsupported


def cut_off(x: Array) -> Array:
    """Return float32 of float64, rounded toward 0, or to nearest where nothing is `Inexact`."""
    near = x.astype(np.float32)
    if not Inexact.on:
        return near
    too_far = np.abs(near.astype(np.float64)) > np.abs(x)
    if too_far.any():
        near = np.where(too_far & np.isfinite(x), np.nextafter(near, np.float32(0)), near)
    return near


def values(x: Array, kind: str) -> Array:
    """Return float64 of elements: uint16 of bf16 and f16, uint32 of tf32 less its 13 low bits."""
    if kind == "bf16":
        return bf16_to_f32(x).astype(np.float64)
    if kind == "f16":
        return x.view(np.float16).astype(np.float64)
    return (x & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def fragment_a(registers: Sequence[Array], kind: str) -> Array:
    """Return (warps, 16, k) of four registers."""
    x = np.stack(registers)
    warps = x.shape[1] // 32
    if kind == "tf32":  # register 2·(k half) + row half
        x = x.reshape(2, 2, warps, 8, 4).transpose(2, 1, 3, 0, 4).reshape(warps, 16, 8)
    else:
        x = np.ascontiguousarray(x).view(np.uint16).reshape(2, 2, warps, 8, 4, 2)
        x = x.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
    return values(np.ascontiguousarray(x), kind)


def fragment_b(registers: Sequence[Array], kind: str) -> Array:
    """Return (warps, k, 8) of two registers."""
    x = np.stack(registers)
    warps = x.shape[1] // 32
    if kind == "tf32":
        x = x.reshape(2, warps, 8, 4).transpose(1, 0, 3, 2).reshape(warps, 8, 8)
    else:
        x = np.ascontiguousarray(x).view(np.uint16).reshape(2, warps, 8, 4, 2)
        x = x.transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
    return values(np.ascontiguousarray(x), kind)


def fragment_c(registers: Sequence[Array]) -> Array:
    """Return (warps, 16, 2·registers) of float32 accumulators: 4 registers for each 8 columns."""
    n = len(registers) // 4
    x = np.stack(registers).view(np.float32)
    warps = x.shape[1] // 32
    x = x.reshape(n, 2, 2, warps, 8, 4).transpose(3, 1, 4, 0, 5, 2)
    return x.reshape(warps, 16, 8 * n)


def registers_of_c(x: Array) -> list[Array]:
    """Return the registers of accumulators (warps, 16, columns): the inverse of `fragment_c`."""
    warps, _, columns = x.shape
    n = columns // 8
    x = x.reshape(warps, 2, 8, n, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(4 * n, warps * 32)
    return [np.ascontiguousarray(r).view(np.uint32) for r in x]


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory as ``wgmma`` is told of it: bytes, and the kind of swizzling."""

    start: int
    lead: int
    stride: int
    base: int
    swizzle: int

    @staticmethod
    def of(bits: int) -> Descriptor:
        """Return the descriptor of a 64-bit register."""
        return Descriptor(
            start=(bits & 0x3FFF) << 4,
            lead=(bits >> 16 & 0x3FFF) << 4,
            stride=(bits >> 32 & 0x3FFF) << 4,
            base=bits >> 49 & 7,
            swizzle=bits >> 62 & 3,
        )

    def addresses(self, extent: int, k: int, size: int, transposed: bool) -> Array:
        """Return the address (extent, k) of each element of ``size`` bytes.

        These are the canonical layouts of the PTX ISA; swizzling exchanges the address bits 4 to 6
        by the bits 7 to 9.

        Args:
            extent: M or N of the product.
            k: Its K.
            size: Bytes of an element.
            transposed: Whether M or N, and not K, is contiguous.
        """
        if self.base:
            raise Unsupported("a descriptor with a base offset")
        t = 16 // size
        x, i = np.arange(extent)[:, None], np.arange(k)[None, :]
        width = {0: 16, 1: 128, 2: 64, 3: 32}[self.swizzle]
        if not transposed:
            if self.swizzle == 0:
                offset = x % 8 * 16 + x // 8 * self.stride + i % t * size + i // t * self.lead
            else:
                offset = x % 8 * width + x // 8 * self.stride + i * size
        elif self.swizzle == 0:
            offset = x % t * size + x // t * self.stride + i % 8 * 16 + i // 8 * self.lead
        else:
            chunk = width // size  # elements of a swizzled row
            offset = x % chunk * size + x // chunk * self.lead
            offset = offset + i % 8 * width + i // 8 * self.stride
        at = self.start + offset
        mask = {0: 0, 1: 7, 2: 3, 3: 1}[self.swizzle]
        return at ^ ((at >> 7 & mask) << 4)
