"""Random problems for the attention operators: `tiled`, and the kernels, against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tolerances import budget, rounded_terms
from torch import Tensor

from rlr_fast.functional import (
    local_cross_attention,
    masked_learnable_key_attention,
    unsupported_reason,
)
from rlr_fast.ops.dense import inside_window
from tests.attack.damage import Random

Found = tuple[str, bytes]

OPERATORS = {"lca": local_cross_attention, "mlka": masked_learnable_key_attention}
_DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
_NAMES = ("output", "dquery", "dkey", "dvalue")


def problem(random: Random, small: bool = False) -> dict[str, Any]:
    """Return an operator, a grid, a window, and query, key, value and output gradient."""
    side = 6 if small else 12
    grid = (int(random.integers(1, side)), int(random.integers(1, side)))
    window = tuple(2 * int(random.integers(0, 8)) + 1 for _ in range(2))
    batch, heads = int(random.integers(0, 4)), int(random.integers(1, 4))
    width = int(random.choice([1, 2, 3, 4, 8, 16, 17, 32]))
    dtype = _DTYPES[int(random.integers(len(_DTYPES)))]
    if small:  # what the interpreter of kernels takes
        width, batch = int(random.choice([16, 32])), max(batch, 1)
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    generator = torch.Generator().manual_seed(int(random.integers(2**40)))

    def draw(own: bool) -> Tensor:
        lead = (batch,) if own else ()
        strided = random.random() < 0.5
        shape = (grid[0] * grid[1], heads) if strided else (heads, grid[0] * grid[1])
        drawn = torch.randn(*lead, *shape, width, generator=generator, dtype=torch.float64)
        return (drawn.transpose(-2, -3) if strided else drawn).to(dtype)

    name = str(random.choice(list(OPERATORS)))
    own = (random.random() < 0.3, random.random() < (0.7 if name == "mlka" else 0.3))
    if small:
        own = (False, name == "mlka")
    # Products of query and key up to a thousand: nearly all the weight lies on one key.
    query = draw(True) * float(10 ** random.uniform(-3, 2))
    key = draw(own[0])
    if random.random() < 0.3:  # what all keys have in common moves every score alike
        key = key + float(10 ** random.uniform(0, 2)) * draw(own[0])[..., :1, :]
    inputs = [query, key, draw(own[1]), draw(True)]
    return {"name": name, "grid": grid, "window": window, "inputs": inputs, "dtype": dtype}


def results(case: dict[str, Any], inputs: list[Tensor], backend: str) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    operator = OPERATORS[case["name"]]
    output = operator(query, key, value, case["grid"], case["window"], backend=backend)
    grads = torch.autograd.grad(output, (query, key, value), inputs[3])
    return dict(zip(_NAMES, (output.detach(), *grads), strict=True))


def told(case: dict[str, Any]) -> str:
    """Return a problem in words."""
    shapes = [tuple(x.shape) for x in case["inputs"][:3]]
    return (
        f"{case['name']}, grid {case['grid']}, window {case['window']}, {case['dtype']}, {shapes}"
    )


def check_values(case: dict[str, Any], backend: str) -> str | None:
    """Compare with the definition, forward and backward; return what is wrong."""
    inputs = case["inputs"]
    actual = results(case, inputs, backend)
    eager = results(case, inputs, "dense")
    exact = results(case, [x.double() for x in inputs], "dense")
    if inputs[0].numel() == 0:
        wrong = [n for n in _NAMES if actual[n].shape != exact[n].shape or actual[n].any()]
        return f"an empty batch gives {wrong}" if wrong else None
    terms = rounded_terms(inputs)
    # A key's and a value's gradients add a rounded weight of each query that looks there.
    ones = [x.double() for x in inputs[:3]] + [torch.ones_like(inputs[3], dtype=torch.float64)]
    looks = max(1.0, float(results(case, ones, "dense")["dvalue"].max()))
    terms |= {name: looks * terms[name] for name in ("dvalue", "dkey")}
    for name in _NAMES:
        if not actual[name].isfinite().all() and eager[name].isfinite().all():
            return f"{name} is not finite"
        error, allowed = budget(actual[name], eager[name], exact[name], terms[name])
        if not error <= allowed and eager[name].isfinite().all():
            return f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return None


def check_nan(case: dict[str, Any], backend: str, random: Random) -> str | None:
    """Put NaN or infinity in one place: who sees it tells, and who does not is as before."""
    inputs = [x.clone() for x in case["inputs"]]
    which = int(random.integers(3))
    if inputs[which].numel() == 0:
        return None
    place = int(random.integers(inputs[which].shape[-2]))
    bad = float("nan") if random.random() < 0.7 else float("inf")
    inputs[which][..., place, 0] = bad
    operator = OPERATORS[case["name"]]
    args = (case["grid"], case["window"])
    before = operator(*case["inputs"][:3], *args, backend=backend)
    output = operator(*inputs[:3], *args, backend=backend)
    seen = inside_window(*args)
    seen = seen if case["name"] == "lca" else ~seen
    touched = seen[:, place] if which else (torch.arange(len(seen)) == place) & seen.any(1)
    channels = slice(0, 1) if which == 2 else slice(None)
    shown = output[:, :, touched, channels].isnan() | output[:, :, touched, channels].isinf()
    if bad != bad and not shown.all():
        return f"NaN in {('query', 'key', 'value')[which]} is not seen"
    if which == 0 and not torch.equal(output[:, :, ~touched], before[:, :, ~touched]):
        return "a query changes another's output"
    return None


def tiled(random: Random, count: int) -> Iterator[Found]:
    """The portable path."""
    for _ in range(count):
        case = problem(random)
        fault = check_values(case, "tiled")
        if fault:
            yield f"{told(case)}: {fault}", b""


def not_finite(random: Random, count: int) -> Iterator[Found]:
    """The portable path with NaN and infinity."""
    for _ in range(count):
        case = problem(random)
        fault = check_nan(case, "tiled", random)
        if fault:
            yield f"{told(case)}: {fault}", b""


def kernels(random: Random, count: int) -> Iterator[Found]:
    """The Triton kernels, interpreted on a CPU."""
    for _ in range(count):
        case = problem(random, small=True)
        fault = check_values(case, "triton")
        if fault:
            yield f"{told(case)}: {fault}", b""


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield each path with its tries and what was found."""
    subjects = {
        "operators: tiled": (tiled, 1.0),
        "operators: NaN and infinity": (not_finite, 0.3),
        "operators: interpreted kernels": (kernels, 0.005),
    }
    for number, (name, (subject, share)) in enumerate(subjects.items()):
        if only is not None and only not in name:
            continue
        if subject is kernels and unsupported_reason("triton", "cpu") is not None:
            continue
        tries = max(1, round(share * count))
        yield name, tries, list(subject(np.random.default_rng([seed, number]), tries))
