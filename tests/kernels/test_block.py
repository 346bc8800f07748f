"""Both attentions of a block at once, and a model of such blocks, on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, EXACT, ON_GPU
from kernel_cases import small_raster_tiles
from torch import Tensor

from rlr_fast import RLRModel
from rlr_fast.functional import block_attention, prepare_reference
from rlr_fast.kernels._choice import forced


@pytest.mark.parametrize("window", [3, 31], ids=["halo", "raster"])
def test_block_attention_equals_definition(window, mode):
    heads, width, grid = 2, 16, (4, 5)
    projected = torch.randn(3, 20, 3 * heads * width, dtype=EXACT, device=DEVICE)
    keys = torch.randn(20, 3 * heads * width, dtype=EXACT, device=DEVICE)
    grad = torch.randn(3, 20, 2 * heads * width, dtype=EXACT, device=DEVICE)
    found = {}
    for backend in ("triton", "dense"):
        leaves = (projected.clone().requires_grad_(), keys.clone().requires_grad_())
        with forced(**small_raster_tiles()):
            prepared = prepare_reference(leaves[1], heads, backend)
            output = block_attention(leaves[0], prepared, grid, window)
            found[backend] = (output, *torch.autograd.grad(output, leaves, grad))
    tolerance = 1e-4 if ON_GPU else 1e-12
    for actual, exact in zip(found["triton"], found["dense"], strict=True):
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["dense", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1:], r"projected must be \(B, 42, 96\)"),
        (lambda x: x[..., :64], r"projected must be \(B, 42, 96\)"),
        (lambda x: x[0], r"projected must be \(B, 42, 96\)"),
        (lambda x: x.half(), "projected must be torch.float32 on .* got torch.float16"),
    ],
    ids=["tokens", "channels", "no-batch", "dtype"],
)
def test_block_attention_refuses_what_does_not_fit_the_reference(change, message, backend):
    reference = prepare_reference(torch.randn(42, 96, device=DEVICE), 2, backend)
    projected = torch.randn(3, 42, 96, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        block_attention(change(projected), reference, (6, 7), 3)
    with pytest.raises(ValueError, match="grid must have H·W = N = 42"):
        block_attention(projected, reference, (6, 6), 3)
    with pytest.raises(ValueError, match="window must be odd"):
        block_attention(projected, reference, (6, 7), 4)


def test_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"projected must be \(N, 3·h·d\) with heads=2 h, got"):
        prepare_reference(torch.randn(42, 94), 2)
    with pytest.raises(ValueError, match="heads must be a positive integer, got heads=0"):
        prepare_reference(torch.randn(42, 96), 0)
    with pytest.raises(ValueError, match=r"projected must be float32.*got dtype torch.int64"):
        prepare_reference(torch.zeros(42, 96, dtype=torch.int64), 2)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_block_attention_replays_in_a_cuda_graph(mode):
    leaves = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 42, 96), (42, 96))]
    grad = torch.randn(3, 42, 64, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        output = block_attention(leaves[0], prepare_reference(leaves[1], 2, "triton"), (6, 7), 3)
        return (output, *torch.autograd.grad(output, leaves, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for actual, expected in zip(replayed, step(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_model_is_the_same_on_every_path(small, mode, tmp_path):
    config = replace(small, hidden=(32, 64), heads=(2, 2))
    torch.manual_seed(1)
    RLRModel(config, backend="dense").save_pretrained(tmp_path)
    images = torch.randn(3, 3, *config.image_size, device=DEVICE)
    losses, grads = {}, {}
    for backend in ("dense", "tiled", "triton"):
        model = RLRModel.from_pretrained(tmp_path, backend=backend).to(DEVICE).train()
        torch.manual_seed(2)
        losses[backend] = model.loss(images)
        losses[backend].backward()
        grads[backend] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for backend in ("tiled", "triton"):
        torch.testing.assert_close(losses[backend], losses["dense"], rtol=1e-5, atol=0)
        assert grads[backend].keys() == grads["dense"].keys()
        for name, grad in grads[backend].items():
            expected = grads["dense"][name]
            scale = float(expected.abs().max())
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * scale + 1e-9)
