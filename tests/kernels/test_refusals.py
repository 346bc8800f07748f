"""What the kernels do not take is refused with the reason, and ``auto`` takes another path."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from attention_cases import DEVICE, LCA, ON_GPU, OPERATORS, make_inputs

from rlr_fast.functional import unsupported_reason
from rlr_fast.kernels import _launch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"key": torch.zeros(2, 2, 12, 16)}, "batch shares", id="key-a-image"),
        pytest.param({"width": 8}, "head width d of 16, 32, 64, 128, got 8", id="width"),
        pytest.param(
            {"dtype": torch.float64 if ON_GPU else torch.bfloat16},
            "float64" if ON_GPU else "bit patterns of bfloat16",
            id="dtype",
        ),
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_refusal_gives_the_reason(operator, change, message):
    width, dtype = change.get("width", 16), change.get("dtype", torch.float32)
    inputs = make_inputs(operator, (3, 4), width=width, dtype=dtype)
    key = change["key"].to(DEVICE) if "key" in change else inputs[1]
    with pytest.raises(RuntimeError, match=message):
        operator(inputs[0], key, inputs[2], (3, 4), 3, backend="triton")
    expected = operator(inputs[0], key, inputs[2], (3, 4), 3, backend="tiled")
    found = operator(inputs[0], key, inputs[2], (3, 4), 3, backend="auto")
    assert torch.equal(found, expected)


def test_local_attention_needs_a_value_that_the_batch_shares():
    inputs = make_inputs(LCA, (3, 4), dtype=torch.float32, shared_value=False)
    with pytest.raises(RuntimeError, match="key and value that the batch shares"):
        LCA(*inputs[:3], (3, 4), 3, backend="triton")


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    reason = unsupported_reason("triton", "cpu")
    assert reason is not None
    assert "NVIDIA GPU" in reason


def test_import_without_triton():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from rlr_fast import RLRModel
        from rlr_fast.functional import local_cross_attention, unsupported_reason
        print(unsupported_reason("triton", "cpu"))
        query, key = torch.randn(1, 1, 4, 16), torch.randn(1, 4, 16)
        print(local_cross_attention(query, key, key, (2, 2), 1).shape)
        try:
            local_cross_attention(query, key, key, (2, 2), 1, backend="triton")
        except RuntimeError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "triton is not installed" in run.stdout
    assert "torch.Size([1, 1, 4, 16])" in run.stdout
    assert "backend 'triton' cannot run here" in run.stdout
