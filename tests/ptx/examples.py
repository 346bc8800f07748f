"""Small kernels with known results, to test the machine itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ptx.driver import machine_as_device

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TA: tl.constexpr,
    TB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c = a b; TA, TB: a, b are stored transposed."""
    pid = tl.program_id(0)
    i, j = pid // tl.cdiv(N, BN), pid % tl.cdiv(N, BN)
    m, n, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        at = start + k
        if TA:
            inside = (at < K)[:, None] & (m < M)[None, :]
            x = tl.trans(tl.load(a + at[:, None] * M + m[None, :], mask=inside, other=0.0))
        else:
            inside = (m < M)[:, None] & (at < K)[None, :]
            x = tl.load(a + m[:, None] * K + at[None, :], mask=inside, other=0.0)
        if TB:
            inside = (n < N)[:, None] & (at < K)[None, :]
            y = tl.trans(tl.load(b + n[:, None] * K + at[None, :], mask=inside, other=0.0))
        else:
            inside = (at < K)[:, None] & (n < N)[None, :]
            y = tl.load(b + at[:, None] * N + n[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=inside)


@triton.jit
def softmax_kernel(x, y, N, B: tl.constexpr, ROWS: tl.constexpr):
    """The softmax of some rows."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, B)
    inside = (c < N)[None, :]
    v = tl.load(x + r[:, None] * N + c[None, :], mask=inside, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 1)[:, None])
    found = (v / tl.sum(v, 1)[:, None]).to(y.dtype.element_ty)
    tl.store(y + r[:, None] * N + c[None, :], found, mask=inside)


@triton.jit
def columns_kernel(x, y, M, N: tl.constexpr, B: tl.constexpr):
    """Sums of rows by their number's remainder and of all, by atomics and across warps."""
    r = tl.program_id(0) * B + tl.arange(0, B)
    c = tl.arange(0, N)
    inside = (r < M)[:, None]
    v = tl.load(x + r[:, None] * N + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.atomic_add(y + c[None, :] + (r % 3)[:, None] * N, v, mask=inside, sem="relaxed")
    tl.atomic_add(y + 3 * N + c, tl.sum(v, 0), sem="relaxed")


@triton.jit
def tuples_kernel(x, strides, sizes, y, factors, B: tl.constexpr):
    """y = factor · x[:, shift:] with strides, sizes and factors as tuples, one with a 1 in it."""
    r, c = tl.program_id(0), tl.arange(0, B)
    inside = c < sizes[1]
    v = tl.load(x + r * strides[0] + c * strides[1], mask=inside, other=0.0).to(tl.float32)
    found = v * factors[0] + factors[1][0]
    tl.store(y + r * sizes[1] + c, found.to(y.dtype.element_ty), mask=inside)


def _draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _as_tf32(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -8192).view(torch.float32) if x.dtype == torch.float32 else x


def _matmul(shape: tuple[int, ...], transposed: tuple[bool, bool], dtype: torch.dtype):
    rows, columns, depth, bm, bn, bk, warps, stages = shape
    a, b = _draw(rows, depth, dtype=dtype), _draw(depth, columns, dtype=dtype)
    c = torch.empty(rows, columns)
    ta, tb = transposed
    programs = triton.cdiv(rows, bm) * triton.cdiv(columns, bn)
    matmul_kernel[(programs,)](
        a.T.contiguous() if ta else a, b.T.contiguous() if tb else b, c, rows, columns, depth,
        bm, bn, bk, ta, tb, "tf32" if dtype == torch.float32 else "ieee",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    exact = _as_tf32(a).double() @ _as_tf32(b).double()
    return c, exact, 2e-6 * float(exact.abs().max())


def _softmax(dtype: torch.dtype):
    x, y = _draw(12, 100, dtype=dtype), torch.empty(12, 100, dtype=dtype)
    softmax_kernel[(3,)](x, y, 100, 128, 4)
    exact = x.double().softmax(1)
    eager = float((x.softmax(1).double() - exact).abs().max())
    # The exponential and the division are not as exact as PyTorch's.
    return y, exact, 1.5 * eager + 2.0**-21 * float(exact.max())


def _columns(dtype: torch.dtype):
    x, y = _draw(100, 64, dtype=dtype), torch.zeros(4, 64)
    columns_kernel[(4,)](x, y, 100, 64, 32)
    rows = x.double()
    return y, torch.stack([*(rows[i::3].sum(0) for i in range(3)), rows.sum(0)]), 1e-5


def _tuples(dtype: torch.dtype):
    x, y = _draw(6, 40, dtype=dtype)[:, 3:], torch.empty(6, 37, dtype=dtype)
    tuples_kernel[(6,)](x, x.stride(), tuple(x.shape), y, (0.5, (2.0,)), 64)
    exact = x.double() * 0.5 + 2
    return y, exact, torch.finfo(dtype).eps * float(exact.abs().max())


# Rows, columns, depth, their blocks, warps and stages.
_PRODUCTS = (
    (100, 72, 80, 64, 64, 32, 4, 3),
    (64, 256, 64, 64, 128, 64, 4, 2),
    (128, 64, 64, 128, 64, 16, 8, 2),
    (64, 32, 128, 32, 32, 64, 4, 1),
    (128, 16, 64, 64, 16, 64, 4, 2),
)


def _examples() -> dict[str, Callable[[torch.dtype], tuple[Tensor, Tensor, float]]]:
    """Return by name what runs a kernel: its result, the exact one, and the largest difference."""
    found: dict[str, Any] = {"softmax": _softmax, "columns": _columns, "tuples": _tuples}
    for shape in _PRODUCTS:
        for name, transposed in (
            ("", (False, False)), ("-ta", (True, False)), ("-tb", (False, True)),
            ("-ta-tb", (True, True)),
        ):  # fmt: skip
            label = f"matmul-{'x'.join(map(str, shape[:3]))}{name}"
            found[label] = lambda dtype, s=shape, t=transposed: _matmul(s, t, dtype)
    return found


_EXAMPLES = _examples()


def names(dtype: str) -> list[str]:
    """Return the examples of a dtype; one product would take too much shared memory in float32."""
    return [name for name in _EXAMPLES if dtype != "fp32" or "64x256" not in name]


def check(name: str, arch: str, dtype: str) -> dict[str, Any]:
    """Run an example and return whether its result is right, with nothing found."""
    with machine_as_device(arch) as log:
        actual, exact, allowed = _EXAMPLES[name](_DTYPES[dtype])
    error = float((actual.double() - exact).abs().max())
    findings = [f"{kernel}: {f}" for kernel, f in log.findings(mild=False)]
    products = sorted({op for run in log.runs for op in run.executed if "mma" in op})
    return {
        "ok": error <= allowed and not findings,
        "error": error,
        "allowed": allowed,
        "findings": findings,
        "products": products,
    }
