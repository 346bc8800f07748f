"""Where the program runs: devices and versions, as written beside every number."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from rlr_fast.config import ExecutionConfig
from rlr_fast.functional import resolve_backend

_PACKAGES = ("rlr_fast", "torch", "triton", "timm", "numpy", "scipy", "scikit-learn", "pillow")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA, else Apple's MPS, else the CPU.

    Of the processes that torchrun starts on a machine (``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``), each
    gets a GPU of its own for ``auto`` and ``cuda``.

    Raises:
        ValueError: No such device, it is not available here, or several processes would share it.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        # MPS is one device, and processes cannot add up their gradients on it.
        mps = torch.backends.mps.is_available() and here == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if here > 1 and name.startswith(("cuda:", "mps")):
        raise ValueError(
            f"device must be cuda, cpu or auto for several processes, got {name!r} for {here} of "
            "them; CUDA_VISIBLE_DEVICES says which GPUs they may take"
        )
    if name == "cuda" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"each process on a machine needs a GPU of its own, got {here} processes for "
                f"{gpus} GPUs; start them with --nproc-per-node {gpus}, or take --device cpu"
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"no images are scored on {device.type!r}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that is available, got {name!r} ({first_line})"
        ) from error
    return device


def start_device(execution: ExecutionConfig) -> torch.device:
    """Return the device of an execution, made this process's own and able to run the backend.

    Raises:
        ValueError: See `choose_device`.
        BackendError: The backend cannot run on the device.
    """
    device = choose_device(execution.device)
    resolve_backend(execution.backend, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nothing of this process shall lie on another's GPU
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, platform and device as plain values."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if cuda
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in _PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
