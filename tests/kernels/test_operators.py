"""The kernels as operators of PyTorch: registration, compilation, derivatives, checkpoints."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, LCA, OPERATORS, make_inputs, results
from torch import Tensor
from torch.autograd import forward_ad

from rlr_fast.functional import block_attention, prepare_reference
from rlr_fast.kernels import block, lca, mlka, reference


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_pass_opcheck(operator):
    module = lca.op if operator is LCA else mlka.op
    query, key, value, _ = (
        x.requires_grad_() for x in make_inputs(operator, (3, 4), batch=2, dtype=torch.float32)
    )
    torch.library.opcheck(reference._prepare, (key, 0.25))
    prepared, bound = reference.prepare_key(key.detach(), 0.25)
    arguments = (query, prepared.requires_grad_(), bound, value, [3, 4], [3, 3])
    torch.library.opcheck(module._forward, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [3, 31], ids=["halo", "raster"])
def test_block_operator_passes_opcheck(window):
    projected = torch.randn(2, 12, 96, device=DEVICE, requires_grad=True)
    keys = torch.randn(4, 12, 16, device=DEVICE, requires_grad=True)
    value = torch.randn(2, 12, 16, device=DEVICE, requires_grad=True)
    bound = torch.ones(4, device=DEVICE)
    torch.library.opcheck(block._forward, (projected, keys, bound, value, [3, 4], [window, window]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_a_graph_break(operator):
    torch.compiler.reset()
    inputs = make_inputs(operator, (6, 6), dtype=torch.float32)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = results(compiled, inputs, (6, 6), 3, backend="triton")
    expected = results(operator, inputs, (6, 6), 3, backend="triton")
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivative_is_refused(operator):
    inputs = make_inputs(operator, (4, 4))
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    output = operator(query, key, value, (4, 4), 3, backend="triton")
    (grad,) = torch.autograd.grad(output, query, inputs[3].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*dense"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_is_refused(operator):
    query, key, value, tangent = make_inputs(operator, (4, 4))

    def attend(x: Tensor) -> Tensor:
        return operator(x, key, value, (4, 4), 3, backend="triton")

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*dense"):
        torch.func.jvp(attend, (query,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attend(forward_ad.make_dual(query, tangent))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_torch_func_are_refused_and_its_vmap_is_right(operator):
    query, key, value, _ = make_inputs(operator, (4, 4))

    def attend(x: Tensor, backend: str = "triton") -> Tensor:
        return operator(x, key, value, (4, 4), 3, backend=backend)

    with pytest.raises(RuntimeError, match=r"torch\.func does not differentiate.*'tiled'"):
        torch.func.grad(lambda x: attend(x).sum())(query)
    many = torch.stack([query, query.flip(0)])
    expected = torch.func.vmap(lambda x: attend(x, "dense"))(many)
    torch.testing.assert_close(torch.func.vmap(attend)(many), expected)


def test_forward_mode_through_a_block_is_refused():
    projected = torch.randn(42, 96, device=DEVICE)
    tokens = torch.randn(2, 42, 96, device=DEVICE)
    prepared = prepare_reference(projected, 2, "triton")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tokens, tokens)
        with pytest.raises(RuntimeError, match="forward-mode"):
            block_attention(dual, prepared, (6, 7), 3)
        with pytest.raises(RuntimeError, match="forward-mode"):
            prepare_reference(forward_ad.make_dual(projected, projected), 2, "triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_checkpointed_gradients_are_the_same(operator):
    inputs = make_inputs(operator, (5, 6))

    def checkpointed(*args: Any, **options: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(operator, *args, use_reentrant=False, **options)

    actual = results(checkpointed, inputs, (5, 6), 3, backend="triton")
    expected = results(operator, inputs, (5, 6), 3, backend="triton")
    for name in actual:
        assert torch.equal(actual[name], expected[name])
