"""Instructions that compute on registers: arithmetic, comparisons, conversions and shuffles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx import alu
from tests.ptx.alu import Array
from tests.ptx.findings import Unsupported
from tests.ptx.group import Group, Mask
from tests.ptx.operands import Action, Operands
from tests.ptx.parse import Instruction

Function = Callable[..., Any]
_HALF_FLOATS = ("bf16", "bf16x2", "f16x2", "f16")


def _simple(
    ins: Instruction, operands: Operands, kinds: Sequence[str], function: Function
) -> Action:
    """Write a function of the operands, read as ``kinds``, to the first operand."""
    put = operands.write(ins.operands[0])
    gets = [operands.read(o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)]

    def action(g: Group, mask: Mask) -> None:
        put(g, mask, function(*[get(g) for get in gets]))

    return action


def _arithmetic(
    ins: Instruction, operands: Operands, function: Function, allowed: Sequence[str] = ()
) -> Action:
    """Write a function of operands of the instruction's type, the last of its parts.

    ``allowed`` are the modifiers between name and type; ``ftz`` is understood by itself.
    """
    *modifiers, kind = ins.parts[1:]
    if kind in _HALF_FLOATS or set(modifiers) - {"ftz", *allowed}:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    if "ftz" in modifiers:
        plain = function

        def function(*operands: Array) -> Array:
            return alu.flush_denormals(plain(*map(alu.flush_denormals, operands)))

    return _simple(ins, operands, [kind] * (len(ins.operands) - 1), function)


def add(ins: Instruction, operands: Operands) -> Action:
    if ins.op in ("add.s16x2", "add.u16x2"):
        return _simple(ins, operands, ["u32"] * 2, alu.add_halves)
    return _arithmetic(ins, operands, np.add, ("rn",))


def subtract(ins: Instruction, operands: Operands) -> Action:
    return _arithmetic(ins, operands, np.subtract, ("rn",))


def negate(ins: Instruction, operands: Operands) -> Action:
    return _arithmetic(ins, operands, np.negative)


def absolute(ins: Instruction, operands: Operands) -> Action:
    return _arithmetic(ins, operands, np.abs)


def multiply(ins: Instruction, operands: Operands) -> Action:
    *modifiers, kind = ins.parts[1:]
    if kind.startswith("f") or modifiers == ["lo"]:
        return _arithmetic(ins, operands, np.multiply, ("lo", "rn"))
    bits = int(kind[1:])
    if modifiers == ["wide"]:
        wide = alu.dtype_of(f"{kind[0]}{2 * bits}")
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
        return _simple(ins, operands, [kind] * 2, product)
    if modifiers == ["hi"] and bits <= 32:
        narrow, wide = alu.dtype_of(kind), alu.dtype_of(f"{kind[0]}{2 * bits}")

        def high(a: Array, b: Array) -> Array:
            return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(narrow)

        return _simple(ins, operands, [kind] * 2, high)
    if ins.op == "mul.hi.u64":
        return _simple(ins, operands, [kind] * 2, alu.high_product)
    raise Unsupported(f"{ins.op} at line {ins.line}")


def multiply_add(ins: Instruction, operands: Operands) -> Action:
    *modifiers, kind = ins.parts[1:]
    if modifiers == ["lo"]:
        return _arithmetic(ins, operands, lambda a, b, c: a * b + c, ("lo",))
    if modifiers == ["wide"]:
        name = f"{kind[0]}{2 * int(kind[1:])}"
        wide = alu.dtype_of(name)
        return _simple(
            ins, operands, [kind, kind, name], lambda a, b, c: a.astype(wide) * b.astype(wide) + c
        )
    raise Unsupported(f"{ins.op} at line {ins.line}")


def fused_multiply_add(ins: Instruction, operands: Operands) -> Action:
    if ins.op not in ("fma.rn.f32", "fma.rn.ftz.f32"):
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return _arithmetic(ins, operands, alu.fma, ("rn",))


def divide(ins: Instruction, operands: Operands) -> Action:
    if ins.parts[-1] == "f32":
        error = 0.0 if "rn" in ins.parts else 2.0**-22

        def quotient(a: Array, b: Array) -> Array:
            return alu.approximate(a.astype(np.float64) / b.astype(np.float64), error)

        return _arithmetic(ins, operands, quotient, ("approx", "full", "rn"))
    return _arithmetic(ins, operands, alu.div)


def remainder(ins: Instruction, operands: Operands) -> Action:
    return _arithmetic(ins, operands, alu.remainder)


def maximum(ins: Instruction, operands: Operands) -> Action:
    if ins.parts[-1].startswith("f"):
        function = np.maximum if "NaN" in ins.parts else np.fmax
        return _arithmetic(ins, operands, function, ("NaN",))
    return _arithmetic(ins, operands, np.maximum)


def minimum(ins: Instruction, operands: Operands) -> Action:
    if ins.parts[-1].startswith("f"):
        function = np.minimum if "NaN" in ins.parts else np.fmin
        return _arithmetic(ins, operands, function, ("NaN",))
    return _arithmetic(ins, operands, np.minimum)


def _function(function: Function, error: float) -> Function:
    """Return the handler of a function of one float32, which errs unless it is rounded (``rn``)."""

    def handler(ins: Instruction, operands: Operands) -> Action:
        if ins.parts[-1] != "f32":
            raise Unsupported(f"{ins.op} at line {ins.line}")
        most = 0.0 if "rn" in ins.parts else error

        def value(x: Array) -> Array:
            return alu.approximate(function(x.astype(np.float64)), most)

        return _arithmetic(ins, operands, value, ("approx", "rn"))

    return handler


def _bitwise(function: Function) -> Function:
    """Return the handler of a bitwise operation."""

    def handler(ins: Instruction, operands: Operands) -> Action:
        kind = ins.parts[-1].replace("b", "u")
        return _simple(ins, operands, [kind] * (len(ins.operands) - 1), function)

    return handler


def _shift(function: Function) -> Function:
    """Return the handler of a shift, whose second operand has 32 bits."""

    def handler(ins: Instruction, operands: Operands) -> Action:
        return _simple(ins, operands, [ins.parts[-1].replace("b", "u"), "u32"], function)

    return handler


def extract_bits(ins: Instruction, operands: Operands) -> Action:
    return _simple(ins, operands, [ins.parts[-1], "u32", "u32"], alu.extract_bits)


def permute_bytes(ins: Instruction, operands: Operands) -> Action:
    if ins.op != "prmt.b32":
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return _simple(ins, operands, ["u32"] * 3, alu.permute_bytes)


def select(ins: Instruction, operands: Operands) -> Action:
    kind = ins.parts[-1]
    return _simple(ins, operands, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


def compare(ins: Instruction, operands: Operands) -> Action:
    name, *modifiers, kind = ins.parts[1:]
    if modifiers not in ([], ["ftz"]) or "|" in str(ins.operands[0]):
        raise Unsupported(f"{ins.text} at line {ins.line}")
    if kind.startswith("b"):
        kind = "u" + kind[1:]
    return _simple(ins, operands, [kind, kind], lambda a, b: alu.compare(name, a, b))


def move(ins: Instruction, operands: Operands) -> Action:
    kind = ins.parts[-1]
    if len(ins.parts) != 2:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    target, source = ins.operands
    if isinstance(target, list):
        part = int(kind[1:]) // len(target)
        get, puts = operands.read(source, f"u{kind[1:]}"), operands.writes(target)

        def unpack(g: Group, mask: Mask) -> None:
            x = get(g)
            for i, put in enumerate(puts):
                put(g, mask, (x >> x.dtype.type(part * i)).astype(alu.U[part]))

        return unpack
    if isinstance(source, list):
        part, wide = int(kind[1:]) // len(source), alu.U[int(kind[1:])]
        gets, put = operands.reads(source, f"u{part}"), operands.write(target)

        def pack(g: Group, mask: Mask) -> None:
            x = wide(0)
            for i, get in enumerate(gets):
                x = x | (np.asarray(get(g)).astype(wide) << wide(part * i))
            put(g, mask, x)

        return pack
    return _simple(ins, operands, [kind if kind == "pred" else "u" + kind[1:]], lambda x: x)


def _to_f16_bits(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def convert(ins: Instruction, operands: Operands) -> Action:
    *modifiers, to, source = ins.parts[1:]
    if to in ("bf16x2", "f16x2") and source == "f32" and modifiers == ["rn"]:
        narrow = alu.f32_to_bf16 if to == "bf16x2" else _to_f16_bits

        def both(high: Array, low: Array) -> Array:
            high, low = (np.ascontiguousarray(x) for x in np.broadcast_arrays(high, low))
            return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)

        return _simple(ins, operands, ["f32", "f32"], both)
    function: Function | None = None
    if (to, source, modifiers) == ("bf16", "f32", ["rn"]):
        function = alu.f32_to_bf16
    elif (to, source, modifiers) == ("f16", "f32", ["rn"]):
        function = lambda x: x.astype(np.float16)  # noqa: E731
    elif (to, source, modifiers) == ("f32", "bf16", []):
        function = alu.bf16_to_f32
    elif (to, source, modifiers) == ("f32", "f16", []):
        function = lambda x: x.astype(np.float32)  # noqa: E731
    elif to == "f32" and source[0] in "us" and modifiers == ["rn"]:
        function = lambda x: x.astype(np.float64).astype(np.float32)  # noqa: E731
    elif to[0] in "us" and source[0] in "us" and not modifiers:
        dtype = alu.dtype_of(to)
        function = lambda x: x.astype(dtype)  # noqa: E731
    if function is None:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return _simple(ins, operands, [source], function)


def shuffle(ins: Instruction, operands: Operands) -> Action:
    """Exchange values within a warp."""
    mode = ins.parts[2]
    if ins.parts[1] != "sync" or mode not in ("bfly", "idx"):
        raise Unsupported(f"{ins.op} at line {ins.line}")
    target, source, lane, clamp, members = ins.operands
    if clamp not in ("31", "0x1f") or members not in ("-1", "0xffffffff"):
        raise Unsupported(f"{ins.text} at line {ins.line}")
    get, by, put = operands.read(source, "u32"), operands.read(lane, "u32"), operands.write(target)

    def action(g: Group, mask: Mask) -> None:
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        x = get(g).reshape(-1, 32)
        b = g.spread(by(g)).reshape(-1, 32).astype(np.int64) & 31
        which = np.arange(32) ^ b if mode == "bfly" else b
        put(g, mask, np.take_along_axis(x, np.broadcast_to(which, x.shape), 1).reshape(-1))

    return action


HANDLERS: dict[str, Function] = {
    "abs": absolute,
    "add": add,
    "and": _bitwise(np.bitwise_and),
    "bfe": extract_bits,
    "cvt": convert,
    "div": divide,
    "ex2": _function(np.exp2, 2.0**-22),
    "fma": fused_multiply_add,
    "lg2": _function(np.log2, 2.0**-22),
    "mad": multiply_add,
    "max": maximum,
    "min": minimum,
    "mov": move,
    "mul": multiply,
    "neg": negate,
    "not": _bitwise(np.invert),
    "or": _bitwise(np.bitwise_or),
    "prmt": permute_bytes,
    "rcp": _function(lambda x: 1 / x, 2.0**-23),
    "rem": remainder,
    "rsqrt": _function(lambda x: 1 / np.sqrt(x), 2.0**-22),
    "selp": select,
    "setp": compare,
    "shfl": shuffle,
    "shl": _shift(alu.shift_left),
    "shr": _shift(alu.shift_right),
    "sqrt": _function(np.sqrt, 2.0**-23),
    "sub": subtract,
    "xor": _bitwise(np.bitwise_xor),
}
