"""The device of the tests: a GPU that the kernels run on, else the CPU and Triton's interpreter."""

from __future__ import annotations

import torch


def runs_kernels() -> bool:
    """Whether the first GPU is NVIDIA's and of compute capability 8.0 or later."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


ON_GPU = runs_kernels()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
