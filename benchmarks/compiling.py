"""A recorded launch compiled without a GPU, as a launch on a device would compile it."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import sass
from rlr_fast.kernels import _launch
from rlr_fast.kernels._launch import Launch

ARCHES = (*map(str, _launch.SHARED), "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The most shared memory of one program; more compiles, and fails when launched.
LARGEST_SHARED = {str(arch): most for arch, most in _launch.SHARED.items()} | {"gfx942": 64 * 1024}

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# An argument's name, or with the index of an element of a tuple.
Place = str | tuple[str, int]


def specialization(
    launch: Launch,
) -> tuple[dict[str, str | tuple[str, ...]], dict[Place, Any], list[Place]]:
    """Types, constants and what is divisible by 16, by argument, as Triton finds them at a launch.

    1 is a constant, and multiples of 16 are known as such, but for arguments that a kernel leaves
    out of its specialization. The elements of a tuple are arguments of their own.
    """
    constants: dict[Place, Any] = {}
    constants.update(launch.constants)
    divisible: list[Place] = []

    def kind(place: Place, value: Any, special: bool) -> str:
        if isinstance(value, Tensor):
            named = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            named, aligned = "fp32", False
        elif value is None or (value == 1 and special):
            constants[place] = value
            return "constexpr"
        else:
            named = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned and special:
            divisible.append(place)
        return named

    signature: dict[str, str | tuple[str, ...]] = {}
    for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
        name, special = parameter.name, not parameter.do_not_specialize
        if isinstance(value, tuple):
            kinds = (kind((name, i), element, special) for i, element in enumerate(value))
            signature[name] = tuple(kinds)
        else:
            signature[name] = kind(name, value, special)
    return signature, constants, divisible


def compile_launch(launch: Launch, arch: str) -> triton.compiler.CompiledKernel:
    """Compile as a launch on a device would."""
    signature, constants, divisible = specialization(launch)
    return sass.compile_kernel(
        launch.kernel,
        signature,
        constants,
        arch=int(arch) if arch.isdigit() else arch,
        divisible=divisible,
        **launch.options,
    )


def tiles_of(launch: Launch) -> str:
    """Say the tiles of a launch in a word or two."""
    c = launch.constants
    if "IMAGES" in c:
        parts = "+".join(str(c[name]) for name in ("HALO_A", "HALO_B") if c[name])
        return f"{c['PH']}x{c['PW']}x{c['IMAGES']} halo {parts}"
    if "BLOCK_M" in c and "BLOCK_N" in c:
        blocks = f"x{c['BLOCKS']}" if "BLOCKS" in c else ""
        more = [f"fma {c['FMA_EXP2_EIGHTHS']}/8"] if "FMA_EXP2_EIGHTHS" in c else []
        more += [f"dQ {c['DQ']}"] if "DQ" in c else []
        return " ".join([f"{c['BLOCK_M']}x{c['BLOCK_N']}{blocks}", *more])
    return "x".join(str(c[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK", "HALO") if name in c)


def version() -> str:
    """Triton's, as major.minor: what the counts depend on."""
    return ".".join(triton.__version__.split(".")[:2])
