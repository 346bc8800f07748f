"""What every launch needs: may the kernels run here, on what geometry, in which precision."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

HEAD_DIMS = (16, 32, 64, 128)
_TOKENS = 2**24
# Programs that a launch over chunks of the batch aims at, where set; else see `chunk_programs`.
PROGRAMS: int | None = None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Bytes of shared memory that a program may use, by compute capability.
SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


# Whether Triton's interpreter runs the kernels; a kernel learns it once, when it is defined.
INTERPRETING = bool(triton.knobs.runtime.interpret)


def constant_when_traced(function: Any) -> Any:
    """Mark a function as `torch.compiler.assume_constant_result` does, and return it.

    That one imports the compiler, which takes seconds, wherever it is used.
    """
    function._dynamo_marked_constant = True
    return function


@constant_when_traced
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


class Target(NamedTuple):
    """What the choice of tiles and of chunks knows of a GPU.

    Attributes:
        architecture: Compute capability, e.g. 86 for 8.6.
        shared: Bytes of shared memory that a program may use.
        processors: Multiprocessors.
    """

    architecture: int
    shared: int
    processors: int

    @staticmethod
    def of(architecture: int) -> Target:
        """Return the target of an architecture of `SHARED`, with an H100's multiprocessors."""
        return Target(architecture, SHARED[architecture], 132)


@functools.cache
def target(device: torch.device) -> Target:
    """Return what is known of a device; any but a CUDA device stands for an H100."""
    if device.type != "cuda" or INTERPRETING:
        return Target.of(90)
    major, minor = capability(device)
    known: Any = torch.cuda.get_device_properties(device)
    shared, processors = known.shared_memory_per_block_optin, known.multi_processor_count
    return Target(10 * major + minor, shared, processors)


# Triton's own functions of these names are made for kernels, and take 2.7 µs on the host.


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def chunk_programs(device: torch.device, per_processor: int) -> int:
    """Return how many programs a launch over chunks of the batch aims at.

    Args:
        device: The GPU.
        per_processor: Programs for each of its multiprocessors. More leave fewer idle when the last
            ones run, and add partial sums.
    """
    if PROGRAMS is not None:
        return PROGRAMS
    return per_processor * target(device).processors


def unsupported_device(device: torch.device | str) -> str | None:
    """Say why the kernels cannot run on ``device``; ``None`` if they can."""
    device = torch.device(device)
    if INTERPRETING:
        return None
    if device.type != "cuda":
        return f"the Triton kernels need an NVIDIA GPU, and the tensors are on {device}"
    if torch.version.hip is not None:
        return "the Triton kernels have not been tested on AMD GPUs"
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


class Geometry(NamedTuple):
    """A token grid and the reach of its windows, in tokens."""

    height: int
    width: int
    radius_y: int
    radius_x: int

    @staticmethod
    def of(grid: Sequence[int], window: Sequence[int]) -> Geometry:
        """Of a grid (H, W) and odd windows; no window reaches further than the grid."""
        (height, width), (rows, columns) = grid, window
        # Plain integers: a graph that is being traced has one for each geometry.
        height, width, rows, columns = (int(x) for x in (height, width, rows, columns))
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

    As PyTorch's own: TF32 where the user allowed it, by whichever of its interfaces, else three
    TF32 products, which keep float32's accuracy on tensor cores.
    """
    if dtype != torch.float32:
        return "ieee"
    # The older `torch.get_float32_matmul_precision` raises where the newer interface was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


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


# What a pass of the compiler that fails says, in a RuntimeError.
_PASS_FAILED = "PassManager::run failed"


class LaunchRefused(RuntimeError):
    """The compiler or the GPU refuses a kernel, and nothing of it has run.

    Attributes:
        problem: What its tiles were chosen for, a `rlr_fast.kernels.tiles.Problem`; ``None`` where
            there are no others to choose from.
        tiles: Those that are refused.
    """

    def __init__(self, reason: str, problem: Any = None, tiles: Any = None) -> None:
        super().__init__(reason)
        self.problem, self.tiles = problem, tiles


class _Instead(threading.local):
    """What a thread does in place of launching."""

    records: list[Launch] | None = None
    compiles = False


_INSTEAD = _Instead()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record this thread's launches, and make none; their tensors may be on the meta device."""
    before, _INSTEAD.records = _INSTEAD.records, []
    try:
        yield _INSTEAD.records
    finally:
        _INSTEAD.records = before


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Compile and load what this thread launches, and run nothing; tensors may have no memory."""
    before, _INSTEAD.compiles = _INSTEAD.compiles, True
    try:
        yield
    finally:
        _INSTEAD.compiles = before


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    problem: Any = None,
    tiles: Any = None,
    warps: int = 4,
    stages: int = 2,
    registers: int = 0,
    **constants: Any,
) -> None:
    """Launch ``programs`` programs of a kernel on the device of its first tensor.

    Args:
        kernel: A function under ``triton.jit``.
        programs: How many.
        arguments: Of the kernel.
        problem: What the tiles were chosen for, see `rlr_fast.kernels._choice.choose`.
        tiles: Those that were chosen.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        registers: Most registers a thread; 0 is no limit.
        constants: The kernel's constants.

    Raises:
        LaunchRefused: The kernel does not compile, or needs more than the GPU has.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers
    made = Launch(kernel, programs, arguments, constants, options)
    if _INSTEAD.records is not None:
        _INSTEAD.records.append(made)
        return
    device = arguments[0].device
    try:
        # Triton launches on the current device.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            (_compile if _INSTEAD.compiles else _start)(made)
    except InterpreterError:  # a mistake in a kernel
        raise
    except (TritonError, RuntimeError) as error:
        if not isinstance(error, TritonError) and _PASS_FAILED not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{kernel.__name__}: {lines[0] if lines else type(error).__name__}"
        raise LaunchRefused(reason, problem, tiles) from error


def _start(made: Launch) -> None:
    made.kernel[(made.programs,)](*made.arguments, **made.constants, **made.options)


def _compile(made: Launch) -> None:
    if INTERPRETING:
        return
    # Triton takes a dtype for a tensor of that dtype whose memory is aligned.
    arguments = (x.dtype if isinstance(x, Tensor) else x for x in made.arguments)
    compiled = made.kernel.warmup(
        *arguments, grid=(made.programs,), **made.constants, **made.options
    )
    # Loads it, which is when a GPU refuses what is too large for it.
    compiled.run  # noqa: B018


def addressable(tensor: Tensor) -> Tensor:
    """Return the tensor as the kernels address its rows; a copy only if it lies otherwise.

    Columns have unit stride, and the offsets within a block of at most 256 rows fit int32.
    """
    if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**31 // 256:
        return tensor
    return tensor.contiguous()
