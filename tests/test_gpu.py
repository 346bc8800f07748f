"""GPUs that the kernels do not support leave the tests to Triton's interpreter."""

from __future__ import annotations

import gpu
import pytest
import torch


@pytest.mark.parametrize(
    ("available", "hip", "capability", "expected"),
    [
        pytest.param(False, None, (0, 0), False, id="none"),
        pytest.param(True, "6.4", (9, 4), False, id="rocm"),
        pytest.param(True, None, (7, 5), False, id="turing"),
        pytest.param(True, None, (8, 0), True, id="ampere"),
        pytest.param(True, None, (12, 0), True, id="blackwell"),
    ],
)
def test_supported_gpus(monkeypatch, available, hip, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gpu.runs_kernels() == expected
