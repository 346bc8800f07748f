"""Records: which GPU they name, and what nvidia-smi does not tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import record


@pytest.fixture
def nvidia_smi(monkeypatch):
    """A GPU that is not the machine's first, and the answer of nvidia-smi."""
    asked: list[tuple[str, ...]] = []
    answer = SimpleNamespace(text="", asked=asked)
    properties = SimpleNamespace(uuid="0a1b2c3d-0000-1111-2222-333344445555")

    def run(*command: str) -> str:
        asked.append(command)
        return answer.text

    monkeypatch.setattr(record, "_run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return answer


@pytest.mark.parametrize(
    ("told", "expected"), [("1755 MHz", 1755.0), ("[N/A]", None), ("[Not Supported]", None)]
)
def test_a_clock_that_is_not_told_is_none(nvidia_smi, told, expected):
    nvidia_smi.text = f"{told}, 2619 MHz, 1980 MHz, [N/A], 40\n"
    assert record.megahertz("clocks.sm") == expected


def test_the_gpu_is_asked_for_by_its_uuid(nvidia_smi):
    """PyTorch's number of a GPU is another than nvidia-smi's where some are hidden."""
    nvidia_smi.text = "1755 MHz, 2619 MHz, 1980 MHz, 300 W, 40"
    record.clocks()
    (command,) = nvidia_smi.asked
    assert command[-2:] == ("-i", "GPU-0a1b2c3d-0000-1111-2222-333344445555")
