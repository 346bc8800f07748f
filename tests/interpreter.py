"""Triton's interpreter without what it does again at every call of a function in a kernel."""

from __future__ import annotations

from functools import cache
from inspect import getmembers
from typing import Any

import numpy as np


def spare_lookups() -> None:
    """Look Triton's builtins and number types up once: it is a third of the interpreter's time.

    A call lists all names of `triton.language` for the builtins that are not replaced yet, and
    every value builds a table of NumPy's types. What is found does not change.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    builtins: dict[object, list[str]] = {}

    def patch_builtin(package: object, *rest: Any) -> None:
        if package not in builtins:
            builtins[package] = [name for name, x in getmembers(package) if is_builtin(x)]
        for name in builtins[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    plain = interpreter._get_np_dtype
    of_numbers = cache(plain)

    def numpy_type(kind: Any) -> np.dtype:
        return plain(kind) if kind.scalar.is_ptr() else of_numbers(kind.scalar)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, numpy_type
