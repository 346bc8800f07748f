"""Where the program runs: devices and versions, as written beside every number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

_PACKAGES = ("rlr_fast", "torch", "triton", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ValueError: No such device, or it is not available here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that is available, got {name!r} ({first_line})"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """Return a device's name as its maker gives it, e.g. for a record of timings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, platform and device as plain values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in _PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
