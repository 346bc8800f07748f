"""The baselines: ways to compute an operator, or to bound it, that are timed on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import check
from benchmarks.shapes import OPERATORS, Inputs, Problem
from rlr_fast import functional
from rlr_fast.ops import dense

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_CUDA, _CPU, _ANY = ("cuda",), ("cpu",), ("cuda", "cpu")


class UnavailableError(RuntimeError):
    """A baseline cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Baseline:
    """One way to compute an operator.

    Attributes:
        name: Short name, of ids and tables.
        label: What it is, in a line, for people.
        build: (problem, device) → attend(query, key, value); done before any timing.
        devices: Device types where it makes sense.
        masked: False: it attends to every key, and is checked against that.
        backend: The attention backend to force while it runs.
    """

    name: str
    label: str
    build: Callable[[Problem, torch.device], Attend]
    devices: tuple[str, ...] = _ANY
    masked: bool = True
    backend: SDPBackend | None = None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Force the backend; entered around the timed loop, as it costs host time."""
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel([self.backend])


def _of_backend(backend: Any) -> Callable[[Problem, torch.device], Attend]:
    def build(problem: Problem, device: torch.device) -> Attend:
        reason = functional.unsupported_reason(backend, device)
        if backend == "triton" and device.type != "cuda":
            # The interpreter of Triton would run it, for proof and not for speed.
            reason = "no GPU"
        if reason is not None:
            raise UnavailableError(reason)
        operator = OPERATORS[problem.operator]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return operator(query, key, value, problem.grid, problem.window, backend=backend)

        return attend

    return build


def _seen(problem: Problem, device: torch.device) -> Tensor:
    """(N, N) bool, true where a query sees a key."""
    tokens = problem.shape.tokens
    require_room(tokens * tokens, device)
    inside = dense.inside_window(problem.grid, problem.window, device)
    return inside if problem.operator == "lca" else ~inside


def require_room(needed: int, device: torch.device) -> None:
    """Refuse what would bring a CPU to swap; a GPU says by itself that it is out of memory."""
    if device.type != "cuda" and needed > 0.8 * check._free_bytes(device):
        raise torch.OutOfMemoryError(f"needs about {needed / 2**30:.0f} GiB")


def _authors(hoisted: bool) -> Callable[[Problem, torch.device], Attend]:
    def build(problem: Problem, device: torch.device) -> Attend:
        require_room(6 * 4 * problem.scores, device)

        def additive_mask() -> Tensor:
            hidden = ~_seen(problem, device)
            zeros = torch.zeros(hidden.shape, device=device, dtype=problem.dtype)
            return zeros.masked_fill_(hidden, -torch.inf)

        kept = additive_mask() if hoisted else None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            batch = query.shape[0]
            mask = additive_mask() if kept is None else kept
            key = key.repeat(batch, 1, 1)  # (B·h, N, d)
            value = value.repeat(batch, 1, 1) if value.dim() == 3 else value.flatten(0, 1)
            query = query.flatten(0, 1) * problem.scale
            weights = torch.baddbmm(mask, query, key.mT).softmax(-1)
            return (weights @ value).unflatten(0, (batch, -1))

        return attend

    return build


def _dense(problem: Problem, device: torch.device) -> Attend:
    require_room(6 * 4 * problem.scores, device)
    return _of_backend("dense")(problem, device)


def _sdpa(
    masked: bool, math: bool = False, copied: bool = False
) -> Callable[[Problem, torch.device], Attend]:
    def build(problem: Problem, device: torch.device) -> Attend:
        if math:
            require_room(6 * 4 * problem.scores, device)
        mask = _seen(problem, device) if masked else None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Stride 0 over the batch: nothing is copied that the backend does not copy itself.
            key, value = key.expand(query.shape), value.expand(query.shape)
            if copied:
                key, value = key.contiguous(), value.contiguous()
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=problem.scale
            )

        return attend

    return build


def _flex(block: int) -> Callable[[Problem, torch.device], Attend]:
    def build(problem: Problem, device: torch.device) -> Attend:
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        (height, width), (window_y, window_x) = problem.grid, problem.window
        local = problem.operator == "lca"

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            near_y = (i // width - j // width).abs() <= window_y // 2
            near_x = (i % width - j % width).abs() <= window_x // 2
            near = near_y & near_x
            return near if local else ~near

        tokens = height * width
        require_room(tokens * tokens, device)
        block_mask = create_block_mask(
            sees, None, None, tokens, tokens, device=device, BLOCK_SIZE=block
        )
        # Every problem is a program of its own: no recompilation limit, no dynamic shapes.
        torch._dynamo.reset()
        # Backward runs many times over one graph.
        torch._functorch.config.donated_buffer = False
        compiled = torch.compile(flex_attention, dynamic=False)
        # The largest tiles that divide a mask block of 64.
        small: Any = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64}
        small |= {"BLOCK_M2": 64, "BLOCK_N2": 32}
        options = small if block == 64 else None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = compiled(
                query,
                key.expand(query.shape),
                value.expand(query.shape),
                block_mask=block_mask,
                scale=problem.scale,
                kernel_options=options,
            )
            assert isinstance(output, Tensor)
            return output

        return attend

    return build


_DENSE_SPEED = "dense speed of light: attention to every key, not the same result"
BASELINES = (
    Baseline("triton", "rlr_fast, Triton kernels", _of_backend("triton")),
    Baseline("tiled", "rlr_fast, PyTorch's fused attention over tiles", _of_backend("tiled")),
    Baseline("dense", "the definition, N×N scores, eager", _dense),
    Baseline(
        "authors",
        "as nn.MultiheadAttention computes it with need_weights=True and the reference repeated "
        "over the batch; mask built in every call",
        _authors(hoisted=False),
    ),
    Baseline("authors-hoisted", "the same, mask built once", _authors(hoisted=True)),
    Baseline(
        "sdpa-efficient", "SDPA with a boolean mask, memory-efficient backend", _sdpa(masked=True),
        _CUDA, backend=SDPBackend.EFFICIENT_ATTENTION,
    ),
    Baseline(
        "sdpa-cudnn", "SDPA with a boolean mask, cuDNN backend", _sdpa(masked=True),
        _CUDA, backend=SDPBackend.CUDNN_ATTENTION,
    ),
    Baseline(
        "sdpa-cudnn-copied", "the same, the reference copied for every image",
        _sdpa(masked=True, copied=True), _CUDA, backend=SDPBackend.CUDNN_ATTENTION,
    ),
    Baseline(
        "sdpa-flash", "SDPA with a boolean mask, CPU flash backend", _sdpa(masked=True),
        _CPU, backend=SDPBackend.FLASH_ATTENTION,
    ),
    Baseline(
        "sdpa-math", "SDPA with a boolean mask, math backend", _sdpa(masked=True, math=True),
        backend=SDPBackend.MATH,
    ),
    Baseline("flex-128", "compiled flex_attention, BlockMask of 128", _flex(128), _CUDA),
    Baseline("flex-64", "compiled flex_attention, BlockMask of 64", _flex(64), _CUDA),
    Baseline(
        "unmasked-flash", f"SDPA flash, {_DENSE_SPEED}", _sdpa(masked=False),
        masked=False, backend=SDPBackend.FLASH_ATTENTION,
    ),
    Baseline(
        "unmasked-cudnn", f"SDPA cuDNN, {_DENSE_SPEED}", _sdpa(masked=False),
        _CUDA, masked=False, backend=SDPBackend.CUDNN_ATTENTION,
    ),
    Baseline(
        "unmasked-cudnn-copied", "the same, the reference copied for every image",
        _sdpa(masked=False, copied=True), _CUDA, masked=False, backend=SDPBackend.CUDNN_ATTENTION,
    ),
)  # fmt: skip
COPY = "copy"
COPY_LABEL = "a device copy of as many bytes as the operator must move"
# Those that hold N×N scores.
QUADRATIC = ("dense", "authors", "authors-hoisted", "sdpa-math")
# What a headline needs: ours, the strongest of each kind, the unmasked bounds.
HEADLINE = (
    "triton",
    "flex-128",
    "sdpa-efficient",
    "unmasked-cudnn",
    "unmasked-cudnn-copied",
    "unmasked-flash",
    COPY,
)
# On a CPU, where a call of the N×N baselines takes a second.
CPU_HEADLINE = ("tiled", "authors", "sdpa-flash")


class Contest:
    """A baseline ready on the inputs of a problem: checks, and calls to time."""

    def __init__(self, baseline: Baseline, problem: Problem, inputs: Inputs) -> None:
        self.baseline, self.problem, self.inputs = baseline, problem, inputs
        self.attend = baseline.build(problem, inputs.query.device)
        self.errors: dict[str, float] = {}
        self._output: Tensor | None = None

    def check(self, direction: str, truth: check.Truth) -> dict[str, float]:
        """Compare with the definition what ``direction`` computes; once for both gradients.

        Raises:
            WrongResultError: It computes something else.
            UnavailableError: The forced backend does not take this problem.
        """
        needed = check.NAMES[:1] if direction == "forward" else check.NAMES
        if not set(needed) <= set(self.errors):
            with self.baseline.context():
                results = self._results(direction)
            self.errors |= check.compare(self.problem, truth, results, self.baseline.name)
        return {name: self.errors[name] for name in needed}

    def _results(self, direction: str) -> dict[str, Tensor]:
        try:
            if direction == "forward":
                return {check.NAMES[0]: self._forward()}
            query, key, value, grad = self.inputs
            output = self.attend(query, key, value)
            grads = torch.autograd.grad(output, (query, key, value), grad)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # A forced backend refuses by a RuntimeError of several kinds; anything else is a bug.
            if self.baseline.backend is None and not self.baseline.name.startswith("flex"):
                raise
            raise UnavailableError(str(error).strip().splitlines()[0][:200]) from error
        return dict(zip(check.NAMES, (output, *grads), strict=True))

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(*self.inputs[:3])

    def _backward(self) -> tuple[Tensor, ...]:
        assert self._output is not None
        leaves = self.inputs[:3]
        return torch.autograd.grad(self._output, leaves, self.inputs.grad_output, retain_graph=True)

    def _both(self) -> tuple[Tensor, ...]:
        leaves = self.inputs[:3]
        return torch.autograd.grad(self.attend(*leaves), leaves, self.inputs.grad_output)

    def call(self, direction: str) -> Callable[[], object]:
        """Return what is timed; a backward's graph is made here, on the current stream."""
        if direction == "forward":
            return self._forward
        if direction == "both":
            return self._both
        self._output = self.attend(*self.inputs[:3])
        return self._backward

    def release(self) -> None:
        """Drop the graph that `call` made."""
        self._output = None


class CopyContest:
    """The copy bound: moves as many bytes as the operator must."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self._buffers: tuple[Tensor, Tensor] | None = None

    def call(self, direction: str) -> Callable[[], object]:
        """Return the copy; half the bytes are read, half written."""
        count = self.problem.traffic(direction) // 2
        source = torch.randint(256, (count,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        if not torch.equal(source, target):
            raise check.WrongResultError(f"a copy of {count} bytes differs from its source")
        self._buffers = (source, target)
        return lambda: target.copy_(source)

    def release(self) -> None:
        """Drop the buffers."""
        self._buffers = None
