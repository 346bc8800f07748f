"""Muon: momentum whose singular values are made equal, for the matrices of a transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the published iteration: the steepest polynomial at 0 that still brings (0, 1] near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# A rotation's entries, times this and the root of its longer side, are of the size of Adam's steps.
_SCALE = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices of the same singular vectors, whose singular values are about 0.7 to 1.2.

    Newton and Schulz's iteration ``X ← PX`` with ``P = aI + bA + cA²`` and ``A = XXᵀ``, five times.
    It works in bfloat16 on a GPU, as published, and in the matrices' own precision on a CPU, where
    long matrices take half the time by their small ``A`` alone, exact to 1e-3 in float32. Singular
    values below a thousandth of the norm grow less.

    Args:
        matrices: (B, m, n).
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    if x.device.type == "cuda":
        x = x.bfloat16()
    elif x.shape[2] >= 2 * x.shape[1]:
        x = _all_steps(x @ x.mT) @ x
        return x.mT if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _all_steps(gram: Tensor) -> Tensor:
    """Return the product of the iteration's P: they commute, and ``PAP`` is the next ``A``.

    bfloat16 would be too coarse for it.
    """
    a, b, c = _COEFFICIENTS
    steps: list[Tensor] = []
    for _ in range(_ITERATIONS):
        if steps:
            gram = steps[-1] @ gram @ steps[-1]
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        steps.append(step)
    return functools.reduce(torch.matmul, steps)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: every direction of a matrix learns at the same rate.

    ``M ← 0.95 M + 0.05 G``, ``W ← W − lr · 0.2 √max(m, n) · orthogonalized(0.95 M + 0.05 G)``
    (Jordan et al., 2024, with the scale of Liu et al., 2025, that makes a learning rate mean what
    it means to Adam). Matrices of one shape are orthogonalized together.

    Args:
        matrices: Parameters of two dimensions. One that is three times as high as wide is taken for
            the stacked projections of queries, keys and values, which are three matrices.
        lr: Learning rate.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step by the gradients; a matrix without one stays as it is."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = [self.state[weight]["momentum"] for weight in weights]
            gradients = [weight.grad for weight in weights]
            torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momentum, group["momentum"])
            of_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight, update in zip(weights, updates, strict=True):
                for part, change in zip(_parts(weight), _parts(update), strict=True):
                    of_shape.setdefault(part.shape, []).append((part, change))
            for shape, pairs in of_shape.items():
                parts, changes = zip(*pairs, strict=True)
                steps = orthogonalized(torch.stack(changes)).unbind()
                rate = group["lr"] * _SCALE * max(shape) ** 0.5
                torch._foreach_add_(list(parts), list(steps), alpha=-rate)


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return the matrices that a parameter stacks, as views."""
    rows, columns = matrix.shape
    return matrix.chunk(3) if rows == 3 * columns else (matrix,)
