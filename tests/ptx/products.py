"""Instructions of the matrix units: mma.sync of a warp and wgmma of four."""

from __future__ import annotations

import re

import numpy as np

from tests.ptx import alu, matrix
from tests.ptx.alu import Array
from tests.ptx.findings import Unsupported
from tests.ptx.group import Group, Mask
from tests.ptx.operands import Action, Operands, Read
from tests.ptx.parse import Instruction

_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3")
_DEPTH = {"bf16": 16, "f16": 16, "tf32": 8}
# Threads of a warp group.
_GROUP = 128


def mma(ins: Instruction, operands: Operands) -> Action:
    found = _MMA.fullmatch(ins.op)
    if not found or int(found[1]) != _DEPTH[found[2]]:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    kind = found[2]
    puts = operands.writes(ins.operands[0])
    gets = [operands.reads(operand, "u32") for operand in ins.operands[1:]]

    def action(g: Group, mask: Mask) -> None:
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        a, b, c = ([g.spread(get(g)) for get in each] for each in gets)
        product = matrix.fragment_a(a, kind) @ matrix.fragment_b(b, kind)
        total = matrix.cut_off(product + matrix.fragment_c(c).astype(np.float64))
        for put, x in zip(puts, matrix.registers_of_c(total), strict=True):
            put(g, None, x)

    return action


def wgmma(ins: Instruction, operands: Operands) -> Action:
    if ins.op == "wgmma.fence.sync.aligned":

        def fence(g: Group, mask: Mask) -> None:
            g.products.fence = g.step

        return fence
    if ins.op == "wgmma.commit_group.sync.aligned":
        return lambda g, mask: g.products.commit()
    if ins.op == "wgmma.wait_group.sync.aligned":
        left = int(str(ins.operands[0]), 0)
        return lambda g, mask: g.products.wait(g.shared, left)
    return _WarpGroupProduct(ins, operands)


class _WarpGroupProduct:
    """One ``wgmma.mma_async``: 64 rows times ``n`` columns by each warp group."""

    def __init__(self, ins: Instruction, operands: Operands) -> None:
        found = _WGMMA.fullmatch(ins.op)
        if not found or int(found[2]) != _DEPTH[found[3]]:
            raise Unsupported(f"{ins.op} at line {ins.line}")
        self.ins = ins
        self.names = list(operands.index)
        self.n, self.k, self.kind = int(found[1]), int(found[2]), found[3]
        self.size = 4 if self.kind == "tf32" else 2
        d, a, b, scale, *flags = ins.operands
        self.in_registers = isinstance(a, list)
        if flags[:2] != ["1", "1"]:
            raise Unsupported(f"{ins.text}: negated operands, line {ins.line}")
        # One flag for each operand in shared memory, of 16-bit types.
        transposed = [flag == "1" for flag in flags[2:]]
        if len(transposed) != (0 if self.size == 4 else 1 if self.in_registers else 2):
            raise Unsupported(f"{ins.text}: transposed operands, line {ins.line}")
        self.a_transposed = transposed[0] if len(transposed) == 2 else False
        self.b_transposed = transposed[-1] if transposed else False
        self.put_d, self.get_d = operands.writes(d), operands.reads(d, "u32")
        self.get_a = operands.reads(a, "u32" if self.in_registers else "u64")
        self.get_b, self.get_scale = operands.read(b, "u64"), operands.read(scale, "pred")
        self.d = operands.registers(d)
        self.a = operands.registers(a) if self.in_registers else []

    def __call__(self, g: Group, mask: Mask) -> None:
        ins = self.ins
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        scales = g.spread(self.get_scale(g))
        if scales.any() != scales.all():
            raise Unsupported(f"scale-d that differs among the threads, line {ins.line}")
        accumulate = bool(scales[0])
        self._check_registers(g, accumulate)
        cells = []
        if self.in_registers:
            left = matrix.fragment_a([get(g) for get in self.get_a], self.kind)
            left = left.reshape(-1, 64, self.k)
        else:
            left, cell = self._operand(g, self.get_a[0], 64, self.a_transposed)
            cells.append(cell)
        right, cell = self._operand(g, self.get_b, self.n, self.b_transposed)
        cells.append(cell)
        total = left @ right.transpose(0, 2, 1)
        if accumulate:
            total = total + matrix.fragment_c([get(g) for get in self.get_d]).reshape(total.shape)
        result = matrix.cut_off(total).reshape(-1, 16, self.n)
        for put, x in zip(self.put_d, matrix.registers_of_c(result), strict=True):
            put(g, None, x)
        for r in self.d:  # the next product may add to it without a fence
            g.products.last_write[r] = 0
        g.products.begin(g.shared, np.unique(np.concatenate(cells)), self.d, self.a)

    def _check_registers(self, g: Group, accumulate: bool) -> None:
        """Find registers that were written after the fence, or are an accumulator in flight."""
        for r in (*self.a, *(self.d if accumulate else ())):
            if g.products.last_write[r] > g.products.fence:
                held = g.registers[r]
                # ptxas gives the instruction RZ instead of an accumulator of zeros.
                zero = r in self.d and held is not None and not held.any()
                kind = (
                    "formal: zero moved into an accumulator after wgmma.fence"
                    if zero
                    else "register written after wgmma.fence"
                )
                g.findings.add(kind, self.ins, self.names[r])
        if g.products.accumulators & set(self.a):
            g.findings.add("wgmma's A is an accumulator in flight", self.ins)

    def _operand(self, g: Group, get: Read, extent: int, transposed: bool) -> tuple[Array, Array]:
        """Return a matrix (warp groups, extent, k) in shared memory, and the cells that hold it."""
        bits = g.spread(get(g)).reshape(-1, _GROUP)
        if (bits != bits[:, :1]).any():
            kind = "descriptor differs among the threads of a warp group"
            g.findings.add(kind, self.ins)
        at = np.empty((len(bits), extent, self.k), np.int64)
        for value in np.unique(bits[:, 0]):
            described = matrix.Descriptor.of(int(value))
            at[bits[:, 0] == value] = described.addresses(extent, self.k, self.size, transposed)
        row = np.repeat(np.arange(len(g.programs)), g.threads // _GROUP)[:, None, None]
        found, cells = g.shared.load_matrix(self.ins, row, at, alu.U[8 * self.size])
        return matrix.values(found, self.kind), cells


HANDLERS = {"mma": mma, "wgmma": wgmma}
