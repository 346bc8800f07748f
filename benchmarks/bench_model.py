"""The model of the paper's preset: block, reconstructor, training step, inference batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import timing
from benchmarks.baseline_models import AUTHORS, LABELS, SDPA, require_room, with_baseline_blocks
from benchmarks.baselines import UnavailableError
from benchmarks.check import WrongResultError
from benchmarks.record import bench_device
from rlr_fast import RLRConfig, RLRModel
from rlr_fast.functional import unsupported_reason

DEVICE = bench_device()
GPU = DEVICE.type == "cuda"
# On a GPU as trained: bf16 where autocast says so, parameters and distances in float32.
PRECISION = "bf16" if GPU else "fp32"
CONFIG = RLRConfig(backbone_weights="random")
# Images to check with: the definition keeps every N×N matrix.
CHECKED = 1
# Against float32: token distances and outputs; the gradient of all parameters as one vector. Eight
# attentions and sixteen matrix products in bf16 stand between input and result.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
_GRADIENT_TOLERANCE = {"fp32": 5e-3, "bf16": 2e-1}

pytestmark = timing.MARK


@dataclass(frozen=True)
class Case:
    """One benchmark: a part of the model, a level where it has one, a batch and a backend."""

    part: str
    level: int | None
    batch: int
    backend: str

    @property
    def what(self) -> str:
        """E.g. ``block-step-level1-B4-bf16``: the group of its baselines."""
        level = "" if self.level is None else f"-level{self.level + 1}"
        return f"{self.part}{level}-B{self.batch}-{PRECISION}"

    @property
    def name(self) -> str:
        """With the backend: the id of the benchmark."""
        return f"{self.what}-{self.backend}"

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        info: dict[str, object] = {
            "suite": "model",
            "part": self.part,
            "batch": self.batch,
            "dtype": PRECISION,
            "rival": self.backend,
            "label": LABELS.get(
                self.backend, f"whole model code, attention backend {self.backend}"
            ),
        }
        if self.level is not None:
            side = GRIDS[self.level]
            info |= {"level": self.level + 1, "grid": f"{side}x{side}"}
        return info


GRIDS = (64, 32, 16)
PARTS = ("block-forward", "block-step", "reconstructor-forward", "reconstructor-step")


def cases(headline: bool, large: bool) -> list[Case]:
    """Return what this device times."""
    backends = ("triton", "tiled", "dense") if GPU else ("tiled", "dense")
    batches: tuple[int, ...] = (4, 64) if GPU else (1,)
    if headline and GPU:
        backends, batches = ("triton", "tiled"), (64,)
    chosen = []
    for part in () if headline else PARTS:
        for level in range(3):
            whole = part.startswith("reconstructor")
            for batch, backend in itertools.product(batches, backends):
                # Any two of these take a CPU minutes with the check. (The first level's network
                # is nearly all of a training step, which is timed.)
                costs = (whole, level == 0, backend == "dense")
                if GPU or large or sum(costs) < 2:
                    chosen.append(Case(part, level, batch, backend))
    whole_batches = (1, 8) if large and not GPU else batches
    baselines: tuple[str, ...] = (AUTHORS, SDPA)
    if headline:
        baselines = () if GPU else (SDPA,)
    for part in ("training-step", "inference-from-features", "inference-from-images"):
        for batch, backend in itertools.product(whole_batches, (*backends, *baselines)):
            if backend in baselines and part == "inference-from-images":
                continue  # the backbone's time is the same for all
            if headline and backend in baselines and part == "training-step":
                continue  # a CPU takes a third of a minute for it
            if GPU or large or backend != "dense":
                chosen.append(Case(part, None, batch, backend))
    return chosen


@cache
def _model(backend: Any) -> RLRModel:
    if backend in LABELS:
        torch.manual_seed(0)
        return with_baseline_blocks(RLRModel(CONFIG, backend="dense").to(DEVICE), backend)
    reason = "no GPU" if backend == "triton" and not GPU else unsupported_reason(backend, DEVICE)
    if reason is not None:
        raise UnavailableError(reason)
    torch.manual_seed(0)  # every backend gets the same parameters
    return RLRModel(CONFIG, backend=backend).to(DEVICE)


@cache
def _definition() -> RLRModel:
    """The model on the dense backend, which computes each block again in backward.

    N×N weights of one block fit where those of all do not.
    """
    torch.manual_seed(0)
    model = RLRModel(CONFIG, backend="dense").to(DEVICE)
    levels: Any = model.levels
    for block in (block for level in levels for block in level.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _tokens(batch: int, level: int, hidden: bool = False) -> Tensor:
    """Draw tokens (B, N, C) of a level: features, or a block's own input."""
    generator = torch.Generator(DEVICE).manual_seed(level)
    model = _model("tiled")
    channels = CONFIG.hidden[level] if hidden else model.backbone.channels[level]
    size = (batch, GRIDS[level] ** 2, channels)
    return torch.randn(size, generator=generator, device=DEVICE)


def _autocast(exact: bool = False) -> contextlib.AbstractContextManager[Any]:
    if exact or not GPU:
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


class Calls(NamedTuple):
    """A part of the model: the call that is timed, and the one whose result is checked.

    A step is checked by the gradient of all its parameters, an inference by its output.
    """

    timed: Callable[[], object]
    checked: Callable[[], Tensor]


def _calls(case: Case, batch: int, backend: str, exact: bool = False) -> Calls:
    """Return the part's calls; ``exact``: those of the definition, in float32 throughout."""
    model = _definition() if exact else _model(backend)
    step = case.part.endswith("step")
    if backend == AUTHORS and not exact:
        require_room(model, batch, step, DEVICE)
    model.train(step)
    if not step:
        with _autocast(exact):
            model.prepare_for_inference()
    levels: Any = model.levels
    if case.part == "inference-from-images":
        size = (batch, 3, *CONFIG.image_size)
        generator = torch.Generator(DEVICE).manual_seed(3)
        images = torch.randint(256, size, generator=generator, device=DEVICE, dtype=torch.uint8)
        return _inference(lambda: model(images).score_map, exact)
    if case.level is None:
        tokens = [_tokens(batch, j) for j in range(3)]
        if not step:
            return _inference(lambda: model.predict_tokens(tokens).score_map, exact)
        generator = torch.Generator(DEVICE).manual_seed(7)

        def noise() -> list[Tensor]:
            return [torch.randn(t.shape, generator=generator, device=DEVICE) for t in tokens]

        def loss() -> Tensor:
            drawn = noise()
            return torch.stack([d.mean() for d in model.distances(tokens, drawn)]).sum()

        return _training(loss, list(levels.parameters()), exact, generator)
    network = levels[case.level]
    block = case.part.startswith("block")
    x = _tokens(batch, case.level, hidden=block)

    def forward() -> Tensor:
        if not block:
            result: Tensor = network(x)
            return result
        reference = network.reference_in(network.reference) + network.positions
        result = network.blocks[0](x, network.blocks[0].prepare(reference))
        return result

    if not step:
        return _inference(forward, exact)
    module = network.blocks[0] if block else network
    weights = torch.randn(
        forward().shape, generator=torch.Generator(DEVICE).manual_seed(5), device=DEVICE
    )
    return _training(lambda: (forward() * weights).mean(), list(module.parameters()), exact, None)


def _inference(forward: Callable[[], Tensor], exact: bool) -> Calls:
    def call() -> Tensor:
        with torch.inference_mode(), _autocast(exact):
            return forward()

    return Calls(call, call)


def _training(
    loss: Callable[[], Tensor],
    parameters: list[Tensor],
    exact: bool,
    noise: torch.Generator | None,
) -> Calls:
    """A step; where noise belongs to it, Adam does too."""
    # A rate of 0 costs as much as any other and leaves the parameters to the next check.
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def gradient() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(exact):
            value = loss()
        value.backward()

    def step() -> None:
        gradient()
        if noise is not None:
            optimizer.step()

    def checked() -> Tensor:
        if noise is not None:
            noise.manual_seed(7)
        gradient()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    return Calls(step, checked)


def _checked(case: Case, backend: str, exact: bool) -> Tensor:
    return _calls(case, CHECKED, backend, exact).checked().float().clone()


_TRUTHS: dict[str, Tensor] = {}


def _check(case: Case) -> dict[str, float]:
    _model(case.backend)
    key = f"{case.part} {case.level}"
    if key not in _TRUTHS:
        _TRUTHS.clear()
        _TRUTHS[key] = _checked(case, "dense", exact=True)
    exact = _TRUTHS[key]
    actual = _checked(case, case.backend, exact=False)
    error = float(torch.linalg.vector_norm(actual - exact) / torch.linalg.vector_norm(exact))
    step = case.part.endswith("step")
    allowed = (_GRADIENT_TOLERANCE if step else _TOLERANCE)[PRECISION]
    # Written so that NaN is an error.
    if not error <= allowed:
        raise WrongResultError(
            f"{case.name}: errs by {error:.2e} against the definition in float32, "
            f"allowed {allowed:.0e}"
        )
    return {"gradient" if step else "output": error}


def test_model(measure: Callable[..., None], case: Case) -> None:
    """Time one case."""
    measure(
        case.info(),
        f"model {case.what}",
        lambda: _check(case),
        lambda: _calls(case, case.batch, case.backend).timed,
    )
