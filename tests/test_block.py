"""Reconstructor and block against the paper's equations, written out with torch's own layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from rlr_fast.block import PreparedBlock, Reconstructor, RLRBlock, sincos_positions

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
    """torch.nn.MultiheadAttention with the module's parameters."""
    dim = module.in_proj_weight.shape[1]
    theirs = torch.nn.MultiheadAttention(dim, module.heads, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    mask = None if visible is None else ~visible
    return theirs.double()(query, key, value, attn_mask=mask, need_weights=False)[0]


def block_by_torch(block: RLRBlock, y, reference, alpha):
    inside = inside_window(GRID, WINDOW)
    r = reference.expand(len(y), -1, -1)
    mixed = 0
    for name, module in block.attention.items():
        if name == "mlka":
            mixed = mixed + by_torch(module, y, r, y, ~inside)
        elif name == "lca":
            mixed = mixed + alpha * by_torch(module, y, r, r, inside)
        elif name == "cross":
            mixed = mixed + alpha * by_torch(module, y, r, r)
        else:
            mixed = mixed + by_torch(module, y, y, y)
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


@pytest.fixture
def prepared_blocks(monkeypatch):
    """The blocks that were prepared, one entry a time."""
    calls = []
    prepare = RLRBlock.prepare
    monkeypatch.setattr(RLRBlock, "prepare", lambda self, r: calls.append(self) or prepare(self, r))
    return calls


def test_inference_prepares_the_reference_once(prepared_blocks):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2).eval()
    tokens = torch.randn(2, 20, 6)
    with torch.inference_mode():
        first = level(tokens)
    with torch.no_grad():
        second = level(tokens)
    assert len(prepared_blocks) == 2
    assert torch.equal(first, second)
    level(tokens).sum().backward()  # gradients need their own
    assert len(prepared_blocks) == 4


def step(level: Reconstructor) -> None:
    optimizer = torch.optim.Adam(level.parameters(), lr=0.1)
    level(torch.randn(1, 20, 6)).square().sum().backward()
    optimizer.step()


def load(level: Reconstructor) -> None:
    level.load_state_dict(Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2).state_dict())


def replace_data(level: Reconstructor) -> None:
    level.reference.data = level.reference.data + 1


def train_and_return(level: Reconstructor) -> None:
    level.train()
    level.reference.data.add_(1)  # unseen by version counters
    level.eval()


@pytest.mark.parametrize(
    "change", [step, load, replace_data, train_and_return], ids=lambda f: f.__name__
)
def test_inference_sees_changed_weights(change):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2).eval()
    tokens = torch.randn(2, 20, 6)
    with torch.no_grad():
        before = level(tokens)
        with torch.enable_grad():
            change(level)
        after = level(tokens)
        fresh = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2).eval()
        fresh.load_state_dict(level.state_dict())
        assert torch.equal(after, fresh(tokens))
    assert not torch.allclose(before, after)


def test_inference_under_autocast_keeps_its_own(prepared_blocks):
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).eval()
    tokens = torch.randn(2, 20, 6)
    with torch.no_grad():
        plain = level(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert level(tokens).dtype == torch.bfloat16
        assert torch.equal(level(tokens), plain)


def test_copies_do_not_carry_what_inference_keeps():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).eval()
    tokens = torch.randn(2, 20, 6)
    with torch.no_grad():
        expected = level(tokens)
        other = copy.deepcopy(level)
        assert len(pickle.dumps(level)) == len(pickle.dumps(other))
        assert torch.equal(other(tokens), expected)
        other.reference.zero_()
        assert torch.equal(level(tokens), expected)


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


def test_parameters_made_in_inference_mode_are_used_without_keeping():
    with torch.inference_mode():
        level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=1).eval()
        tokens = torch.randn(2, 20, 6)
        before = level(tokens)
        level.reference.zero_()
        assert not torch.equal(level(tokens), before)


def test_checkpointing_keeps_less_and_changes_no_gradient():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=4)
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


def test_reconstructor_uses_one_projected_reference_with_positions_in_all_blocks():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=3).double()
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


def test_every_parameter_gets_a_gradient():
    level = Reconstructor(6, 16, 2, GRID, WINDOW, blocks=2)
    (level(torch.randn(2, 20, 6)) * torch.randn(2, 20, 6)).sum().backward()
    for name, p in level.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_tokens_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \(B, 20, 6\)"):
        Reconstructor(6, 16, 2, GRID, WINDOW)(torch.randn(2, 21, 6))


def test_unknown_branch_is_named():
    with pytest.raises(ValueError, match="did you mean 'mlka'"):
        RLRBlock(16, 2, GRID, WINDOW, attention=("mkla",))
