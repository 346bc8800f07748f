"""The two attention operators: the dense definition, and the tiled path against it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import assert_within_budget, rounded_terms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlr_fast import functional
from rlr_fast.functional import (
    local_cross_attention,
    masked_learnable_key_attention,
    resolve_backend,
    unsupported_reason,
    window_pair,
)
from rlr_fast.ops import dense
from rlr_fast.ops.tiled import lca, masks, mlka

Operator = Callable[..., Tensor]
OPERATORS = [
    pytest.param(local_cross_attention, id="lca"),
    pytest.param(masked_learnable_key_attention, id="mlka"),
]
KEY_FORMS = [
    pytest.param((False, False), id="shared"),
    pytest.param((False, True), id="shared-key"),
    pytest.param((True, False), id="shared-value"),
    pytest.param((True, True), id="per-image"),
]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor


def make_inputs(
    grid: tuple[int, int],
    batch: int = 2,
    heads: int = 2,
    width: int = 8,
    per_image: tuple[bool, bool] = (False, False),
    dtype: torch.dtype = torch.float64,
    strided: bool = False,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs; ``strided`` ones are laid out (…, N, h, d), as projections give them."""

    def draw(*lead: int) -> Tensor:
        shape = (grid[0] * grid[1], heads) if strided else (heads, grid[0] * grid[1])
        x = torch.randn(*lead, *shape, width, dtype=dtype, device=device)
        return x.transpose(-2, -3) if strided else x

    key, value = (draw(batch) if own else draw() for own in per_image)
    return Inputs(draw(batch), key, value, draw(batch))


def results(
    operator: Operator, inputs: Inputs, grid: tuple[int, int], window: Any, **options: Any
) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    output = operator(query, key, value, grid, window, **options)
    grads = torch.autograd.grad(output, (query, key, value), inputs.grad_output)
    return dict(zip(("output", "dquery", "dkey", "dvalue"), (output.detach(), *grads), strict=True))


def check_tiled(operator: Operator, inputs: Inputs, grid: tuple[int, int], window: Any) -> None:
    """Compare the tiled path with the definition, forward and backward."""
    actual = results(operator, inputs, grid, window, backend="tiled")
    eager = results(operator, inputs, grid, window, backend="dense")
    doubled = Inputs(*(x.double() for x in inputs))
    exact = results(operator, doubled, grid, window, backend="dense")
    terms = rounded_terms(inputs)
    for name in actual:
        assert_within_budget(name, actual[name], eager[name], exact[name], terms[name])


def loop(
    outside: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """The operator in words, one query after the other, without a mask."""
    output = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = (x[b, h] if x.dim() == 4 else x[h] for x in (key, value))
            for i in range(query.shape[2]):
                seen = []
                for j in range(query.shape[2]):
                    dy, dx = abs(i // grid[1] - j // grid[1]), abs(i % grid[1] - j % grid[1])
                    inside = 2 * dy < window[0] and 2 * dx < window[1]
                    if inside != outside:
                        seen.append(j)
                if seen:
                    weights = (k[seen] @ query[b, h, i] * scale).softmax(0)
                    output[b, h, i] = weights @ v[seen]
    return output


# The definition.


@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        pytest.param((3, 4), (3, 3), id="clipped-at-corners"),
        pytest.param((4, 3), (1, 5), id="pair-wider-than-grid"),
        pytest.param((3, 3), (3, 3), id="only-center-has-no-outside-key"),
        pytest.param((3, 2), (5, 3), id="no-outside-key-at-all"),
        pytest.param((1, 1), (1, 1), id="one-token"),
    ],
)
def test_dense_equals_loop_over_queries(operator, per_image, grid, window):
    inputs = make_inputs(grid, width=3, per_image=per_image)
    outside = operator is masked_learnable_key_attention
    expected = loop(outside, *inputs[:3], grid, window, 0.7)
    actual = operator(*inputs[:3], grid, window, scale=0.7, backend="dense")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        pytest.param((3, 4), (3, 3), id="clipped"),
        pytest.param((3, 3), (3, 3), id="one-row-without-keys"),
        pytest.param((2, 2), (3, 3), id="no-row-with-keys"),
    ],
)
def test_dense_gradients_are_derivatives(operator, per_image, grid, window):
    inputs = make_inputs(grid, heads=1, width=2, per_image=per_image)
    leaves = tuple(x.requires_grad_() for x in inputs[:3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: operator(q, k, v, grid, window, backend="dense"), leaves
    )


# The tiled path.


@pytest.fixture
def small_tiles(monkeypatch):
    """Make LCA choose its tiles from the sides given, and small."""

    def choose(*sides: int) -> None:
        monkeypatch.setattr(lca, "TILE_SIDES", sides)
        monkeypatch.setattr(lca, "KEY_COST", 0)
        lca._remembered_tiling.cache_clear()

    yield choose
    lca._remembered_tiling.cache_clear()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        pytest.param((7, 9), 5, id="odd-grid"),
        pytest.param((1, 1), 3, id="one-token"),
        pytest.param((5, 5), 5, id="window-covers-grid-from-center"),
        pytest.param((5, 5), 9, id="window-covers-grid"),
        pytest.param((3, 19), (9, 3), id="pair-higher-than-grid"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_tiled_equals_dense(operator, grid, window, per_image, batch, dtype):
    check_tiled(
        operator, make_inputs(grid, batch=batch, per_image=per_image, dtype=dtype), grid, window
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("window", [1, 3, 7, 11, 17, 31, (1, 13), (31, 3)], ids=str)
def test_tiled_equals_dense_for_every_size_of_window(operator, window):
    check_tiled(operator, make_inputs((16, 16), dtype=torch.float32), (16, 16), window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        pytest.param((13, 10), 5, id="ragged-tiles"),
        pytest.param((5, 5), 5, id="window-covers-grid-from-center"),
    ],
)
def test_tiled_in_half_precision_errs_as_little_as_dense(operator, grid, window, per_image, dtype):
    check_tiled(
        operator, make_inputs(grid, batch=3, per_image=per_image, dtype=dtype), grid, window
    )


@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_tiled_reads_strided_inputs(operator, per_image):
    inputs = make_inputs((6, 7), per_image=per_image, strided=True)
    assert not inputs.query.is_contiguous()
    check_tiled(operator, inputs, (6, 7), 3)


@pytest.mark.parametrize("grid", [(13, 10), (8, 8), (1, 37)], ids=str)
@pytest.mark.parametrize("per_image", KEY_FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_tiled_in_many_calls_equals_dense(operator, per_image, grid, monkeypatch, small_tiles):
    monkeypatch.setattr(mlka, "QUERIES_PER_CALL", 7)
    monkeypatch.setattr(masks, "MASK_ENTRIES", 1)
    small_tiles(2)
    calls = []
    forgotten = masks._forgotten

    def counted(*arguments):
        calls.append(arguments)
        return forgotten(*arguments)

    monkeypatch.setattr(masks, "_forgotten", counted)
    check_tiled(operator, make_inputs(grid, batch=3, per_image=per_image), grid, 5)
    assert len(calls) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [3, (5, 1), (1, 31), (3, 31), (11, 3)], ids=str)
@pytest.mark.parametrize("queries", [5, 9, 18], ids=["a-row", "2-rows", "4-rows"])
@pytest.mark.parametrize("per_image", KEY_FORMS)
def test_bands_of_rows_equal_dense(per_image, queries, window, dtype, monkeypatch):
    monkeypatch.setattr(mlka, "QUERIES_PER_BAND", queries)
    monkeypatch.setattr(mlka, "_chunked", None)
    inputs = make_inputs((29, 5), batch=3, per_image=per_image, dtype=dtype)
    check_tiled(masked_learnable_key_attention, inputs, (29, 5), window)


@pytest.mark.parametrize("per_image", KEY_FORMS)
def test_bands_read_strided_inputs(per_image, monkeypatch):
    monkeypatch.setattr(mlka, "QUERIES_PER_BAND", 1)
    inputs = make_inputs((9, 7), per_image=per_image, strided=True)
    check_tiled(masked_learnable_key_attention, inputs, (9, 7), 3)
    transposed = inputs._replace(query=inputs.query.mT.contiguous().mT)
    assert transposed.query.stride(-1) != 1
    check_tiled(masked_learnable_key_attention, transposed, (9, 7), 3)


def test_bands_take_any_gradient_and_refuse_its_derivative(monkeypatch):
    monkeypatch.setattr(mlka, "QUERIES_PER_BAND", 1)
    inputs = make_inputs((6, 5))
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    found, expected = (
        torch.autograd.grad(
            masked_learnable_key_attention(query, key, value, (6, 5), 3, backend=backend).sum(),
            (query, value),
            create_graph=True,
        )
        for backend in ("tiled", "dense")
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        found[0].sum().backward()


@pytest.mark.parametrize("halos", [1, 1 << 12], ids=["a-row", "some-rows"])
@pytest.mark.parametrize("entries", [4000, 1], ids=["kept-masks", "many-calls"])
@pytest.mark.parametrize("per_image", KEY_FORMS)
def test_rows_of_tiles_that_share_a_mask_equal_dense(
    per_image, entries, halos, monkeypatch, small_tiles
):
    monkeypatch.setattr(masks, "MASK_ENTRIES", entries)
    monkeypatch.setattr(lca, "HALO_ENTRIES", halos)
    small_tiles(2)
    check_tiled(
        local_cross_attention, make_inputs((17, 7), batch=3, per_image=per_image), (17, 7), 5
    )


@pytest.mark.parametrize("sides", [(1,), (2,), (4,), (8,), (3, 16)], ids=str)
def test_local_tiles_of_every_size_equal_dense(sides, small_tiles):
    small_tiles(*sides)
    check_tiled(local_cross_attention, make_inputs((18, 11)), (18, 11), (3, 5))
    tile_y, tile_x = (axis[1] for axis in lca._remembered_tiling((18, 11), (3, 5), 2))
    assert tile_y in sides
    assert tile_x in (*sides, 11)


@pytest.mark.parametrize(
    ("backend", "queries"),
    [("dense", 1024), ("tiled", 1024), pytest.param("tiled", 4, id="tiled-in-many-calls")],
)
def test_row_without_keys_is_zero_and_gives_no_gradient(backend, queries, monkeypatch):
    monkeypatch.setattr(mlka, "QUERIES_PER_CALL", queries)
    inputs = make_inputs((3, 5), dtype=torch.float32)
    found = results(masked_learnable_key_attention, inputs, (3, 5), (3, 5), backend=backend)
    empty = [7]  # the center is the one token whose window holds all of 3x5
    for name in ("output", "dquery"):
        assert (found[name][:, :, empty] == 0).all()
        assert (found[name][:, :, :7].abs().amax(-1) > 0).all()
    only_empty = torch.zeros_like(inputs.grad_output)
    only_empty[:, :, empty] = 1
    found = results(
        masked_learnable_key_attention,
        inputs._replace(grad_output=only_empty),
        (3, 5),
        (3, 5),
        backend=backend,
    )
    assert all((found[name] == 0).all() for name in ("dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_scores_of_any_size_stay_finite(operator):
    inputs = make_inputs((6, 6), dtype=torch.float32)
    found = results(operator, inputs._replace(query=inputs.query * 1e6), (6, 6), 3, backend="tiled")
    assert all(x.isfinite().all() for x in found.values())
    assert found["output"].abs().max() <= inputs.value.abs().max() * 1.0001


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_batch(operator, dtype):
    inputs = make_inputs((4, 4), batch=0, dtype=dtype)
    found = results(operator, inputs, (4, 4), 3)
    assert found["output"].shape == (0, 2, 16, 8)
    assert (found["dkey"] == 0).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_batch_with_keys_of_its_own(operator):
    """Whose grid is cut into groups of tiles."""
    grid, window = (64, 64), 21
    query, key, value = (torch.randn(0, 1, 4096, 8, requires_grad=True) for _ in range(3))
    output = operator(query, key, value, grid, window, backend="tiled")
    output.sum().backward()
    assert output.shape == key.grad.shape == (0, 1, 4096, 8)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_scale_shows_a_hidden_key(operator):
    inputs = make_inputs((6, 7), dtype=torch.float32)[:3]
    found, expected = (
        operator(*inputs, (6, 7), 3, scale=1e30, backend=b) for b in ("tiled", "dense")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms_of_torch_take_any_grid(operator):
    """Grids of one call, of kept and of many masks, and of bands of rows."""
    for grid, window, batch in (((6, 5), 3, 2), ((40, 40), 5, 1), ((64, 64), 21, 8)):
        tokens = grid[0] * grid[1]
        query, key = torch.randn(batch, 1, tokens, 4), torch.randn(1, tokens, 4)

        def loss(query, key=key, grid=grid, window=window):
            return operator(query, key, key, grid, window, backend="tiled").square().sum()

        leaf = query.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(query), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_mask_first_made_in_inference_mode_serves_training(operator):
    masks._kept_mask.cache_clear()
    inputs = make_inputs((6, 5))
    with torch.inference_mode():
        operator(*inputs[:3], (6, 5), 3, backend="tiled")
    check_tiled(operator, inputs, (6, 5), 3)


@pytest.mark.parametrize("many_calls", [False, True], ids=["one-call", "many-calls"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_lowers_once_and_keeps_the_gradients_dtype(operator, many_calls, monkeypatch):
    if many_calls:
        monkeypatch.setattr(mlka, "QUERIES_PER_CALL", 9)
        monkeypatch.setattr(masks, "MASK_ENTRIES", 500)
    inputs = make_inputs((6, 6), dtype=torch.float32)
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    with torch.autocast("cpu", torch.bfloat16):
        output = operator(query, key.bfloat16(), value, (6, 6), 3)
    assert output.dtype == torch.bfloat16
    expected = operator(*(x.bfloat16() for x in (query, key, value)), (6, 6), 3)
    assert torch.equal(output, expected)
    grad_output = inputs.grad_output.bfloat16()
    grads = torch.autograd.grad(output, (query, key, value), grad_output)
    for grad, wanted in zip(
        grads, torch.autograd.grad(expected, (query, key, value), grad_output), strict=True
    ):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("operator", "queries"),
    [
        pytest.param(local_cross_attention, 1024, id="lca"),
        pytest.param(masked_learnable_key_attention, 18, id="mlka-in-many-calls"),
    ],
)
def test_compiles_without_a_graph_break(operator, queries, monkeypatch):
    monkeypatch.setattr(mlka, "QUERIES_PER_CALL", queries)
    monkeypatch.setattr(mlka, "QUERIES_PER_BAND", 6)  # of the calls that are not traced
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args, **options: operator(*args, **options),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    inputs = make_inputs((6, 6), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = results(compiled, inputs, (6, 6), 3)
    expected = results(operator, inputs, (6, 6), 3)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


# Memory.


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest storage which an operation returns, in bytes."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return output


def memory(operator: Operator, side: int, backend: str) -> tuple[int, int]:
    """Return the largest tensor of forward and backward, and what the graph holds between them."""
    grid = (side, side)
    inputs = make_inputs(grid, batch=1, heads=1, dtype=torch.float32)
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    masks._kept_mask.cache_clear()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        output = operator(query, key, value, grid, 5, backend=backend)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    torch.autograd.grad(output, (query, key, value), inputs.grad_output)
    masks._kept_mask.cache_clear()
    with _LargestTensor() as mode:
        output = operator(query, key, value, grid, 5, backend=backend)
        torch.autograd.grad(output, (query, key, value), inputs.grad_output)
    return mode.largest, held


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_grows_linearly_with_tokens(operator, monkeypatch):
    # Small pieces, so that both sizes take many calls and no fixed cost hides the growth.
    monkeypatch.setattr(mlka, "QUERIES_PER_CALL", 128)
    monkeypatch.setattr(mlka, "QUERIES_PER_BAND", 128)
    monkeypatch.setattr(masks, "MASK_ENTRIES", 1 << 14)
    small, large = (memory(operator, side, "tiled") for side in (64, 128))
    assert large[0] < 1.3 * 4 * small[0]
    assert 0 < large[1] < 1.3 * 4 * small[1]


@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_of_the_shipped_sizes_grow_linearly(operator):
    small, large = (memory(operator, side, "tiled") for side in (64, 128))
    assert large[0] < 1.3 * 4 * small[0]
    assert large[0] < 4 * 128**4 / 8  # of one float32 score matrix


def test_memory_test_sees_a_quadratic_path():
    small, large = (memory(local_cross_attention, side, "dense") for side in (16, 32))
    assert large[0] > 12 * small[0]
    assert large[1] > 12 * small[1]


# Arguments.


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 12, 4)}, r"query must be \(B, h, N, d\).*\(2, 12, 4\)"),
        ({"query": torch.zeros(2, 2, 12, 0)}, "query must be"),
        ({"query": torch.zeros(2, 2, 12, 4, dtype=torch.int64)}, "query must be float32.*int64"),
        ({"key": torch.zeros(12, 4)}, r"key must be \(h, N, d\).*got shape \(12, 4\)"),
        ({"key": torch.zeros(1, 2, 12, 4)}, "key must be"),
        ({"value": torch.zeros(2, 11, 4)}, "value must be .*as the query"),
        ({"value": torch.zeros(2, 12, 4).double()}, "value must have the query's dtype"),
        ({"key": torch.zeros(2, 12, 4, device="meta")}, "key must be on the query's device cpu"),
        ({"grid": (3, 5)}, r"grid must have H·W = N = 12 tokens, got grid=\(3, 5\)"),
        ({"grid": (-3, -4)}, "grid must be two positive integers"),
        ({"grid": 12}, "grid must be two positive integers"),
        ({"grid": (12.0, 1.0)}, "grid must be two positive integers"),
        ({"window": 4}, "window must be odd and positive, got window=4"),
        ({"window": -3}, "window must be odd and positive"),
        ({"window": (3, 0)}, "window must be odd and positive"),
        ({"window": (3, 3, 3)}, "window must be an odd integer or a pair"),
        ({"window": 3.0}, "window must be an odd integer or a pair"),
        ({"window": "33"}, "window must be an odd integer or a pair"),
        ({"window": True}, "window must be an odd integer or a pair"),
        ({"scale": math.nan}, r"scale must be finite in torch.float32, got scale=nan"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"scale": 1e300}, "scale must be finite in torch.float32"),
        ({"scale": torch.tensor(0.5)}, "scale must be a number"),
        ({"scale": "0.5"}, "scale must be a number"),
        ({"query": None}, "query must be a dense tensor, got NoneType"),
        (
            {"value": torch.zeros(2, 12, 4).to_sparse()},
            "value must be a dense tensor, got torch.sparse",
        ),
        ({"backend": "cuda"}, "backend must be one of auto, triton, tiled, dense"),
    ],
)
def test_wrong_argument_is_named(operator, change, message):
    arguments: dict[str, Any] = {
        "query": torch.zeros(2, 2, 12, 4),
        "key": torch.zeros(2, 12, 4),
        "value": torch.zeros(2, 12, 4),
        "grid": (3, 4),
        "window": 3,
    }
    with pytest.raises(ValueError, match=message):
        operator(**(arguments | change))


def test_windows_become_pairs():
    assert window_pair(5) == (5, 5)
    assert window_pair((3, 7)) == (3, 7)
    assert window_pair([3, 7]) == (3, 7)


def test_auto_takes_the_fastest_path_that_runs(device):
    # On a CPU the kernels run at most in Triton's interpreter: for proof, never for speed.
    runs = device.type == "cuda" and unsupported_reason("triton", device) is None
    expected = "triton" if runs else "tiled"
    assert resolve_backend("auto", device) == expected
    assert resolve_backend("dense", device) == "dense"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_window_beyond_every_number_is_one_that_covers_the_grid(operator, backend):
    inputs = make_inputs((4, 5))
    expected = operator(*inputs[:3], (4, 5), (7, 9), backend=backend)
    for window in (2**64 + 1, 10**30 + 1):
        assert torch.equal(operator(*inputs[:3], (4, 5), window, backend=backend), expected)


def test_default_scale_is_inverse_root_of_width():
    inputs = make_inputs((4, 4), width=8)
    for backend in ("dense", "tiled"):
        torch.testing.assert_close(
            local_cross_attention(*inputs[:3], (4, 4), 3, backend=backend),
            dense.local_cross_attention(*inputs[:3], (4, 4), (3, 3), 8**-0.5),
        )


def test_constants_are_marked_as_the_compiler_marks_them():
    kernels = pytest.importorskip("rlr_fast.kernels")
    mark = vars(torch.compiler.assume_constant_result(lambda: None))
    assert mark
    for function in (functional._warn_once, kernels._launch.capability, kernels._trial._tried):
        assert vars(function).items() >= mark.items()
