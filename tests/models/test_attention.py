"""The attention modules, against torch.nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlr_fast.functional import BackendError
from rlr_fast.models.attention import (
    CrossAttention,
    LocalCrossAttention,
    MaskedLearnableKeyAttention,
    SelfAttention,
)
from rlr_fast.ops.dense import inside_window

GRID, DIM, HEADS = (5, 6), 12, 3
INSIDE = inside_window(GRID, (3, 5))
# Name, module, which of query, key and value come from the tokens, hidden keys.
CASES = [
    pytest.param(SelfAttention, (True, True, True), None, id="self"),
    pytest.param(CrossAttention, (True, False, False), None, id="cross"),
    pytest.param(LocalCrossAttention, (True, False, False), ~INSIDE, id="lca"),
    pytest.param(MaskedLearnableKeyAttention, (True, False, True), INSIDE, id="mlka"),
]
MODULES = [pytest.param(case.values[0], id=case.id) for case in CASES]


def make_pair(kind: type) -> tuple[nn.Module, nn.MultiheadAttention]:
    """The module and PyTorch's with the same parameters, the biases not zero."""
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    for parameter in (theirs.in_proj_bias, theirs.out_proj.bias):
        nn.init.normal_(parameter)
    ours = kind(DIM, HEADS, GRID, (3, 5)).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("kind", "from_tokens", "hidden"), CASES)
def test_equals_multihead_attention(kind, from_tokens, hidden):
    ours, theirs = make_pair(kind)
    tokens = torch.randn(2, 30, DIM, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(30, DIM, dtype=torch.float64, requires_grad=True)
    repeated = reference.expand(2, -1, -1)
    sources = [tokens if own else repeated for own in from_tokens]
    expected, _ = theirs(*sources, need_weights=False, attn_mask=hidden)
    actual = ours(tokens, reference)
    torch.testing.assert_close(actual, expected)

    grad_output = torch.randn_like(actual)
    names = [name for name, _ in theirs.named_parameters()]

    def grads(output: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
        leaves = [tokens, reference, *(module.get_parameter(name) for name in names)]
        return torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)

    for name, ours_grad, theirs_grad in zip(
        ["tokens", "reference", *names],
        grads(actual, ours),
        grads(expected, theirs),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, msg=f"gradient of {name}")


@pytest.mark.parametrize("kind", MODULES)
def test_starts_as_multihead_attention_starts(kind):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(DIM, HEADS).state_dict()
    torch.manual_seed(3)
    ours = kind(DIM, HEADS, GRID, 3).state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", [LocalCrossAttention, MaskedLearnableKeyAttention])
def test_reference_is_projected_without_the_batch(kind, monkeypatch):
    shapes = []
    linear = nn.functional.linear

    def recorded(x, *parameters):
        shapes.append(tuple(x.shape))
        return linear(x, *parameters)

    monkeypatch.setattr(nn.functional, "linear", recorded)
    kind(DIM, HEADS, GRID, 3)(torch.randn(4, 30, DIM), torch.randn(30, DIM))
    assert (30, DIM) in shapes
    assert shapes.count((4, 30, DIM)) == 3 - shapes.count((30, DIM)) + 1  # and the output map


@pytest.mark.parametrize("kind", [LocalCrossAttention, MaskedLearnableKeyAttention])
def test_backend_is_passed_on(kind):
    tokens, reference = torch.randn(2, 30, DIM), torch.randn(30, DIM)
    module = kind(DIM, HEADS, GRID, 3, backend="dense")
    dense = module(tokens, reference)
    module.backend = "tiled"
    torch.testing.assert_close(module(tokens, reference), dense)
    module.backend = "triton"
    with pytest.raises(RuntimeError, match="triton"):
        module(tokens, reference)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5, GRID, 3), "heads must be positive and divide dim, got heads=5 and dim=12"),
        ((12, 0, GRID, 3), "heads must be positive"),
        ((12, 3, GRID, 2), "window must be odd and positive"),
        ((12, 3, GRID, 3, "gpu"), "backend must be one of"),
    ],
)
def test_wrong_constructor_argument_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


@pytest.mark.parametrize("kind", [LocalCrossAttention, MaskedLearnableKeyAttention])
def test_head_width_that_the_backend_lacks_is_refused_at_once(kind):
    pytest.importorskip("triton")
    with pytest.raises(BackendError, match="head width d of 16, 32, 64, 128, got 4"):
        kind(DIM, 3, GRID, 3, "triton")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("tokens", "reference", "message"),
    [
        ((2, 29, 12), (30, 12), r"tokens must be \(B, 30, 12\), got \(2, 29, 12\)"),
        ((30, 12), (30, 12), "tokens must be"),
        ((2, 30, 12), (1, 30, 12), r"reference must be \(30, 12\), got \(1, 30, 12\)"),
        ((2, 30, 12), (30, 11), "reference must be"),
    ],
)
def test_wrong_shape_is_named(kind, tokens, reference, message):
    with pytest.raises(ValueError, match=message):
        kind(DIM, HEADS, GRID, 3)(torch.zeros(tokens), torch.zeros(reference))


@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_exports_with_any_batch_size(backend):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = LocalCrossAttention(DIM, HEADS, GRID, 3, backend=backend)
            self.masked = MaskedLearnableKeyAttention(DIM, HEADS, GRID, 3, backend=backend)
            self.reference = nn.Parameter(torch.randn(30, DIM))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.local(tokens, self.reference) + self.masked(tokens, self.reference)

    model = Both().eval()
    batch = torch.export.Dim("batch")  # a bound that a mask's size would set is an error
    program = torch.export.export(model, (torch.randn(2, 30, DIM),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        tokens = torch.randn(size, 30, DIM)
        torch.testing.assert_close(program.module()(tokens), model(tokens))
