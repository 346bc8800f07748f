"""The token distance, loss and score alike: the kernel, PyTorch's operators, and those compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.baselines import UnavailableError
from benchmarks.check import WrongResultError
from benchmarks.record import bench_device
from rlr_fast.functional import unsupported_reason
from rlr_fast.models.scoring import distance

DEVICE = bench_device()
GPU = DEVICE.type == "cuda"
# Tokens and channels of the levels of EfficientNet-B6 at 256 pixels.
LEVELS = ((4096, 40), (1024, 72), (256, 200))
LABELS = {
    "triton": "rlr_fast, Triton kernel",
    "eager": "PyTorch's operators, one after the other",
    "compiled": "the same through torch.compile",
}

pytestmark = timing.MARK


@dataclass(frozen=True)
class Case:
    """A level, a batch, a direction and a baseline."""

    level: int
    batch: int
    direction: str
    baseline: str

    @property
    def what(self) -> str:
        """The group of its baselines, as ``distance-level1-B64-both``."""
        return f"distance-level{self.level + 1}-B{self.batch}-{self.direction}"

    @property
    def name(self) -> str:
        """With the baseline: the id of the benchmark."""
        return f"{self.what}-{self.baseline}"


def cases(headline: bool, large: bool) -> list[Case]:
    """Return what this device times; compiling takes a CPU a C++ compiler's time."""
    baselines = [r for r in LABELS if GPU or (r != "triton" and (large or r == "eager"))]
    return [
        Case(level, 64 if GPU else 4, direction, baseline)
        for level in range(1 if headline else len(LEVELS))
        for direction in ("forward", "both")
        for baseline in baselines
    ]


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction as autocast leaves it on a GPU, original, and the gradient of the loss."""
    tokens, channels = LEVELS[case.level]
    generator = torch.Generator(DEVICE).manual_seed(0)
    r, o = (
        torch.randn(case.batch, tokens, channels, generator=generator, device=DEVICE)
        for _ in range(2)
    )
    grad = torch.full((case.batch, tokens), 1 / (case.batch * tokens), device=DEVICE)
    return (r.bfloat16() if GPU else r), o, grad


def _function(baseline: str) -> Callable[..., Tensor]:
    if baseline != "triton":
        return torch.compile(distance, dynamic=False) if baseline == "compiled" else distance
    reason = unsupported_reason("triton", DEVICE)
    if reason is not None:
        raise UnavailableError(reason)
    return lambda r, o: distance(r, o, "triton")


def _run(function: Callable[..., Tensor], case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    r, o, grad = inputs
    if case.direction == "forward":
        with torch.no_grad():
            return [function(r, o)]
    r = r.detach().requires_grad_()
    distances = function(r, o)
    return [distances.detach(), *torch.autograd.grad(distances, r, grad)]


def _check(case: Case, function: Callable[..., Tensor]) -> dict[str, float]:
    inputs = _inputs(case)
    exact = _run(distance, case, tuple(x.double() for x in inputs))
    errors = {}
    for name, a, e in zip(("distance", "gradient"), _run(function, case, inputs), exact):  # noqa: B905
        errors[name] = float((a.double() - e).norm() / e.norm())
        # A gradient is rounded to the reconstruction's own type. Written so that NaN is an error.
        allowed = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        if not errors[name] <= allowed:
            raise WrongResultError(f"{case.what}: {name} errs by {errors[name]:.2e}")
    return errors


def test_distance(measure: Callable[..., None], case: Case) -> None:
    """Time one case."""
    torch.compiler.reset()
    info = {
        "suite": "distance", "level": case.level + 1, "batch": case.batch,
        "direction": case.direction, "rival": case.baseline, "label": LABELS[case.baseline],
        "dtype": "bf16" if GPU else "fp32",
    }  # fmt: skip
    made: list[Callable[..., Tensor]] = []

    def prepare() -> dict[str, float]:
        made.append(_function(case.baseline))
        return _check(case, made[0])

    def make() -> Callable[[], object]:
        inputs = _inputs(case)
        return lambda: _run(made[0], case, inputs)

    measure(info, case.what, prepare, make, graph=GPU)
