"""Instructions that move data between registers, shared memory and global memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx import alu
from tests.ptx.alu import Array
from tests.ptx.findings import Unsupported
from tests.ptx.group import Group, Mask
from tests.ptx.operands import Action, Operands
from tests.ptx.parse import Instruction

_VECTORS = {"v2", "v4", "v8"}


def _space(ins: Instruction) -> str:
    """Return ``param``, ``global`` or ``shared`` of a load or store; others are refused."""
    space = ins.parts[1].partition(":")[0]
    allowed = ("global", "shared", "param") if ins.parts[0] == "ld" else ("global", "shared")
    if space not in allowed or set(ins.parts[2:-1]) - _VECTORS:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return space


def access_width(ins: Instruction) -> int:
    """Return the bytes of a load or store, for each thread."""
    vector = next((int(part[1:]) for part in ins.parts if part in _VECTORS), 1)
    return int(ins.parts[-1][1:]) // 8 * vector


def load(ins: Instruction, operands: Operands) -> Action:
    space, kind = _space(ins), ins.parts[-1]
    bits = int(kind[1:])
    if space == "param":
        return _load_parameter(ins, operands)
    puts, address = operands.writes(ins.operands[0]), operands.address(ins.operands[1])
    dtype, width = alu.U[bits], bits // 8 * len(puts)

    def action(g: Group, mask: Mask) -> None:
        lanes = g.selected(mask)
        addresses = address(g)[lanes]
        if space == "global":
            found = g.memory.load(g.access(ins, lanes, addresses, width))
        else:
            found = g.shared.load(ins, lanes, addresses, width)
        found = found.view(dtype)
        for i, put in enumerate(puts):
            if mask is None:
                put(g, None, np.ascontiguousarray(found[:, i]))
            else:
                full = np.zeros(g.lanes, dtype)
                full[lanes] = found[:, i]
                put(g, mask, full)

    return action


def _load_parameter(ins: Instruction, operands: Operands) -> Action:
    name, kind = str(ins.operands[1]).strip("[] "), ins.parts[-1]
    if name not in operands.parameters:
        raise Unsupported(f"parameter {name} at line {ins.line}")
    put = operands.write(ins.operands[0])
    bits = int(kind[1:])
    masked = operands.parameters[name] & (2**bits - 1)
    number = np.array([masked], alu.U[bits]).view(alu.dtype_of(kind))[0]
    return lambda g, mask: put(g, mask, number)


def store(ins: Instruction, operands: Operands) -> Action:
    space, bits = _space(ins), int(ins.parts[-1][1:])
    gets = operands.reads(ins.operands[1], f"u{bits}")
    address = operands.address(ins.operands[0])

    def action(g: Group, mask: Mask) -> None:
        lanes = g.selected(mask)
        data = np.stack([g.spread(get(g))[lanes] for get in gets], 1)
        data = np.ascontiguousarray(data).view(np.uint8).reshape(len(lanes), -1)
        addresses = address(g)[lanes]
        if space == "global":
            g.memory.store(g.access(ins, lanes, addresses, data.shape[1]), data)
        else:
            g.shared.store(ins, lanes, addresses, data)

    return action


def atomic(ins: Instruction, operands: Operands) -> Action:
    """Add float32 in global memory, with ``atom`` or without a result with ``red``.

    Order and scope are of no concern to a sum.
    """
    space, *modifiers, kind = ins.parts[1:]
    known = {"gpu", "relaxed", "acquire", "release", "acq_rel", "add", *_VECTORS}
    if space != "global" or "add" not in modifiers or kind != "f32" or set(modifiers) - known:
        raise Unsupported(f"{ins.op} at line {ins.line}")
    *result, place, source = ins.operands
    puts = [put for operand in result for put in operands.writes(operand)]
    gets, address = operands.reads(source, "f32"), operands.address(place)

    def action(g: Group, mask: Mask) -> None:
        lanes = g.selected(mask)
        access = g.access(ins, lanes, address(g)[lanes], 4 * len(gets))
        g.memory.add(access, [g.spread(get(g))[lanes] for get in gets])
        # What was there before depends on the order of the programs: whoever uses it is noticed.
        for put in puts:
            put(g, mask, np.float32(np.nan))

    return action


def _eights(ins: Instruction) -> tuple[int, bool]:
    """Return how many 8x8 matrices ldmatrix or stmatrix moves, and whether transposed."""
    # ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16
    parts = [part.partition(":")[0] for part in ins.parts]
    trans = "trans" in parts
    expected = ["sync", "aligned", "m8n8", parts[4], *["trans"] * trans, "shared", "b16"]
    if parts[1:] != expected or parts[4] not in ("x1", "x2", "x4"):
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return int(parts[4][1:]), trans


def load_matrix(ins: Instruction, operands: Operands) -> Action:
    count, trans = _eights(ins)
    puts, address = operands.writes(ins.operands[0]), operands.address(ins.operands[1])

    def action(g: Group, mask: Mask) -> None:
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        lanes = np.flatnonzero(g.thread % 32 < 8 * count)
        x = g.shared.load(ins, lanes, address(g)[lanes], 16).reshape(-1, count, 8, 16)
        if trans:
            x = np.ascontiguousarray(x.view(np.uint16).transpose(0, 1, 3, 2))
        x = x.view(np.uint32)  # (warps, count, 8, 4)
        for i, put in enumerate(puts):
            put(g, None, np.ascontiguousarray(x[:, i]).reshape(-1))

    return action


def store_matrix(ins: Instruction, operands: Operands) -> Action:
    count, trans = _eights(ins)
    gets, address = operands.reads(ins.operands[1], "u32"), operands.address(ins.operands[0])

    def action(g: Group, mask: Mask) -> None:
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        x = np.ascontiguousarray(np.stack([get(g).reshape(-1, 8, 4) for get in gets], 1))
        if trans:
            x = np.ascontiguousarray(x.view(np.uint16).transpose(0, 1, 3, 2))
        data = x.view(np.uint8).reshape(-1, 16)
        lanes = np.flatnonzero(g.thread % 32 < 8 * count)
        g.shared.store(ins, lanes, address(g)[lanes], data)

    return action


def copy(ins: Instruction, operands: Operands) -> Action:
    """``cp.async`` from global to shared memory, its commit and its wait."""
    if ins.op == "cp.async.commit_group":
        return _for_all(ins, lambda g: g.shared.commit_copies())
    if ins.op == "cp.async.wait_group":
        left = int(str(ins.operands[0]), 0)
        return _for_all(ins, lambda g: g.shared.wait_for_copies(left))
    if ins.op not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        raise Unsupported(f"{ins.op} at line {ins.line}")
    target, source = operands.address(ins.operands[0]), operands.address(ins.operands[1])
    width = int(str(ins.operands[2]), 0)
    size = operands.read(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def action(g: Group, mask: Mask) -> None:
        lanes = g.selected(mask)
        data: Array = np.zeros((len(lanes), width), np.uint8)
        taken = np.full(len(lanes), width)
        if size is not None:
            taken = g.spread(size(g))[lanes].astype(np.int64)
        if ((taken != 0) & (taken != width)).any():
            raise Unsupported(f"cp.async of a part, line {ins.line}")
        real = np.flatnonzero(taken == width)
        if len(real):
            access = g.access(ins, lanes[real], source(g)[lanes[real]], width)
            data[real] = g.memory.load(access)
        g.shared.start_copy(ins, lanes, target(g)[lanes], data)

    return action


def _for_all(ins: Instruction, function: Callable[[Group], None]) -> Action:
    def action(g: Group, mask: Mask) -> None:
        if mask is not None:
            raise Unsupported(f"{ins.op} under a predicate, line {ins.line}")
        function(g)

    return action


def barrier(ins: Instruction, operands: Operands) -> Action:
    if ins.op == "bar.warp.sync":
        return _for_all(ins, lambda g: g.shared.warp_barrier())
    if ins.op != "bar.sync" or ins.operands != ["0"]:
        raise Unsupported(f"{ins.text} at line {ins.line}")
    return _for_all(ins, lambda g: g.shared.barrier())


def fence(ins: Instruction, operands: Operands) -> Action:
    if ins.op != "fence.proxy.async.shared::cta":
        raise Unsupported(f"{ins.op} at line {ins.line}")
    return _for_all(ins, lambda g: g.shared.fence())


HANDLERS = {
    "atom": atomic,
    "bar": barrier,
    "cp": copy,
    "fence": fence,
    "ld": load,
    "ldmatrix": load_matrix,
    "red": atomic,
    "st": store,
    "stmatrix": store_matrix,
}
