"""Fixtures of the kernels' tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(params=["atomic", "deterministic"])
def mode(request, monkeypatch) -> Iterator[str]:
    """Both kinds of backward, each with uninitialized memory full of NaN."""
    if request.param == "atomic":
        torch.use_deterministic_algorithms(False)
        for name in ("empty", "empty_like"):
            plain = getattr(torch, name)

            def poisoned(*args: Any, _plain: Any = plain, **kwargs: Any) -> Tensor:
                tensor = _plain(*args, **kwargs)
                return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

            monkeypatch.setattr(torch, name, poisoned)
    yield request.param
    torch.use_deterministic_algorithms(True, warn_only=True)
