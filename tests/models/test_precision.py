"""Precisions: which are refused, and which are told to be slow."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.backends import cpu

from rlr_fast.models.precision import _warn_of_emulation, check_precision


@pytest.mark.parametrize(("capability", "warns"), [("AVX2", True), ("AVX512", False)])
def test_bf16_is_told_to_be_slow_where_the_processor_emulates_it(
    monkeypatch, caplog, capability, warns
):
    _warn_of_emulation.cache_clear()
    monkeypatch.setattr(cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        check_precision("fp32", torch.device("cpu"))
        assert not caplog.records
        check_precision("bf16", torch.device("cpu"))
        check_precision("bf16", torch.device("cpu"))
    assert [capability in r.getMessage() for r in caplog.records] == [True] * warns
