"""Tiles that a GPU refuses: smaller ones are taken, then another kernel, then another path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from attention_cases import DEVICE, EXACT, LCA, MLKA, OPERATORS, make_inputs, results
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from rlr_fast import functional
from rlr_fast.functional import BackendError, block_attention, prepare_reference
from rlr_fast.kernels import _choice, _launch, _trial
from rlr_fast.kernels._launch import Geometry, Launch, Target
from rlr_fast.kernels.tiles import Problem, candidates, fits_in_shared_memory

GRID, WINDOW = (4, 5), (3, 5)
TOO_LARGE = OutOfResources(126976, 101376, "shared memory")


@pytest.fixture
def refuse(monkeypatch) -> Iterator[Callable[..., list[Launch]]]:
    """Make a GPU of the interpreter that refuses launches; return a list of those refused."""
    start = _launch._start

    def install(refuses: Callable[[Launch], bool], error: Exception = TOO_LARGE) -> list[Launch]:
        seen: list[Launch] = []

        def check(made: Launch) -> None:
            if refuses(made):
                seen.append(made)
                raise error

        def checked_start(made: Launch) -> None:
            check(made)
            start(made)

        monkeypatch.setattr(_launch, "_start", checked_start)
        monkeypatch.setattr(_launch, "_compile", check)
        return seen

    def forget() -> None:
        _choice._REFUSED.clear()
        _choice.choose.cache_clear()
        _trial._try.cache_clear()
        functional._TOLD.clear()

    forget()
    yield install
    forget()


def is_halo(made: Launch) -> bool:
    return "IMAGES" in made.constants


def is_backward(made: Launch) -> bool:
    return made.kernel.__name__.startswith("backward")


def queries(made: Launch) -> int:
    c = made.constants
    return c["IMAGES"] * c["PH"] * c["PW"] if is_halo(made) else c["BLOCK_M"]


def assert_equal_definition(operator: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = results(operator, inputs, GRID, WINDOW, backend="triton")
    expected = results(operator, inputs, GRID, WINDOW, backend="dense")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``auto`` take the kernels, as on a GPU."""
    monkeypatch.setattr(functional, "_path", lambda backend, *_: backend.replace("auto", "triton"))


def has_many_rows(made: Launch) -> bool:
    return is_halo(made) and queries(made) > 32


def halo_forward(made: Launch) -> bool:
    return is_halo(made) and not is_backward(made)


def halo_backward(made: Launch) -> bool:
    return is_halo(made) and is_backward(made)


@pytest.mark.parametrize(
    ("refuses", "error"),
    [
        pytest.param(has_many_rows, TOO_LARGE, id="large-tiles"),
        pytest.param(halo_forward, TOO_LARGE, id="halo-forward"),
        pytest.param(halo_backward, TOO_LARGE, id="halo-backward"),
        pytest.param(is_halo, TOO_LARGE, id="halo"),
        pytest.param(is_halo, PTXASError("it raised SIGSEGV"), id="halo-by-ptxas"),
        pytest.param(is_halo, RuntimeError("PassManager::run failed"), id="halo-by-a-pass"),
    ],
)
def test_lca_takes_what_the_gpu_takes(refuse, refuses, error):
    refused = refuse(refuses, error)
    inputs = make_inputs(LCA, GRID, batch=9, heads=1)
    assert_equal_definition(LCA, inputs)
    times = len(refused)
    assert times > 0
    assert_equal_definition(LCA, inputs)
    assert len(refused) == times  # what was refused is not tried again


def test_mlka_takes_what_the_gpu_takes(refuse):
    refused = refuse(lambda made: made.constants.get("BLOCK_N", 0) > 32)
    inputs = make_inputs(MLKA, GRID, batch=9, heads=1)
    assert_equal_definition(MLKA, inputs)
    times = len(refused)
    assert times > 0
    assert_equal_definition(MLKA, inputs)
    assert len(refused) == times


def test_other_errors_are_no_refusals(refuse):
    refuse(is_halo, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        LCA(*make_inputs(LCA, GRID)[:3], GRID, WINDOW, backend="triton")


def test_what_is_struck_is_what_was_refused(refuse):
    """Another thread may have gone on to smaller tiles since."""
    refuse(has_many_rows)
    problem = Problem("halo_forward", Geometry.of(GRID, WINDOW), 16, True, EXACT, Target.of(90))
    first, second = candidates(problem)[:2]
    with pytest.warns(RuntimeWarning, match="are refused"):
        _choice.refuse(problem, first, "too large")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _choice.refuse(problem, first, "too large")
    assert _choice.choose(problem) == second


def test_refused_tiles_are_told(refuse):
    refuse(has_many_rows)
    inputs = make_inputs(LCA, GRID, batch=9, heads=1)
    with pytest.warns(RuntimeWarning, match=r"halo_forward of a 4x5 grid.*126976.*101376"):
        LCA(*inputs[:3], GRID, WINDOW, backend="triton")


def test_what_forward_saves_does_not_depend_on_refusals(refuse):
    """Compiled graphs and saved tensors rest on its shape."""
    key = torch.randn(2, 20, 16, device=DEVICE, dtype=EXACT)
    query, bound = torch.randn_like(key.expand(3, -1, -1, -1)), key.new_ones(2)
    op = torch.ops.rlr_fast.local_cross_attention
    sizes = [op(query, key, bound, key, list(GRID), list(WINDOW))[1].shape]
    refuse(is_halo)
    with pytest.warns(RuntimeWarning):
        sizes.append(op(query, key, bound, key, list(GRID), list(WINDOW))[1].shape)
    assert sizes[0] == sizes[1] == (0,)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_when_no_tiles_are_left_an_explicit_request_is_refused(refuse, operator, direction):
    refuse(is_backward if direction == "backward" else lambda made: "D" in made.constants)
    inputs = make_inputs(operator, GRID, batch=1, heads=1)
    message = (
        r"backend 'triton' cannot run here: raster_\w+ of a 4x5 grid, window 3x5, head width 16"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendError, match=message + r".*capability 9\.0.*126976"):
            results(operator, inputs, GRID, WINDOW, backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_when_no_tiles_are_left_auto_goes_on_tiled_and_says_so_once(
    refuse, monkeypatch, operator, direction
):
    take_kernels(monkeypatch)
    refuse(is_backward if direction == "backward" else lambda made: "D" in made.constants)
    inputs = make_inputs(operator, GRID, batch=1, heads=1)
    expected = results(operator, inputs, GRID, WINDOW, backend="dense")
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            actual = results(operator, inputs, GRID, WINDOW, backend="auto")
    assert sum("'auto' goes on with 'tiled'" in str(w.message) for w in told) == 1
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)


def test_inference_needs_no_backward_pass(refuse):
    refused = refuse(is_backward)
    inputs = make_inputs(LCA, GRID, batch=1, heads=1)
    with torch.no_grad():
        LCA(*(x.requires_grad_() for x in inputs[:3]), GRID, WINDOW, backend="triton")
    assert not refused


def test_auto_under_compile_is_decided_before_the_graph(refuse, monkeypatch):
    torch.compiler.reset()
    take_kernels(monkeypatch)
    refuse(is_backward)
    inputs = make_inputs(LCA, GRID, batch=9, heads=1)
    compiled = torch.compile(LCA, backend="aot_eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="goes on with 'tiled'"):
        actual = results(compiled, inputs, GRID, WINDOW, backend="auto")
    expected = results(LCA, inputs, GRID, WINDOW, backend="dense")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refuses", [is_halo, is_backward], ids=["halo", "backward"])
def test_block_whose_kernels_are_refused(refuse, monkeypatch, refuses):
    """Its keys are prepared for the kernels, in log2 units, before any is launched."""
    heads, width, tokens = 1, 16, 20
    projected = torch.randn(2, tokens, 3 * heads * width, device=DEVICE, dtype=EXACT)
    reference = torch.randn(tokens, 3 * heads * width, device=DEVICE, dtype=EXACT)
    grad = torch.randn(2, tokens, 2 * heads * width, device=DEVICE, dtype=EXACT)

    def run(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (projected, reference)]
        output = block_attention(
            leaves[0], prepare_reference(leaves[1], heads, backend), GRID, WINDOW
        )
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    expected = run("dense")
    refuse(refuses)
    take_kernels(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for actual, exact in zip(run("auto"), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)
        if refuses is is_backward:
            with pytest.raises(BackendError, match="triton"):
                run("triton")


# What the table knows.


@pytest.mark.parametrize("architecture", [86, 89, 120])
def test_backward_in_float32_fits_small_gpus(architecture):
    """64x64, d 16, window 11: the paper's first level, which asked for 126,976 of 101,376 bytes."""
    geometry, target = Geometry.of((64, 64), (11, 11)), Target.of(architecture)
    assert fits_in_shared_memory(geometry, 16, torch.float32, target)
    large = Problem("halo_backward", geometry, 16, False, torch.float32, Target.of(90))
    small = large._replace(target=target)
    assert candidates(small)[0] != candidates(large)[0]


def test_backward_fits_tensor_memory():
    """64x64, d 16, window 13: asked for 576 of 512 columns."""
    geometry = Geometry.of((64, 64), (13, 13))
    problems = [
        Problem("halo_backward", geometry, 16, False, torch.bfloat16, Target.of(architecture))
        for architecture in (90, 100)
    ]
    assert candidates(problems[0])[0] not in candidates(problems[1])
    assert candidates(problems[1])


@pytest.mark.parametrize(("grid", "window"), [((12, 12), 11), ((9, 9), 5), ((9, 13), 5)])
def test_pipelines_whose_loop_nobody_enters_have_one_stage(grid, window):
    """In bfloat16 on sm_90 ptxas 12.9 ends with a segmentation fault there."""

    def stages(grid: tuple[int, int], window: int) -> int:
        geometry = Geometry.of(grid, (window, window))
        problem = Problem("raster_forward", geometry, 64, False, torch.bfloat16, Target.of(90))
        return candidates(problem)[0].stages

    assert stages(grid, window) == 1
    assert stages((16, 16), 5) > 1


# A trial, by Triton's own compiler and limits, of a device that a CPU imitates.
TRIAL = """
import json, torch
from tests.ptx.driver import machine_as_device
from rlr_fast.kernels import _choice, _trial, lca
from rlr_fast.kernels.lca.forward import forward_kernel
from rlr_fast.kernels.tiles import HaloTiles

def compiled():
    return sum(len(caches[0]) for caches in forward_kernel.device_caches.values())

query, key = torch.randn(2, 1, 42, 16).bfloat16(), torch.randn(1, 42, 16).bfloat16()
with _choice.forced(architecture=80), machine_as_device("80") as log:
    taken = _trial.refusal("lca", query, key, (6, 7), (3, 5), False)
    after_trial, ran = compiled(), len(log.runs)
    lca.local_cross_attention(query, key, key, (6, 7), (3, 5), 0.25)
    after_launch = compiled()
query, key = torch.empty(2, 1, 256, 16), torch.empty(1, 256, 16)
large = HaloTiles(8, 8, 1, stages=1)
with _choice.forced(architecture=86, halo_forward=large), machine_as_device("86"):
    refused = _trial.refusal("lca", query, key, (16, 16), (11, 11), False)
print(json.dumps([taken, after_trial, ran, after_launch, refused]))
"""


def test_a_trial_compiles_what_a_launch_finds_compiled(compiler):
    taken, after_trial, ran, after_launch, refused = compiler.values(TRIAL)
    assert taken is None
    assert (after_trial, ran) == (1, 0)
    assert after_launch == 1
    assert "shared memory, Required: " in refused
    assert "Hardware limit: 101376" in refused
