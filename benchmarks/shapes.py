"""The problems that are timed: the paper's attention shapes by name, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlr_fast import functional

OPERATORS = {
    "lca": functional.local_cross_attention,
    "mlka": functional.masked_learnable_key_attention,
}
DIRECTIONS = ("forward", "backward", "both")
BATCHES = (1, 4, 16, 64, 256)
HEADS = 8
# Scores of one call, B·h·N², above which a problem is left out: seconds per call, minutes per case.
MOST_SCORES = 2**38


@dataclass(frozen=True)
class Shape:
    """One level of the model.

    Attributes:
        side: The grid is side × side tokens.
        width: Head width d.
        window: Odd side of the window.
    """

    side: int
    width: int
    window: int

    @property
    def name(self) -> str:
        """E.g. ``64x64-d16-w11``."""
        return f"{self.side}x{self.side}-d{self.width}-w{self.window}"

    @property
    def tokens(self) -> int:
        """N."""
        return self.side * self.side


# Levels 1 to 3 at 256 pixels, with the paper's windows in either order; level 1 at 512 and 1024.
PAPER = (
    Shape(64, 16, 11),
    Shape(32, 32, 7),
    Shape(16, 64, 5),
    Shape(64, 16, 5),
    Shape(16, 64, 11),
    Shape(128, 16, 11),
    Shape(256, 16, 11),
)
HEADLINE = PAPER[:3]
# What a CPU does in minutes: the levels at 256 pixels, few images.
CPU_BATCHES = {64: (1,), 32: (1, 4), 16: (1, 16)}


@dataclass(frozen=True)
class Problem:
    """An operator on a shape, a batch and a dtype; the direction is what is timed of it."""

    operator: str
    shape: Shape
    batch: int
    dtype: torch.dtype
    heads: int = HEADS

    @property
    def name(self) -> str:
        """E.g. ``mlka-64x64-d16-w11-B64-bf16``."""
        return f"{self.operator}-{self.shape.name}-B{self.batch}-{dtype_name(self.dtype)}"

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape.side, self.shape.side

    @property
    def window(self) -> tuple[int, int]:
        """(height, width)."""
        return self.shape.window, self.shape.window

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.shape.width**-0.5

    @property
    def scores(self) -> int:
        """Scores of the dense operator, B·h·N²."""
        return self.batch * self.heads * self.shape.tokens**2

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        return {
            "operator": self.operator,
            "shape": self.shape.name,
            "tokens": self.shape.tokens,
            "width": self.shape.width,
            "window": self.shape.window,
            "batch": self.batch,
            "heads": self.heads,
            "dtype": dtype_name(self.dtype),
        }

    def traffic(self, direction: str) -> int:
        """Bytes that must move: each input read once, each result written once."""
        size = torch.finfo(self.dtype).bits // 8
        shared = self.heads * self.shape.tokens * self.shape.width * size
        rows = self.batch * shared
        value = shared if self.operator == "lca" else rows
        forward = 2 * rows + shared + value  # query, output, key, value
        backward = 3 * rows + 2 * shared + 2 * value  # query, dO, dQ; key, dK; value, dV
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


class Inputs(NamedTuple):
    """Leaves of the graph, and the gradient that comes back to the output.

    Attributes:
        query: (B, h, N, d).
        key: (h, N, d).
        value: (h, N, d) for LCA, (B, h, N, d) for MLKA.
        grad_output: (B, h, N, d).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Draw inputs whose softmax leans on near tokens, so that a wrong window is a large error.

    Queries and keys are noise plus a code of the token's place that is alike for neighbors. With
    noise alone, one key too many among thousands would change a result by less than its rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    # Images are drawn where they are used: gigabytes of noise would take a CPU too long.
    images = torch.Generator(device).manual_seed(seed + 1)
    side, heads, width = problem.shape.side, problem.heads, problem.shape.width
    shared = (heads, side * side, width)
    token = torch.arange(side * side)
    place = torch.stack((token // side, token % side), 1).float()
    waves = torch.randn(heads, 2, width, generator=generator) * (1.5 / problem.shape.window)
    phases = torch.rand(heads, 1, width, generator=generator) * (2 * torch.pi)
    # Of squared norm d: a key at the query's place scores √d more than one far away.
    code = 2**0.5 * torch.cos(place @ waves + phases)

    def of_reference() -> Tensor:
        return torch.randn(shared, generator=generator)

    def of_images() -> Tensor:
        size = (problem.batch, *shared)
        return torch.randn(size, generator=images, device=device, dtype=problem.dtype)

    query = of_images() + code.to(device, problem.dtype)
    key = (of_reference() + code).to(device, problem.dtype)
    shared_value = problem.operator == "lca"
    value = of_reference().to(device, problem.dtype) if shared_value else of_images()
    query, key, value = (tensor.requires_grad_() for tensor in (query, key, value))
    return Inputs(query, key, value, of_images())


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. ``bf16``."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
