"""Records that are read back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rlr_fast.data.records import parse_record


@dataclasses.dataclass
class Number:
    value: float
    more: Any = None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"more":' * 100_000 + "1" + "}" * 100_000])
def test_a_record_that_is_nested_too_deeply_is_refused(text):
    with pytest.raises(ValueError, match=r"nested too deeply|must be an object|Expecting"):
        parse_record(Number, text)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "NaN", "true", "null"])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="value must be a finite number"):
        parse_record(Number, f'{{"value": {value}}}')
