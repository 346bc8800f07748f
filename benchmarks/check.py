"""Correctness before speed: results compared with the definition, on a CPU or a GPU.

``python -m benchmarks.check`` compares the kernels with the definition on every device and dtype
that they take, many cases at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.shapes import HEADLINE, OPERATORS, PAPER, Inputs, Problem, Shape, make_inputs
from rlr_fast.ops import dense

NAMES = ("output", "d_query", "d_key", "d_value")
# Largest error against float32 of the same inputs: of the whole tensor, ‖a - b‖ / ‖b‖, and of its
# worst row over its own length, or over the root mean square of all rows where that is more. A
# wrong window errs by 0.1 to 2 with the inputs of `shapes`. The wide row bound is for half
# precision's gradients, which are sums that cancel.
_WHOLE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_ROW = {torch.float32: 2e-3, torch.float16: 1e-1, torch.bfloat16: 3e-1}
_BLOCK_BYTES = 2**28
_GRID_ROWS = 4


class WrongResultError(AssertionError):
    """A path computes something other than the definition; it is not timed."""


@dataclass(frozen=True)
class Truth:
    """The definition in float32 for some of the heads.

    Attributes:
        heads: Which heads the tensors hold.
        tensors: Output and gradients by the names of `NAMES`; an output alone has no gradients.
    """

    heads: tuple[int, ...]
    tensors: dict[str, Tensor]


def definition(problem: Problem, inputs: Inputs, masked: bool = True) -> Truth:
    """Compute the definition in float32, of every head where N×N scores fit, else of two heads.

    Args:
        problem: What is computed.
        inputs: Its inputs, in the dtype that is timed.
        masked: False: attention to every key, the "dense speed of light".
    """
    copies = 8 * 4 * problem.scores
    if masked and copies < _free_bytes(inputs.query.device) // 4 and problem.scores <= 2**30:
        return _dense(problem, inputs)
    heads = tuple(sorted({0, problem.heads - 1}))
    return by_rows(problem, inputs, heads, masked)


def _dense(problem: Problem, inputs: Inputs) -> Truth:
    query, key, value = (x.detach().float().requires_grad_() for x in inputs[:3])
    attend = getattr(
        dense, {"lca": "local_cross_attention", "mlka": "masked_learnable_key_attention"}[
            problem.operator
        ],
    )  # fmt: skip
    output = attend(query, key, value, problem.grid, problem.window, problem.scale)
    grads = torch.autograd.grad(output, (query, key, value), inputs.grad_output.float())
    tensors = dict(zip(NAMES, (output.detach(), *grads), strict=True))
    return Truth(tuple(range(problem.heads)), tensors)


@torch.no_grad()
def by_rows(problem: Problem, inputs: Inputs, heads: Sequence[int], masked: bool = True) -> Truth:
    """The definition a block of query rows at a time, for grids whose N×N scores do not fit.

    The gradients of a softmax's scores are ``dS = P ∘ (dP - Σ_j P_ij dP_ij)``.
    """
    chosen = list(heads)
    query, grad = (x.detach()[:, chosen].float() for x in (inputs.query, inputs.grad_output))
    key = inputs.key.detach()[chosen].float()
    shared = inputs.value.dim() == 3
    value = inputs.value.detach()
    value = (value[chosen] if shared else value[:, chosen]).float()
    batch, _, tokens, _ = query.shape
    columns = problem.grid[1]
    output, d_query = torch.empty_like(query), torch.empty_like(query)
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    reach = problem.window[0] // 2
    local = masked and problem.operator == "lca"
    # Few rows of the grid at a time, for their windows are all that is looked at.
    most = min(tokens, (2 * reach + _GRID_ROWS + 1) * columns) if local else tokens
    rows = max(1, _BLOCK_BYTES // (4 * batch * len(chosen) * most))
    rows = min(rows, _GRID_ROWS * columns) if local else rows
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        keys = slice(0, tokens)
        if local:
            # Every window of the block lies in these rows of the grid.
            first = max(start // columns - reach, 0) * columns
            after = ((block.stop - 1) // columns + reach + 1) * columns
            keys = slice(first, min(after, tokens))
        q, do = query[:, :, block], grad[:, :, block]
        k, v = key[:, keys], value[..., keys, :]
        scores = q @ k.mT * problem.scale
        if masked:
            inside = _inside(problem, block, keys, q.device)
            seen = inside if problem.operator == "lca" else ~inside
            scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
            weights = scores.softmax(-1).masked_fill(~seen, 0)
        else:
            weights = scores.softmax(-1)
        output[:, :, block] = weights @ v
        d_weights = do @ v.mT
        d_values = weights.mT @ do
        d_value[..., keys, :] += d_values.sum(0) if shared else d_values
        delta = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * problem.scale
        d_query[:, :, block] = d_scores @ k
        d_key[:, keys] += (d_scores.mT @ q).sum(0)
    tensors = dict(zip(NAMES, (output, d_query, d_key, d_value), strict=True))
    return Truth(tuple(chosen), tensors)


def _inside(problem: Problem, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """(rows, keys): the mask of `dense.inside_window`, of some of its rows and columns."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)
    width = problem.grid[1]
    near_y = (i // width - j // width).abs() <= problem.window[0] // 2
    near_x = (i % width - j % width).abs() <= problem.window[1] // 2
    return near_y & near_x


def compare(
    problem: Problem, truth: Truth, results: dict[str, Tensor], what: str
) -> dict[str, float]:
    """Return the error of each result; raise where one is too large.

    Args:
        problem: What was computed.
        truth: From `definition`.
        results: Some of `NAMES`, all heads.
        what: Who computed it, for the message.

    Raises:
        WrongResultError: A result is not the definition's.
    """
    errors = {}
    chosen = list(truth.heads)
    for name, result in results.items():
        exact = truth.tensors[name]
        actual = result.detach()
        actual = (actual[:, chosen] if actual.dim() == 4 else actual[chosen]).float()
        difference = torch.linalg.vector_norm(actual - exact, dim=-1)
        length = torch.linalg.vector_norm(exact, dim=-1)
        whole = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(length))
        row = float((difference / length.clamp(min=length.square().mean().sqrt())).max())
        # Written so that NaN is an error.
        if not (whole <= _WHOLE[problem.dtype] and row <= _ROW[problem.dtype]):
            raise WrongResultError(
                f"{what} of {problem.name}: {name} errs by {whole:.2e} (allowed "
                f"{_WHOLE[problem.dtype]:.0e}), its worst row by {row:.2e} (allowed "
                f"{_ROW[problem.dtype]:.0e})"
            )
        errors[name] = whole
    return errors


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


# As a program: the kernels, or on a CPU the portable path, at many shapes.


@dataclass(frozen=True)
class _Job:
    problem: Problem
    backend: str
    deterministic: bool = False


def _jobs(backend: str, gpu: bool) -> list[_Job]:
    """Return what to check; what is timed later comes first, and leaves its kernels compiled."""
    operators = tuple(reversed(OPERATORS))
    if not gpu:
        few = (Shape(16, 16, 5), Shape(12, 32, 7))
        return [_Job(Problem(op, s, 2, torch.float32), backend) for s in few for op in operators]
    bf16, halves = torch.bfloat16, (torch.bfloat16, torch.float16, torch.float32)
    jobs = [_Job(Problem(op, s, 64, bf16), backend) for s in HEADLINE for op in operators]
    # Edge tiles, an odd grid, every head width.
    small = (Shape(16, 16, 5), Shape(13, 32, 3), Shape(16, 64, 7), Shape(8, 128, 5))
    jobs += [_Job(Problem(op, s, 2, t), backend) for s in small for t in halves for op in operators]
    jobs += [_Job(Problem(op, s, 2, bf16), backend) for s in PAPER for op in operators]
    jobs += [_Job(Problem(op, s, 64, bf16), backend, True) for s in HEADLINE for op in operators]
    others = (torch.float16, torch.float32)
    jobs += [
        _Job(Problem(op, s, 2, t), backend) for t in others for s in PAPER[:5] for op in operators
    ]
    return list(dict.fromkeys(jobs))


def run_job(job: Any) -> dict[str, float]:
    """Compare one backend with the definition, output and every gradient; also the definition.

    Raises:
        WrongResultError: An error is too large.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = job.problem
    # The definition's matrix products have no deterministic form without a workspace setting.
    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(problem, device)
    truth = definition(problem, inputs)
    if problem.shape.tokens <= 256:
        # The two ways to compute the definition, against each other.
        exact = dataclasses.replace(problem, dtype=torch.float32)
        blocks = by_rows(problem, inputs, range(problem.heads))
        compare(exact, truth, blocks.tensors, "the definition by rows")
    torch.use_deterministic_algorithms(job.deterministic)
    query, key, value, grad = inputs
    operator = OPERATORS[problem.operator]
    output = operator(query, key, value, problem.grid, problem.window, backend=job.backend)
    grads = torch.autograd.grad(output, (query, key, value), grad)
    results = dict(zip(NAMES, (output, *grads), strict=True))
    return compare(problem, truth, results, job.backend)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print and record; return 1 where anything failed."""
    from benchmarks import parallel, record
    from benchmarks.arguments import positive

    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument(
        "--backend",
        choices=("triton", "tiled", "dense"),
        help="default: triton on a GPU, tiled on a CPU",
    )
    record.add_record_option(parser)
    parser.add_argument("--seconds", type=float, default=240, help="give up after this time")
    parser.add_argument("--workers", type=positive, default=parallel.default_workers())
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    backend = options.backend or ("triton" if gpu else "tiled")
    recorder = record.Recorder(options.record)
    jobs, failures, start = _jobs(backend, gpu), 0, time.monotonic()
    for job, outcome in parallel.each(run_job, jobs, options.workers, options.seconds):
        name = job.problem.name + ("-deterministic" if job.deterministic else "")
        result = {"suite": "check", **job.problem.info(), "rival": backend}
        result |= {"deterministic": job.deterministic}
        at = f"{time.monotonic() - start:6.1f} s"
        if outcome.failure is None:
            recorder.add({**result, "outcome": "ok", "errors": outcome.result})
            errors = "  ".join(f"{n} {e:.1e}" for n, e in outcome.result.items())
            print(f"{at}  ok    {name:40} {errors}", flush=True)
        else:
            failures += 1
            recorder.add({**result, "outcome": "failed", "reason": outcome.failure})
            print(f"{at}  FAIL  {name:40} {outcome.failure}", flush=True)
    recorder.close()
    print(f"{len(jobs) - failures} of {len(jobs)} checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
