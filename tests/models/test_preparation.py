"""Preparation for inference: taken up where it holds, and never stale."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from gpu import ON_GPU
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

from rlr_fast import RLRModel
from rlr_fast.models.block import RLRBlock
from rlr_fast.models.reconstructor import Reconstructor

GRID, WINDOW = (4, 5), 3
VARIANT = {"fusion": "learned", "references": 2}


def make_level(device="cpu", **options) -> Reconstructor:
    return Reconstructor(6, 32, 2, GRID, WINDOW, blocks=2, **options).to(device).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 20, 6)


@pytest.fixture
def prepared_blocks(monkeypatch) -> list[RLRBlock]:
    """The blocks that were prepared, one entry each time."""
    calls: list[RLRBlock] = []
    prepare = RLRBlock.prepare
    monkeypatch.setattr(RLRBlock, "prepare", lambda self, r: calls.append(self) or prepare(self, r))
    return calls


def unprepared(level: Reconstructor, tokens: torch.Tensor) -> torch.Tensor:
    """What the network returns without a preparation."""
    other = copy.deepcopy(level)
    assert not other.is_prepared()
    return other(tokens)


BACKENDS = ["dense", "tiled", "triton"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [{}, VARIANT, {"attention": ("cross", "mlka")}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_take_the_preparation_up_and_return_the_same_bits(
    backend, variant, dtype, prepared_blocks, device
):
    if backend == "triton":
        pytest.importorskip("triton")
        if dtype is not None and not ON_GPU:
            pytest.skip("the interpreter has no bfloat16")
    level = make_level(device, backend=backend, **variant)
    tokens = torch.randn(2, 20, 6, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None), torch.no_grad():
        expected = level(tokens)
        assert len(prepared_blocks) == 2
        level(tokens)
        assert len(prepared_blocks) == 4  # each call for itself
        assert level.prepare_for_inference() is level and level.is_prepared()
        assert len(prepared_blocks) == 6
        assert torch.equal(level(tokens), expected)
        with torch.inference_mode():
            assert torch.equal(level(tokens), expected)
    assert len(prepared_blocks) == 6


# Ways to change a network. Each but the marked ones leaves a trace.


def step(optimizer):
    def change(level):
        made = optimizer(level.parameters())
        with torch.enable_grad():
            level(torch.randn(1, 20, 6)).square().sum().backward()
        made.step()

    return change


def load(level, **options):
    level.load_state_dict({k: v + 1 for k, v in level.state_dict().items()}, **options)


def load_a_part(level):
    branch = level.blocks[1].attention["lca"]
    branch.load_state_dict({k: v + 1 for k, v in branch.state_dict().items()})


def load_by_assignment(level):
    load(level, assign=True)


def change_in_inference_mode(level):
    with torch.inference_mode():
        level.reference_in.bias.add_(1)


def change_a_bias(level):
    level.blocks[1].attention["mlka"].out_proj.bias.add_(1)


def change_positions(level):
    level.positions.add_(1)


def replace_data(level):
    level.reference.data = level.reference.data + 1


def set_from_a_vector(level):
    vector_to_parameters(parameters_to_vector(level.parameters()) * 2, level.parameters())


def replace_parameter(level):
    branch = level.blocks[0].attention["lca"]
    branch.in_proj_weight = nn.Parameter(2 * branch.in_proj_weight)


def replace_module(level):
    branch = level.blocks[0].attention["lca"]
    branch.out_proj = nn.Sequential(branch.out_proj, nn.Tanh())


def replace_branch(level):
    level.blocks[0].attention["lca"] = copy.deepcopy(make_level().blocks[0].attention["lca"])


def replace_block(level):
    level.blocks[1] = make_level().blocks[1]


def replace_map(level):
    level.reference_in = nn.Linear(6, 32)


def add_a_parameter(level):
    level.blocks[1].theta = nn.Parameter(torch.tensor([1.0, 3.0]))


def append_a_block(level):
    level.blocks.append(make_level().blocks[0])


def parametrize(level):
    parametrizations.weight_norm(level.blocks[0].attention["lca"], "in_proj_weight")
    level.blocks[0].attention["lca"].parametrizations.in_proj_weight.original0.mul_(2)


def hook(level):
    level.blocks[0].attention["mlka"].out_proj.register_forward_hook(lambda *a: 2 * a[-1])


def train_and_return(level):
    level.train()
    level.reference.data.add_(1)  # leaves no trace
    level.eval()


def change_data_then_eval(level):
    level.reference.data.add_(1)  # leaves no trace
    level.eval()


def move(level):
    level.half().float()


def change_theta(level):
    level.blocks[1].theta[0] += 1


def change_last_reference(level):
    level.reference[-1] += torch.randn_like(level.reference[-1])


STEPS = {
    "step": step(lambda p: torch.optim.Adam(p, lr=0.1)),
    "step-foreach": step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "step-fused": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
}
CHANGES = STEPS | {
    change.__name__.replace("_", "-"): change
    for change in (
        load, load_a_part, load_by_assignment, change_in_inference_mode, change_a_bias,
        change_positions, replace_data, set_from_a_vector, replace_parameter, replace_module,
        replace_branch, replace_block, replace_map, add_a_parameter, append_a_block, parametrize,
        hook, train_and_return, change_data_then_eval, move,
    )
}  # fmt: skip
CASES = [pytest.param(change, {}, id=name) for name, change in CHANGES.items()]
CASES += [
    pytest.param(change, VARIANT, id=f"{change.__name__.replace('_', '-')}-variant")
    for change in (load, change_theta, change_last_reference)
]


@pytest.mark.parametrize(("change", "variant"), CASES)
@torch.no_grad()
def test_a_change_ends_the_preparation(change, variant, tokens):
    level = make_level(**variant).prepare_for_inference()
    before = level(tokens)
    change(level)
    after = level(tokens)
    assert not level.is_prepared()
    assert not torch.equal(after, before)
    assert torch.equal(after, unprepared(level, tokens))
    assert torch.equal(level.prepare_for_inference()(tokens), after)
    assert level.is_prepared()


@torch.no_grad()
def test_a_removed_hook_ends_the_preparation(tokens):
    level = make_level()
    handle = level.blocks[0].attention["mlka"].out_proj.register_forward_hook(lambda *a: 2 * a[-1])
    level.prepare_for_inference()
    before = level(tokens)
    handle.remove()
    assert not level.is_prepared()
    assert not torch.equal(level(tokens), before)


@torch.no_grad()
def test_a_hook_in_the_place_of_another_ends_the_preparation(tokens):
    level = make_level()
    handle = level.reference_in.register_forward_hook(lambda *a: 2 * a[-1])
    level.prepare_for_inference()
    handle.remove()
    level.reference_in.register_forward_hook(lambda *a: 3 * a[-1])
    assert torch.equal(level(tokens), unprepared(level, tokens))


@torch.no_grad()
def test_a_change_of_a_parametrized_reference_ends_the_preparation(tokens):
    level = make_level()
    parametrizations.weight_norm(level, "reference")
    level.prepare_for_inference()
    before = level(tokens)
    level.parametrizations.reference.original0.mul_(2)
    assert not level.is_prepared()
    assert not torch.equal(level(tokens), before)


@torch.no_grad()
def test_a_preparation_for_another_backend_is_not_kept(tokens):
    """Else a refusal would follow the rule of the backend before."""
    level = make_level(backend="auto").prepare_for_inference()
    for block in level.blocks:
        block.backend = "tiled"
    level.end_preparation()
    level.prepare_for_inference()
    assert {block.reference.backend for block in level._prepared.blocks} == {"tiled"}


@torch.no_grad()
def test_swapped_parameters_are_seen(tokens):
    level = make_level().prepare_for_inference()
    before = level(tokens)
    other = {name: 2 * p for name, p in level.named_parameters()}
    found = torch.func.functional_call(level, other, (tokens,))
    assert not torch.equal(found, before)
    assert torch.equal(level(tokens), before)


@torch.no_grad()
def test_a_change_that_leaves_no_trace_needs_a_new_preparation(tokens):
    level = make_level().prepare_for_inference()
    before = level(tokens)
    level.reference.data.add_(1)
    assert torch.equal(level(tokens), before)  # as the docstring says
    assert not torch.equal(level.prepare_for_inference()(tokens), before)


@torch.no_grad()
def test_other_autocast_prepares_for_itself(tokens, prepared_blocks):
    level = make_level()

    def lowered() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return level(tokens)

    plain, low = level(tokens), lowered()
    assert low.dtype == torch.bfloat16
    level.prepare_for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert not level.is_prepared()
    assert torch.equal(lowered(), low) and torch.equal(level(tokens), plain)
    with torch.autocast("cpu", torch.bfloat16):
        level.prepare_for_inference()
        assert level.is_prepared()
    assert not level.is_prepared()
    prepared_blocks.clear()
    assert torch.equal(lowered(), low)
    assert not prepared_blocks
    assert torch.equal(level(tokens), plain)
    assert len(prepared_blocks) == 2


def test_training_has_the_same_bits_with_and_without(tokens):
    level = make_level()
    other = copy.deepcopy(level)
    with torch.no_grad():
        other.prepare_for_inference()(tokens)
    outputs = [network(tokens) for network in (level, other)]
    assert torch.equal(*outputs)
    for network, output in zip((level, other), outputs, strict=True):
        output.square().sum().backward()
        assert not network.is_prepared()
    for p, q in zip(level.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@torch.no_grad()
def test_copies_do_not_carry_the_preparation(tokens):
    level = make_level()
    size = len(pickle.dumps(level))
    expected = level.prepare_for_inference()(tokens)
    assert len(pickle.dumps(level)) == size
    for other in (copy.deepcopy(level), copy.copy(level), pickle.loads(pickle.dumps(level))):
        assert not other.is_prepared()
        assert torch.equal(other(tokens), expected)
    assert not level._replicate_for_data_parallel().is_prepared()
    assert level.is_prepared()


@torch.no_grad()
def test_what_others_list_of_a_network_is_left_as_it_was():
    """A preparation is no parameter, buffer or module: nothing to broadcast, average or save."""
    level = make_level()

    def listed() -> list[list[str]]:
        kinds = level.named_parameters(), level.named_buffers(), level.named_modules()
        return [[name for name, _ in kind] for kind in kinds] + [list(level.state_dict())]

    before = listed()
    level.prepare_for_inference()
    assert listed() == before


@torch.no_grad()
@pytest.mark.parametrize("moved", [False, True], ids=["made", "moved"])
def test_tensors_of_inference_mode_are_prepared_in_each_call(moved, prepared_blocks):
    level = make_level().double() if moved else None
    with torch.inference_mode():
        level = level.float() if moved else make_level()
        tokens = torch.randn(2, 20, 6)
        before = level.prepare_for_inference()(tokens)
        assert not level.is_prepared() and len(prepared_blocks) == 2
        level.reference.zero_()
        assert not torch.equal(level(tokens), before)


def addresses(level: Reconstructor) -> list[int]:
    return [t.data_ptr() for block in level._prepared.blocks for t in block.tensors()]


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["default", "variant"])
@torch.no_grad()
def test_a_new_preparation_is_written_where_a_cuda_graph_reads_the_last(variant, tokens):
    level = make_level(**variant).prepare_for_inference()
    before = addresses(level)
    load(level.train())
    assert addresses(level) == before  # still there
    level.eval().prepare_for_inference()
    assert addresses(level) == before
    assert torch.equal(level(tokens), unprepared(level, tokens))


def test_preparing_inside_compiled_code_is_refused():
    level = make_level()
    prepare = torch.compile(lambda: level.prepare_for_inference(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="must be called outside compiled code"):
        prepare()


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_cuda_graph_replays_what_was_prepared(device):
    level = make_level(device).prepare_for_inference()
    tokens = torch.randn(2, 20, 6, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = level(tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="before a CUDA graph's capture"):
            level.prepare_for_inference()
        output = level(tokens)
    graph.replay()
    torch.testing.assert_close(output, expected)
    load(level)
    level.prepare_for_inference()
    graph.replay()
    torch.testing.assert_close(output, unprepared(level, tokens))


# The whole model, and compiled code.


@pytest.fixture
def model(small) -> RLRModel:
    return RLRModel(small).eval()


@pytest.fixture
def images(small) -> torch.Tensor:
    return torch.randint(256, (2, 3, *small.image_size), dtype=torch.uint8)


@torch.no_grad()
def test_a_model_prepares_every_level(model, images, prepared_blocks):
    assert not model.is_prepared()
    expected = model(images).score_map
    assert model.prepare_for_inference() is model and model.is_prepared()
    prepared_blocks.clear()
    assert torch.equal(model(images).score_map, expected)
    assert not prepared_blocks
    model.levels[1].reference.add_(1)
    assert not model.is_prepared()


@pytest.fixture
def from_tokens(small) -> RLRModel:
    """A model of one level that is called with its tokens: no time goes into the backbone."""
    config = dataclasses.replace(small, out_indices=(3,), hidden=(16,), heads=(2,), windows=(3,))
    model = RLRModel(config).eval()
    model.tokens = lambda tokens: tokens
    return model


def compiler(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return {"backend": backend, "fullgraph": True, "dynamic": False}


def calls_of(graph) -> int:
    return sum(node.op.startswith("call") for node in graph.graph.nodes)


def tokens_of(model: RLRModel) -> list[torch.Tensor]:
    return [torch.randn(2, len(level.reference), level.channels) for level in model.levels]


def widen(model: RLRModel) -> None:
    for level in model.levels:
        level.blocks[0].attention["lca"].in_proj_weight.mul_(3)


@torch.inference_mode()
def test_a_compiled_model_takes_the_preparation_up_and_sees_changes(from_tokens):
    model, tokens, graphs = from_tokens, tokens_of(from_tokens), []
    model.compile(**compiler(graphs))
    plain = model(tokens).score_map
    prepared = model.prepare_for_inference()(tokens).score_map
    assert len(graphs) == 2 and calls_of(graphs[1]) < calls_of(graphs[0]) - 10
    torch.testing.assert_close(prepared, plain)
    widen(model)
    changed = model(tokens).score_map
    assert not torch.allclose(changed, prepared)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = model.prepare_for_inference()(tokens).score_map
    torch.testing.assert_close(again, changed)


@torch.inference_mode()
def test_code_that_cannot_look_for_changes_does_not_take_the_preparation_up(from_tokens):
    model, tokens, graphs = from_tokens, tokens_of(from_tokens), []
    model.prepare_for_inference()
    compiled = torch.compile(model, **compiler(graphs))
    before = compiled(tokens).score_map
    torch.testing.assert_close(before, model(tokens).score_map)
    widen(model)
    after = compiled(tokens).score_map
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, model(tokens).score_map)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exported_network_holds_what_was_prepared(strict, tokens):
    level = Reconstructor(6, 32, 2, GRID, WINDOW, blocks=1).eval()
    program = torch.export.export(level.prepare_for_inference(), (tokens,), strict=strict)
    assert len(program.constants) >= 6
    torch.testing.assert_close(program.module()(tokens), level(tokens))
