"""Operands of instructions, made into functions that read or write the registers of a group."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.ptx import shared_memory
from tests.ptx.alu import Array, U, dtype_of, widen
from tests.ptx.findings import Unsupported
from tests.ptx.group import Group, Mask
from tests.ptx.parse import Operand, Program

Read = Callable[[Group], Any]
Write = Callable[[Group, Mask, Any], None]
Action = Callable[[Group, Mask], None]

_BITS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_DOUBLE = re.compile(r"0[dD]([0-9a-fA-F]{16})")
_SHARED = re.compile(r"global_smem(?:\+(\d+))?")
_ADDRESS = re.compile(r"(%\w+|global_smem)(?:\+(-?\d+))?")


def _unwritten(lanes: int, bits: int) -> Array:
    """Return what a register holds before it is written: ones, which are NaN in every format."""
    if bits == 1:
        return np.full(lanes, True)
    return np.full(lanes, np.iinfo(U[bits]).max, U[bits])


class Operands:
    """The registers and constants of a program."""

    def __init__(self, program: Program, parameters: Mapping[str, int]) -> None:
        self.program = program
        self.parameters = parameters
        self.index = {name: i for i, name in enumerate(program.registers)}
        self.bits = [_BITS[kind] for kind in program.registers.values()]

    def registers(self, operand: Operand) -> list[int]:
        """Return the numbers of all registers in an operand."""
        texts = operand if isinstance(operand, list) else [operand]
        names = [name for text in texts for name in re.findall(r"%\w+", text)]
        return [self.index[name] for name in names if name in self.index]

    def read(self, text: Operand, kind: str) -> Read:
        """Return a function that gives an operand's values as a PTX type."""
        if isinstance(text, list):
            raise Unsupported(f"vector {text} where one operand is expected")
        dtype = dtype_of(kind)
        if text not in self.index:
            return self._constant(text, dtype)
        register, have = self.index[text], self.bits[self.index[text]]
        bits = dtype.itemsize * 8

        def read(g: Group) -> Array:
            x = g.registers[register]
            if x is None:
                ins = self.program.code[g.pc - 1]
                # LLVM packs bytes beside others that it drops again; what uses them is NaN.
                packs = ins.op == "prmt.b32" or any(isinstance(o, list) for o in ins.operands[1:])
                formal = "formal: undefined bytes packed beside others"
                packs &= ins.op.startswith(("mov", "prmt"))
                g.findings.add(formal if packs else "unwritten register", ins, text)
                x = g.registers[register] = _unwritten(g.lanes, have)
            if have == 1:
                return x
            return (x if have == bits else x.astype(U[bits])).view(dtype)

        return read

    def write(self, text: Operand) -> Write:
        """Return a function that writes a register, of the lanes of a mask."""
        if isinstance(text, list):
            raise Unsupported(f"vector {text} where one operand is expected")
        if text == "_":
            return lambda g, mask, value: None
        register = self.index[text]
        bits = self.bits[register]

        def write(g: Group, mask: Mask, value: Any) -> None:
            value = np.asarray(value)
            value = value.astype(bool) if bits == 1 else widen(value, bits)
            if value.ndim == 0:
                value = np.full(g.lanes, value)
            if mask is not None:
                before = g.registers[register]
                if before is None:
                    before = _unwritten(g.lanes, bits)
                value = np.where(mask, value, before)
            g.registers[register] = value

        return write

    def reads(self, operand: Operand, kind: str) -> list[Read]:
        """Return `read` of each register of a vector, or of the one."""
        return [self.read(text, kind) for text in _listed(operand)]

    def writes(self, operand: Operand) -> list[Write]:
        """Return `write` of each register of a vector, or of the one."""
        return [self.write(text) for text in _listed(operand)]

    def address(self, operand: Operand) -> Read:
        """Return a function that gives the addresses of ``[register + number]``."""
        found = _ADDRESS.fullmatch(str(operand).strip("[] ").replace(" ", ""))
        if not found:
            raise Unsupported(f"address {operand}")
        offset = int(found[2] or 0)
        base = self.read(found[1], "u64" if found[1].startswith("%rd") else "u32")
        return lambda g: g.spread(base(g)).astype(np.int64) + offset

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Read:
        kind = dtype.type
        if text == "%tid.x":
            return lambda g: g.thread.astype(kind)
        if text == "%ctaid.x":
            return lambda g: g.program.astype(kind)
        if text in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            return lambda g: np.zeros(g.lanes, kind)
        if text == "%laneid":
            return lambda g: (g.thread % 32).astype(kind)
        value = self._number(text, dtype)
        return lambda g: value

    def _number(self, text: str, dtype: np.dtype[Any]) -> Any:
        if text == "%ntid.x":
            return dtype.type(self.program.threads)
        if found := _SHARED.fullmatch(text):
            return dtype.type(shared_memory.BASE + int(found[1] or 0))
        if found := _FLOAT.fullmatch(text):
            return np.array([int(found[1], 16)], np.uint32).view(dtype)[0]
        if found := _DOUBLE.fullmatch(text):
            return np.array([int(found[1], 16)], np.uint64).view(dtype)[0]
        if _INTEGER.fullmatch(text):
            number = int(text.rstrip("U"), 0)
            if dtype == np.bool_:
                return np.bool_(number != 0)
            bits = dtype.itemsize * 8
            return np.array([number & (2**bits - 1)], U[bits]).view(dtype)[0]
        raise Unsupported(f"operand {text}")


def _listed(operand: Operand) -> list[str]:
    return operand if isinstance(operand, list) else [operand]
