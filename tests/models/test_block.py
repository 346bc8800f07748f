"""Reconstructor and block against the paper's equations, written out with torch's own layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rlr_fast.models.attention import LocalCrossAttention
from rlr_fast.models.block import PreparedBlock, RLRBlock
from rlr_fast.models.reconstructor import Reconstructor, sincos_positions

GRID, WINDOW = (4, 5), 3


def inside_window(grid: tuple[int, int], window: int) -> torch.Tensor:
    n = grid[0] * grid[1]
    inside = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            dy, dx = abs(i // grid[1] - j // grid[1]), abs(i % grid[1] - j % grid[1])
            inside[i, j] = max(dy, dx) <= window // 2
    return inside


def by_torch(module, query, key, value, visible=None):
    """torch.nn.MultiheadAttention with the module's parameters, which get their gradients."""
    dim = module.in_proj_weight.shape[1]
    theirs = torch.nn.MultiheadAttention(dim, module.heads, batch_first=True)
    mask = None if visible is None else ~visible
    return torch.func.functional_call(
        theirs,
        dict(module.named_parameters()),
        (query, key, value),
        {"attn_mask": mask, "need_weights": False},
    )[0]


def block_by_torch(block: RLRBlock, y, references, second, first=1.0):
    """``first`` is 1 or θ₁, ``second`` is α or θ₂; ``references`` (N, C) or (K, N, C)."""
    inside = inside_window(GRID, WINDOW).to(y.device)
    each = [r.expand(len(y), -1, -1) for r in references.reshape(-1, *y.shape[1:])]
    mixed = 0
    for name, module in block.attention.items():
        if name == "mlka":
            mixed = mixed + first * by_torch(module, y, each[0], y, ~inside)
        elif name == "lca":
            mixed = mixed + second * sum(by_torch(module, y, r, r, inside) for r in each)
        elif name == "cross":
            mixed = mixed + second * by_torch(module, y, each[0], each[0])
        else:
            mixed = mixed + first * by_torch(module, y, y, y)
    z = block.norm1(mixed + y if block.residual else mixed)
    return block.norm2(z + block.fc2(F.gelu(block.fc1(z))))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "attention",
    [("mlka", "lca"), ("lca",), ("mlka",), ("cross",), ("self",), ("cross", "mlka")],
    ids="+".join,
)
def test_block_is_equations_4_and_5_for_every_row_of_table_3(attention, residual):
    block = RLRBlock(
        16, 2, GRID, WINDOW, attention=attention, alpha=3.0, residual=residual
    ).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    y, reference = torch.randn(2, 20, 16).double(), torch.randn(20, 16).double()
    expected = block_by_torch(block, y, reference, 3.0)
    torch.testing.assert_close(block(y, reference), expected)
    # The paper's pair of branches runs as one product in and one out.
    prepared = block.prepare(reference)
    assert isinstance(prepared, PreparedBlock) == (set(attention) == {"mlka", "lca"})
    torch.testing.assert_close(block(y, prepared), expected)


def assert_is_the_equations(block: RLRBlock, references: torch.Tensor, *weights) -> None:
    """Output and every gradient, from the references as they are and from those prepared."""
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    y = torch.randn(2, *references.shape[-2:]).to(references).requires_grad_()
    leaves = [y, references.requires_grad_(), *block.parameters()]
    grad_output = torch.randn_like(y)
    expected = block_by_torch(block, y, references, *weights)
    grads = torch.autograd.grad(expected, leaves, grad_output)
    for prepare in (lambda r: r, block.prepare):
        output = block(y, prepare(references))
        torch.testing.assert_close(output, expected)
        found = torch.autograd.grad(output, leaves, grad_output)
        torch.testing.assert_close(found, grads)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "attention",
    [("mlka", "lca"), ("cross", "mlka"), ("lca", "self"), ("self", "cross", "mlka", "lca")],
    ids="+".join,
)
def test_learned_fusion_is_equation_17_with_the_gradients_of_theta(attention, residual):
    block = RLRBlock(
        16, 2, GRID, WINDOW, attention=attention, fusion="learned", residual=residual
    ).double()
    reference = torch.randn(20, 16).double()
    assert_is_the_equations(block, reference, block.theta[1], block.theta[0])
    assert block.theta.shape == (2,)


@pytest.mark.parametrize(
    ("backend", "fusion", "count"),
    [
        ("dense", "fixed", 2),
        ("dense", "learned", 3),
        ("tiled", "fixed", 3),
        ("tiled", "learned", 2),
        ("triton", "learned", 2),
    ],
)
def test_lca_is_summed_over_the_references(backend, fusion, count, device):
    dtype = torch.float64
    if backend == "triton":
        pytest.importorskip("triton")
        dtype = torch.float32 if device.type == "cuda" else dtype  # all that its kernels take there
    block = RLRBlock(32, 2, GRID, WINDOW, fusion=fusion, backend=backend).to(device, dtype)
    weights = (2.0,) if fusion == "fixed" else (block.theta[1], block.theta[0])
    assert_is_the_equations(block, torch.randn(count, 20, 32).to(device, dtype), *weights)


@pytest.mark.parametrize("attention", [("lca",), ("cross", "lca"), ("self", "lca")], ids="+".join)
def test_only_lca_sees_more_than_the_first_reference(attention):
    block = RLRBlock(16, 2, GRID, WINDOW, attention=attention).double()
    assert_is_the_equations(block, torch.randn(2, 20, 16).double(), 2.0)


def test_learned_fusion_starts_as_the_fixed_model():
    fixed = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2, alpha=3.0)
    learned = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2, alpha=3.0, fusion="learned")
    missing, unexpected = learned.load_state_dict(fixed.state_dict(), strict=False)
    assert missing == ["blocks.0.theta", "blocks.1.theta"] and not unexpected
    tokens = torch.randn(2, 20, 6)
    torch.testing.assert_close(learned(tokens), fixed(tokens))


def test_one_reference_and_fixed_fusion_have_the_tensors_they_always_had():
    block = ["norm1", "fc1", "fc2", "norm2", "attention.mlka.out_proj", "attention.lca.out_proj"]
    layers = ["token_in", "reference_in", "norm", "token_out", *(f"blocks.0.{n}" for n in block)]
    projections = [
        f"blocks.0.attention.{a}.in_proj_{kind}"
        for a in ("mlka", "lca")
        for kind in ("weight", "bias")
    ]
    state = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).state_dict()
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert set(state) == {"reference", *expected, *projections}
    assert state["reference"].shape == (20, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "learnt"}, "did you mean 'learned'"),
        ({"fusion": "learned", "attention": ("lca",)}, "theta_1 .* where fusion is learned"),
        ({"references": 2, "attention": ("mlka",)}, "references must be 1 without the branch lca"),
        ({"references": 0}, "references must be a positive integer of at most 65536, got"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Reconstructor(6, 16, 2, GRID, WINDOW, **options)


def test_similarity_is_the_mean_cosine_of_every_pair_of_references():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, references=3)
    cosines = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for a, b in zip(level.reference[i], level.reference[j], strict=True):
            cosines.append(a @ b / (a.norm() * b.norm()))
    torch.testing.assert_close(level.reference_similarity(), torch.stack(cosines).mean())
    with torch.no_grad():
        level.reference[:] = level.reference[0] * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert level.reference_similarity().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="references must be at least 2"):
        Reconstructor(6, 16, 2, GRID, WINDOW).reference_similarity()


VARIANT = {"fusion": "learned", "references": 2}


def test_a_replaced_or_watched_module_is_not_passed_by():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).eval()
    tokens = torch.randn(2, 20, 6)
    expected = level(tokens)
    block = level.blocks[0]
    seen = []
    handle = block.attention["mlka"].out_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(level(tokens), expected)
    handle.remove()
    assert seen == [1]
    plain = block.attention["lca"].out_proj
    block.attention["lca"].out_proj = torch.nn.Sequential(plain, torch.nn.Tanh())
    changed = level(tokens)
    assert not torch.allclose(changed, expected)
    block.attention["lca"].out_proj = plain
    assert torch.equal(level(tokens), expected)


class Louder(LocalCrossAttention):
    def forward(self, *args):
        return super().forward(*args) + 1


def make_louder(block):
    block.attention["lca"].__class__ = Louder


def replace_forward(block):
    out_proj = block.attention["mlka"].out_proj
    out_proj.forward = lambda x: torch.nn.functional.linear(x, 2 * out_proj.weight)


def replace_the_branchs_forward(block):
    branch = block.attention["lca"]
    branch.forward = lambda *args: type(branch).forward(branch, *args) + 1


def replace_by_a_map_without_bias(block):
    block.attention["mlka"].out_proj = torch.nn.Linear(16, 16, bias=False)


@pytest.mark.parametrize(
    "change",
    [make_louder, replace_forward, replace_the_branchs_forward, replace_by_a_map_without_bias],
)
def test_what_is_foreign_is_not_passed_by(change):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).eval()
    tokens = torch.randn(2, 20, 6)
    before = level(tokens)
    change(level.blocks[0])
    changed = level(tokens)
    assert not torch.allclose(changed, before)
    reference = level.reference_in(level.reference) + level.positions
    y = level.token_in(tokens) + level.positions
    assert level.blocks[0].prepare(reference) is reference
    assert torch.equal(level.token_out(level.norm(level.blocks[0](y, reference))), changed)


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["default", "variant"])
def test_checkpointing_keeps_less_and_changes_no_gradient(variant):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=4, **variant)
    tokens, weights = torch.randn(3, 20, 6), torch.randn(3, 20, 6)

    def run() -> tuple[int, list[torch.Tensor]]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        level.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = (level(tokens) * weights).sum()
        size = sum(kept.values())
        loss.backward()
        return size, [p.grad.clone() for p in level.parameters()]

    size, expected = run()
    level.grad_checkpointing = True
    smaller, grads = run()
    assert smaller < 0.6 * size
    for actual, grad in zip(grads, expected, strict=True):
        assert torch.equal(actual, grad)


@pytest.mark.parametrize("count", [1, 2])
def test_reconstructor_uses_one_projection_with_positions_in_all_blocks(count):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=3, references=count).double()
    tokens = torch.randn(2, 20, 6).double()
    positions = sincos_positions(GRID, 16).double()
    reference = level.reference_in(level.reference) + positions
    y = level.token_in(tokens) + positions
    for block in level.blocks:
        y = block_by_torch(block, y, reference, 2.0)
    torch.testing.assert_close(level(tokens), level.token_out(level.norm(y)))


def test_without_residual_a_token_does_not_see_itself():
    """With one block, changing a token changes its own output through the queries only."""
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1)
    with torch.no_grad():
        for block in level.blocks:
            for module in block.attention.values():
                module.in_proj_weight[:16].zero_()  # constant queries
    tokens = torch.randn(1, 20, 6)
    other = tokens.clone()
    other[0, 7] += 10
    assert torch.allclose(level(tokens)[0, 7], level(other)[0, 7], atol=1e-6)
    assert not torch.allclose(level(tokens)[0, 19], level(other)[0, 19], atol=1e-6)


def test_positions_are_the_written_formula_x_first():
    table = sincos_positions((3, 4), 8)
    for token in range(12):
        y, x = token // 4, token % 4
        for half, position in enumerate((x, y)):
            for k in range(2):
                angle = position * math.exp(-math.log(10000) * 2 * k / 4)
                assert table[token, 4 * half + 2 * k].item() == pytest.approx(math.sin(angle))
                assert table[token, 4 * half + 2 * k + 1].item() == pytest.approx(math.cos(angle))


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["default", "variant"])
def test_every_parameter_gets_a_gradient(variant):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2, **variant)
    (level(torch.randn(2, 20, 6)) * torch.randn(2, 20, 6)).sum().backward()
    for name, p in level.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_tokens_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \(B, 20, 6\)"):
        Reconstructor(6, 16, 2, GRID, WINDOW)(torch.randn(2, 21, 6))


def test_a_patch_of_neighboring_tokens_is_one_token():
    """The level is that of the joined tokens, written out position by position."""
    level = Reconstructor(6, 16, 2, (4, 6), WINDOW, blocks=2, patch=2)
    plain = Reconstructor(24, 16, 2, (2, 3), WINDOW, blocks=2)
    plain.load_state_dict(level.state_dict())
    tokens = torch.randn(2, 24, 6)
    maps = tokens.unflatten(1, (4, 6))
    corners = [maps[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    joined = plain(torch.cat(corners, -1).flatten(1, 2)).unflatten(1, (2, 3))
    expected = torch.empty_like(maps)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        expected[:, row::2, column::2] = joined[..., 6 * i : 6 * i + 6]
    torch.testing.assert_close(level(tokens), expected.flatten(1, 2))
    assert level.reference.shape == (6, 24)


def test_a_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"patches must divide .* got a patch of 2 .* 4x5"):
        Reconstructor(6, 16, 2, GRID, WINDOW, patch=2)


def test_unknown_branch_is_named():
    with pytest.raises(ValueError, match="did you mean 'mlka'"):
        RLRBlock(16, 2, GRID, WINDOW, attention=("mkla",))
