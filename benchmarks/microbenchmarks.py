"""What the design of the kernels rests on, measured on the GPU by small Triton kernels.

``python -m benchmarks.microbenchmarks``: the rate of matrix products as narrow as a head, the
ceiling of powers of two with and without the FMA units, whether products and powers overlap, and
the throughput of float32 atomics. Every kernel's result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from benchmarks import parallel, record
from rlr_fast.kernels._softmax import exp2

_REPEATS = 20


@triton.jit
def products_kernel(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """``steps`` times acc += A Bᵀ, with A (M, K) and B (N, K) kept at hand."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a_tile = tl.load(a + rows[:, None] * K + depth[None, :])
    b_tile = tl.load(b + columns[:, None] * K + depth[None, :])
    acc = tl.zeros((M, N), tl.float32)
    for _ in range(steps):
        acc = tl.dot(a_tile, tl.trans(b_tile), acc)
    offsets = tl.program_id(0).to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(out + offsets, acc)


@triton.jit
def overlap_kernel(
    q, k, v, out, steps, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    POWERS: tl.constexpr, PRODUCTS: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr,
):  # fmt: skip
    """The heart of an attention without its loads: S = Q Kᵀ, P = 2^S, O += P V."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q_tile = tl.load(q + rows[:, None] * D + depth[None, :])
    k_tile = tl.load(k + columns[:, None] * D + depth[None, :])
    v_tile = tl.load(v + columns[:, None] * D + depth[None, :])
    acc = tl.zeros((M, D), tl.float32)
    s = tl.dot(q_tile, tl.trans(k_tile))
    for i in range(steps):
        if PRODUCTS:
            # Another tile each time, or the compiler would move the product out of the loop.
            s = tl.dot(q_tile, tl.trans(k_tile), tl.zeros((M, N), tl.float32) + i * 1e-6)
        if POWERS:
            s = exp2(-s, FMA_EXP2_EIGHTHS)
        if PRODUCTS:
            acc = tl.dot(s.to(v_tile.dtype), v_tile, acc)
    if not PRODUCTS:
        acc = tl.dot(s.to(v_tile.dtype), v_tile, acc)
    offsets = tl.program_id(0).to(tl.int64) * M * D + rows[:, None] * D + depth[None, :]
    tl.store(out + offsets, acc)


@triton.jit
def atomics_kernel(out, tiles, steps, M: tl.constexpr, D: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program adds, or stores, ``steps`` tiles (M, D) of ones; programs share tiles."""
    offsets = tl.arange(0, M)[:, None] * D + tl.arange(0, D)[None, :]
    ones = tl.full((M, D), 1.0, tl.float32)
    for i in range(steps):
        # A stride that is odd visits every tile of a power of two.
        tile = (tl.program_id(0) * 977 + i * 613) % tiles
        pointers = out + tile.to(tl.int64) * M * D + offsets
        if ATOMIC:
            tl.atomic_add(pointers, ones, sem="relaxed")
        else:
            tl.store(pointers, ones)


def seconds_of(launch: Callable[[], object]) -> float:
    """Median device time of a launch."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _require_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"the kernel errs by {error:.1e}, allowed {tolerance:.0e}")


def products(width: int, depth: int, warps: int = 4, rows: int = 64) -> dict[str, Any]:
    """Rate of bf16 products (rows, depth) × (depth, width)."""
    programs, steps = 132 * 12, 4096
    a = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(width, depth, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(programs, rows, width, device="cuda")

    def launch(steps: int = steps) -> None:
        products_kernel[(programs,)](
            a, b, out, steps, M=rows, N=width, K=depth, num_warps=warps, num_stages=1
        )

    launch(2)
    _require_equal(out[-1], 2 * a.float() @ b.float().T, 1e-3)
    seconds = seconds_of(launch)
    rate = 2 * rows * width * depth * steps * programs / seconds
    return {"value": rate / 1e12, "unit": "TFLOP/s"}


def powers(fma_exp2_eighths: int) -> dict[str, Any]:
    """Rate of powers of two, of which ``fma_exp2_eighths`` of eight are made by the FMA units.

    In the registers of a product's result, whose columns the compiler knows: only there does the
    split leave no power computed twice.
    """
    rows, columns, programs, steps = 64, 128, 132 * 8, 2048
    q, k, v = (
        torch.randn(n, 16, device="cuda", dtype=torch.bfloat16) * 0.3
        for n in (rows, columns, columns)
    )
    out = torch.empty(programs, rows, 16, device="cuda")

    def launch(steps: int = steps) -> None:
        overlap_kernel[(programs,)](
            q, k, v, out, steps, M=rows, N=columns, D=16, POWERS=True, PRODUCTS=False,
            FMA_EXP2_EIGHTHS=fma_exp2_eighths, num_warps=4, num_stages=1,
        )  # fmt: skip

    launch(2)
    weights = torch.exp2(-torch.exp2(-(q.float() @ k.float().T)))
    _require_equal(out[-1], weights @ v.float(), 2e-2)
    seconds = seconds_of(launch)
    for _ in range(int(1 / seconds) + 1):
        launch()
    clock = record.megahertz("clocks.sm")  # while a second of work runs
    torch.cuda.synchronize()
    rate = rows * columns * steps * programs / seconds
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    found: dict[str, Any] = {"value": rate / 1e12, "unit": "T powers/s"}
    if clock is None:
        return found
    per_clock = rate / (1e6 * clock) / processors
    return found | {"clock_mhz": clock, "per_clock_and_sm": per_clock}


def overlap(width: int, fma_exp2_eighths: int) -> dict[str, Any]:
    """Whether products and powers of an attention overlap: 1 is wholly, 0 is not at all."""
    rows, keys, programs, steps = 64, 128, 132 * 8, 1024
    q, k, v = (
        torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.3 for n in (rows, keys, keys)
    )
    out = torch.empty(programs, rows, width, device="cuda")

    def launcher(powers: bool, products: bool, steps: int = steps) -> Callable[[], object]:
        return lambda: overlap_kernel[(programs,)](
            q, k, v, out, steps, M=rows, N=keys, D=width, POWERS=powers, PRODUCTS=products,
            FMA_EXP2_EIGHTHS=fma_exp2_eighths, num_warps=4, num_stages=1,
        )  # fmt: skip

    launcher(True, True, 1)()
    _require_equal(out[-1], torch.exp2(-(q.float() @ k.float().T)) @ v.float(), 2e-2)
    exp_only, dot_only, both = (
        seconds_of(launcher(*what)) for what in ((True, False), (False, True), (True, True))
    )
    scores = rows * keys * steps * programs
    return {
        "value": (exp_only + dot_only - both) / min(exp_only, dot_only),
        "unit": "overlap",
        "scores_per_s": {
            "powers": scores / exp_only,
            "products": scores / dot_only,
            "both": scores / both,
        },
    }


def atomics(megabytes: int, atomic: bool) -> dict[str, Any]:
    """Rate of float32 additions, or stores, of tiles spread over a buffer."""
    rows, width, programs, steps = 64, 16, 132 * 8, 512
    tiles = megabytes * 2**20 // (rows * width * 4)
    out = torch.zeros(tiles, rows, width, device="cuda")

    def launch() -> None:
        atomics_kernel[(programs,)](out, tiles, steps, M=rows, D=width, ATOMIC=atomic, num_warps=4)

    launch()
    total = float(out.sum(dtype=torch.float64))
    if atomic and total != rows * width * programs * steps:
        raise RuntimeError(f"the atomics sum to {total}")
    kernel = atomics_kernel.warmup(
        out, tiles, steps, M=rows, D=width, ATOMIC=atomic, num_warps=4, grid=(programs,)
    )
    text = kernel.asm.get("ptx", "")
    seconds = seconds_of(launch)
    return {
        "value": rows * width * 4 * programs * steps / seconds / 1e12,
        "unit": "TB/s of float32",
        "vectors_of_four": ".v4.f32" in text,
    }


def copy() -> dict[str, Any]:
    """Bandwidth of a large device copy, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source))
    return {"value": 2 * source.nbytes / seconds / 1e12, "unit": "TB/s"}


def matrix_product() -> dict[str, Any]:
    """Rate of a large bf16 matrix product of PyTorch's."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"value": 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12, "unit": "TFLOP/s"}


def measurements() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield what is measured, by name, the most useful first."""
    for fma_exp2_eighths in (0, 2, 3, 4):
        yield (
            f"powers of two, {fma_exp2_eighths}/8 on the FMA units",
            partial(powers, fma_exp2_eighths),
        )
    for width, depth in ((16, 16), (16, 64), (16, 128), (64, 16), (128, 16), (64, 64), (128, 128)):
        yield (
            f"products 64 × {depth} × {width} (rows, depth, columns)",
            partial(products, width, depth),
        )
    yield "products 128 × 128 × 16, 8 warps", partial(products, 16, 128, 8, 128)
    for fma_exp2_eighths in (0, 2):
        yield (
            f"products and powers overlap, d = 16, {fma_exp2_eighths}/8",
            partial(overlap, 16, fma_exp2_eighths),
        )
    yield "products and powers overlap, d = 64, 0/8", partial(overlap, 64, 0)
    for megabytes in (4, 32, 256):
        for atomic in (True, False):
            kind = "atomic additions" if atomic else "stores"
            yield f"{kind} over {megabytes} MiB", partial(atomics, megabytes, atomic)
    yield "device copy", copy
    yield "matrix product 8192³ bf16", matrix_product


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record; return 1 where something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.microbenchmarks", description=__doc__
    )
    record.add_record_option(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU to measure", file=sys.stderr)
        return 1
    recorder = record.Recorder(options.record)
    failed = 0
    for name, measure in measurements():
        result: dict[str, Any] = {"suite": "microbenchmarks", "name": name}
        try:
            result |= {"outcome": "ok", **measure()}
            print(f"{name:60} {result['value']:9.3f} {result['unit']}", flush=True)
        except (RuntimeError, TritonError) as error:
            failed = 1
            result |= {"outcome": "failed", "reason": parallel.reason(error)}
            print(f"{name:60} {result['reason']}", flush=True)
        recorder.add(result)
    recorder.close()
    return failed


if __name__ == "__main__":
    sys.exit(main())
