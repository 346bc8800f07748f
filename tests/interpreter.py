"""Triton's interpreter without what it does again and again and to no end."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from inspect import getmembers, ismodule
from types import FunctionType
from typing import Any

import numpy as np


def quicken() -> None:
    """Let Triton's interpreter leave out what changes no result.

    - Integer arithmetic is computed twice to find overflows, which are told in debug mode alone.
    - Each call of a function in a kernel replaces the builtins of `triton.language` again.
    - Each value builds a table of NumPy's types, and its shape as a tuple with a type of its own.
    """
    from triton.language import core
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _look_builtins_up_once(interpreter, core)
    _replace_builtins_once_a_launch(interpreter, core)

    plain = interpreter._get_np_dtype
    of_numbers = cache(plain)

    def numpy_type(kind: Any) -> np.dtype:
        return plain(kind) if kind.scalar.is_ptr() else of_numbers(kind.scalar)

    interpreter._get_np_dtype = numpy_type

    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shape_of(kind.shape if kind.is_block() else ())

    core.tensor.__init__ = tensor


def _look_builtins_up_once(interpreter: Any, core: Any) -> None:
    builtins: dict[object, list[str]] = {}

    def patch_builtin(package: object, *rest: Any) -> None:
        if package not in builtins:
            builtins[package] = [n for n, x in getmembers(package) if core.is_builtin(x)]
        for name in builtins[package]:
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def _replace_builtins_once_a_launch(interpreter: Any, core: Any) -> None:
    """Replace them where a launch starts; a function it calls finds them replaced."""
    import triton.language

    replace = interpreter._patch_lang
    restore = interpreter._LangPatchScope.restore
    replaced: set[object] = set()

    @cache
    def languages(function: FunctionType) -> frozenset[object]:
        modules = filter(ismodule, function.__globals__.values())
        return frozenset(m for m in modules if m in (triton.language, core))

    def replace_once(function: FunctionType) -> Any:
        if languages(function) <= replaced:
            return None  # of a function's call: nothing restores it
        replaced.update(languages(function))
        return replace(function)

    def restore_all(scope: Any) -> None:
        replaced.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = replace_once, restore_all
