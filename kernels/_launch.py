"""What every launch needs: may the kernels run here, on what geometry, in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
_TOKENS = 2**24
# Programs that a launch over chunks of the batch aims at: two rounds of two on each of the 132
# multiprocessors of an H100. More would only add partial sums.
PROGRAMS = 528
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Whether Triton's interpreter runs the kernels; a kernel learns it once, when it is defined.
INTERPRETING = bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def unsupported_device(device: torch.device | str) -> str | None:
    """Say why the kernels cannot run on ``device``; ``None`` if they can."""
    device = torch.device(device)
    if INTERPRETING:
        return None
    if device.type != "cuda":
        return f"the Triton kernels need an NVIDIA GPU, and the tensors are on {device}"
    if torch.version.hip is not None:
        return "the Triton kernels have not been proved on AMD GPUs"
    major, minor = capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0, and {device} has {major}.{minor}"
    return None


def unsupported_width(width: int) -> str | None:
    """Say why the kernels cannot take a head width d; ``None`` if they can."""
    if width in HEAD_DIMS:
        return None
    return (
        f"the Triton kernels need a head width d of {', '.join(map(str, HEAD_DIMS))}, got {width}"
    )


def unsupported_reason(query: Tensor, *shared: Tensor) -> str | None:
    """Say why the kernels cannot take these tensors; ``None`` if they can.

    Args:
        query: (B, h, N, d).
        shared: The tensors that must come without a batch: MLKA's key, LCA's key and value.
    """
    reason = unsupported_device(query.device)
    if reason is not None:
        return reason
    if any(tensor.dim() != 3 for tensor in shared):
        names = "a key" if len(shared) == 1 else "key and value"
        return f"the Triton kernels need {names} that the batch shares, (h, N, d)"
    reason = unsupported_width(query.shape[3])
    if reason is not None:
        return reason
    if query.shape[2] > _TOKENS:
        return f"the Triton kernels take at most {_TOKENS} tokens, got {query.shape[2]}"
    if INTERPRETING:
        if query.dtype == torch.bfloat16:
            return (
                "Triton's interpreter multiplies the bit patterns of bfloat16; test bfloat16 on a "
                "GPU, and float32, float64 or float16 in the interpreter"
            )
    elif query.dtype not in _FLOATS:
        return (
            "the Triton kernels compute in float32, float16 or bfloat16 on a GPU, "
            f"got {query.dtype}"
        )
    return None


@dataclass(frozen=True)
class Geometry:
    """A token grid and the reach of its windows, in tokens."""

    height: int
    width: int
    radius_y: int
    radius_x: int

    @staticmethod
    def of(grid: Sequence[int], window: Sequence[int]) -> Geometry:
        """Of a grid (H, W) and odd windows; no window reaches further than the grid."""
        (height, width), (rows, columns) = grid, window
        return Geometry(height, width, min(rows // 2, height - 1), min(columns // 2, width - 1))

    @property
    def tokens(self) -> int:
        """N = H·W."""
        return self.height * self.width

    def constants(self) -> dict[str, int]:
        """As constants of a kernel."""
        return {"H": self.height, "W": self.width, "RY": self.radius_y, "RX": self.radius_x}


def precision(dtype: torch.dtype) -> str:
    """Return how float32 products are computed; half-precision products have one way only.

    As PyTorch's own: TF32 where the user allowed it, else three TF32 products, which keep float32's
    accuracy on tensor cores.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made, see `recorded`."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_RECORDS: list[list[Launch]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them; their tensors may be on the meta device."""
    records: list[Launch] = []
    _RECORDS.append(records)
    try:
        yield records
    finally:
        _RECORDS.pop()


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    warps: int = 4,
    stages: int = 2,
    registers: int = 0,
    **constants: Any,
) -> None:
    """Launch ``programs`` programs of a kernel on the device of its first tensor."""
    options = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers
    if _RECORDS:
        _RECORDS[-1].append(Launch(kernel, programs, arguments, constants, options))
        return
    device = arguments[0].device
    # Triton launches on the current device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **options)


def addressable(tensor: Tensor) -> Tensor:
    """Return the tensor as the kernels address its rows; a copy only if it lies otherwise.

    Columns have unit stride, and the offsets within a block of at most 256 rows fit int32.
    """
    if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**31 // 256:
        return tensor
    return tensor.contiguous()
