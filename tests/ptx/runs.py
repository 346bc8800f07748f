"""A case run by the machine, its outputs and gradients beside the definition in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from rlr_fast import kernels
from rlr_fast.kernels import _choice, _launch
from rlr_fast.ops import dense
from tests.ptx.cases import Attention, Block, Case, Distance
from tests.ptx.driver import Change, Log, machine_as_device
from tests.tolerances import budget, rounded_terms

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPERATORS = {"mlka": "masked_learnable_key_attention", "lca": "local_cross_attention"}
# What is rounded, in float32, on the way to results of a block and of the distance.
_BLOCK_TERMS, _DISTANCE_TERMS = 10.0, 1.0
# A sum that tensor cores cut off errs by twice as much as one that is rounded.
_CUT_OFF = 2.0

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Verdict:
    """A result's largest error, all of them relative to the largest true value.

    Attributes:
        error: Of the kernels.
        eager: Of plain PyTorch in the same dtype.
        allowed: The budget.
        ok: Whether it is kept.
    """

    error: float
    eager: float
    allowed: float
    ok: bool


@dataclass(frozen=True)
class Result:
    """What a case gave: its launches, and a verdict for each output and gradient."""

    log: Log
    verdicts: dict[str, Verdict]

    @property
    def wrong(self) -> list[str]:
        """Results that are beyond their budget."""
        return [name for name, verdict in self.verdicts.items() if not verdict.ok]

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.log.findings(mild=False)


def run(
    case: Case, arch: str, dtype: str, change: Change | None = None, backward: bool = True
) -> Result:
    """Run a case.

    Args:
        case: What to run.
        arch: ``"80"`` or ``"90"``.
        dtype: Of `DTYPES`.
        change: May damage the PTX of its kernels.
        backward: Whether an attention case runs its backward pass as well.
    """
    if isinstance(case, Attention):
        return _attention(case, arch, _DTYPES[dtype], change, backward)
    if isinstance(case, Block):
        return _block(case, arch, _DTYPES[dtype], change)
    return _distance(case, arch, _DTYPES[dtype], change)


def _judge(actual: Tensor, eager: Tensor, exact: Tensor, terms: float) -> Verdict:
    error, allowed = (float(x) for x in budget(actual, eager, exact, terms))
    return _verdict(error, eager, exact, allowed, actual.dtype == eager.dtype)


def _judge_tf32(actual: Tensor, eager: Tensor, exact: Tensor) -> Verdict:
    """Hold TF32 to eager float16, whose mantissa it has.

    The machine cuts TF32's factors off, as the hardware does what no conversion has rounded, and
    errs twice as much.
    """
    band = torch.finfo(torch.float16).eps * float(exact.abs().max())
    allowed = 4 * float((eager.double() - exact).abs().max()) + band
    error = float((actual.double() - exact).abs().max())
    return _verdict(error, eager, exact, allowed, actual.dtype == torch.float32)


def _verdict(error: float, eager: Tensor, exact: Tensor, allowed: float, typed: bool) -> Verdict:
    usual = float((eager.double() - exact).abs().max())
    unit = float(exact.abs().max()) or 1.0
    # Written so that NaN fails.
    return Verdict(error / unit, usual / unit, allowed / unit, typed and error <= allowed)


def _gradients(
    names: Sequence[str], function: Function, inputs: Sequence[Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """Return the output of a function and, unless it alone is named, the inputs' gradients."""
    if len(names) == 1:
        return {names[0]: function(*inputs)}
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    found = (output.detach(), *torch.autograd.grad(output, leaves, grad))
    return dict(zip(names, found, strict=True))


@contextlib.contextmanager
def _deterministic(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    # The machine does so itself, and remembers.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _inputs(case: Attention, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key, value and output gradient."""
    generator = torch.Generator().manual_seed(7)
    tokens = case.grid[0] * case.grid[1]

    def draw(*lead: int) -> Tensor:
        if case.strided:
            x = torch.randn(*lead, tokens, 3, case.heads, case.width, generator=generator).to(dtype)
            return x[..., 1, :, :].transpose(-2, -3)
        return torch.randn(*lead, case.heads, tokens, case.width, generator=generator).to(dtype)

    query, key = draw(case.batch), draw()
    if case.offset:
        key = key + case.offset * draw()[..., :1, :]
    value = draw() if case.operator == "lca" or case.shared_value else draw(case.batch)
    grad = draw(case.batch)
    query[1 if case.mixed else 0 :: 2 if case.mixed else 1] *= case.scale
    return [query, key, value, grad]


def _attention(
    case: Attention, arch: str, dtype: torch.dtype, change: Change | None, backward: bool
) -> Result:
    *inputs, grad = _inputs(case, dtype)
    name = _OPERATORS[case.operator]
    names = ("output", "dquery", "dkey", "dvalue") if backward else ("output",)

    def function(module: object) -> Function:
        window, scale = (case.window, case.window), case.width**-0.5
        return lambda *xs: getattr(module, name)(*xs, case.grid, window, scale)

    allowed = torch.get_float32_matmul_precision()
    if case.tf32:
        torch.set_float32_matmul_precision("high")
    programs = case.programs or _launch.PROGRAMS
    try:
        with (
            _deterministic(case.deterministic),
            mock.patch.object(_launch, "PROGRAMS", programs),
            _choice.forced(architecture=int(arch)),
            machine_as_device(arch, change) as log,
        ):
            actual = _gradients(names, function(kernels), inputs, grad)
    finally:
        torch.set_float32_matmul_precision(allowed)
    exact = _gradients(names, function(dense), [x.double() for x in inputs], grad.double())
    if case.tf32:
        half = [x.half() for x in (*inputs, grad)]
        eager = _gradients(names, function(dense), half[:3], half[3])
        return Result(log, {n: _judge_tf32(actual[n], eager[n], exact[n]) for n in names})
    eager = _gradients(names, function(dense), inputs, grad)
    terms = rounded_terms([*inputs, grad])
    return Result(
        log, {n: _judge(actual[n], eager[n], exact[n], _CUT_OFF * terms[n]) for n in names}
    )


def _block(case: Block, arch: str, dtype: torch.dtype, change: Change | None) -> Result:
    grid, window, heads, width, batch = (9, 13), (5, 5), 2, 32, 3
    tokens, scale = grid[0] * grid[1], width**-0.5
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    projected = draw(batch, tokens, 3 * heads * width)
    keys, value = draw(2 * heads, tokens, width), draw(heads, tokens, width)
    grad = draw(batch, tokens, 2 * heads * width)
    names = ("output", "dprojected", "dkeys", "dvalue")

    def reference(p: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mlka_q, mlka_v, lca_q = p.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
        both = (
            dense.masked_learnable_key_attention(mlka_q, k[:heads], mlka_v, grid, window, scale),
            dense.local_cross_attention(lca_q, k[heads:], v, grid, window, scale),
        )
        return torch.cat([x.transpose(1, 2) for x in both], 2).flatten(2)

    def ours(p: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prepared, bound = kernels.prepare_key(k, scale)
        return kernels.block_attention(p, prepared, bound, v, grid, window)

    inputs = (projected, keys, value)
    with (
        _deterministic(case.deterministic),
        _choice.forced(architecture=int(arch)),
        machine_as_device(arch, change) as log,
    ):
        actual = _gradients(names, ours, inputs, grad)
    exact = _gradients(names, reference, [x.double() for x in inputs], grad.double())
    eager = _gradients(names, reference, inputs, grad)
    return Result(log, {n: _judge(actual[n], eager[n], exact[n], _BLOCK_TERMS) for n in names})


def _distance(case: Distance, arch: str, dtype: torch.dtype, change: Change | None) -> Result:
    generator = torch.Generator().manual_seed(5)
    r, o = (torch.randn(3, 37, case.channels, generator=generator).to(dtype) for _ in range(2))
    if dtype != torch.float16:  # whose gradient there is beyond float16
        r[0, 3] = 0
    if case.strided:
        r, o = r.mT.contiguous().mT, torch.cat([o, o], 2)[:, :, : case.channels]
    grad = torch.randn(3, 37, generator=generator)
    names = ("distance", "dr", "do")

    def reference(r: Tensor, o: Tensor) -> Tensor:
        return ((r - o) ** 2).mean(2) + 1 - torch.nn.functional.cosine_similarity(r, o, dim=2)

    with machine_as_device(arch, change) as log:
        actual = _gradients(names, kernels.token_distance, (r, o), grad)
    exact = _gradients(names, reference, (r.double(), o.double()), grad.double())
    # Plain PyTorch in float32, its gradients rounded once.
    eager = _gradients(names, reference, (r.float(), o.float()), grad)
    eager = {name: x.to(actual[name].dtype) for name, x in eager.items()}
    return Result(log, {n: _judge(actual[n], eager[n], exact[n], _DISTANCE_TERMS) for n in names})
