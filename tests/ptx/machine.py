"""The machine: programs of a launch run in groups that share a program counter.

All threads of a program execute an instruction before the next, and a branch that parts the
programs of a group parts the group. One that parts the threads of a program is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tests.ptx import arithmetic, products, transfers
from tests.ptx.findings import Findings, Unsupported
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.group import Group, Mask
from tests.ptx.operands import Action, Operands
from tests.ptx.parse import Instruction, Program
from tests.ptx.shared_memory import SharedMemory

_HANDLERS = arithmetic.HANDLERS | transfers.HANDLERS | products.HANDLERS
# Instructions without a register that they write.
_WITHOUT_RESULT = ("st", "stmatrix", "red", "cp", "bar", "fence", "wgmma", "bra", "ret")


@dataclass(frozen=True)
class _Compiled:
    """An instruction, ready to run; branches and returns have no action."""

    ins: Instruction
    predicate: int | None
    action: Action | None
    writes: tuple[int, ...]
    reads: tuple[int, ...]


class Machine:
    """A program with its parameters.

    Attributes:
        executed: How often each kind of instruction was executed, by a group.
        covered: Whether each instruction was.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        shared_size: int,
        parameters: Mapping[str, int],
        findings: Findings,
    ) -> None:
        self.program = program
        self.memory = memory
        self.shared_size = shared_size
        self.findings = findings
        self.executed: Counter[str] = Counter()
        self.covered = np.zeros(len(program.code), bool)
        self.operands = Operands(program, parameters)
        # Cells of shared memory are as small as the narrowest access.
        widths = [
            transfers.access_width(ins)
            for ins in program.code
            if re.match(r"(ld|st)\.shared", ins.op)
        ]
        self.cell = min([4, *widths])
        self.has_wgmma = any(ins.op.startswith("wgmma") for ins in program.code)
        self.code = [self._compile(ins) for ins in program.code]

    def run(self, grid: int, batch: int) -> None:
        """Run the programs of a grid, ``batch`` at once."""
        with np.errstate(all="ignore"):
            for first in range(0, grid, batch):
                groups = [self._group(np.arange(first, min(first + batch, grid)))]
                while groups:
                    groups.extend(self._run(groups.pop()))

    def _group(self, programs: np.ndarray) -> Group:
        threads = self.program.threads
        shared = SharedMemory(len(programs), threads, self.shared_size, self.cell, self.findings)
        registers = len(self.program.registers)
        return Group(programs, threads, registers, self.memory, shared, self.findings)

    def _compile(self, ins: Instruction) -> _Compiled:
        name = ins.parts[0]
        writes: list[int] = []
        sources = ins.operands
        if name not in _WITHOUT_RESULT and ins.operands:
            writes, sources = self.operands.registers(ins.operands[0]), ins.operands[1:]
        reads = [r for operand in sources for r in self.operands.registers(operand)]
        action = None
        if name not in ("bra", "ret"):
            if name not in _HANDLERS:
                raise Unsupported(f"{ins.op} at line {ins.line}")
            action = _HANDLERS[name](ins, self.operands)
        predicate = self.operands.index[ins.predicate] if ins.predicate else None
        return _Compiled(ins, predicate, action, tuple(writes), tuple(reads))

    def _run(self, g: Group) -> list[Group]:
        """Run a group until it ends or parts, and return what it parts into."""
        while g.pc < len(self.code):
            compiled = self.code[g.pc]
            ins = compiled.ins
            self.covered[g.pc] = True
            self.executed[ins.op] += 1
            g.pc += 1
            g.step += 1
            mask = self._mask(g, compiled)
            if compiled.action is None:
                if ins.op == "ret":
                    if mask is None or mask.all():
                        break
                    if mask.any():
                        raise Unsupported(f"a return of some threads, line {ins.line}")
                elif parted := self._branch(g, ins, mask):
                    return parted
                continue
            if mask is not None:
                if not mask.any():
                    continue
                if mask.all():
                    mask = None
            if self.has_wgmma and not ins.op.startswith("wgmma"):
                self._watch_registers(g, compiled)
            compiled.action(g, mask)
        self._finish(g, self.program.code[g.pc - 1])
        return []

    def _mask(self, g: Group, compiled: _Compiled) -> Mask:
        if compiled.predicate is None:
            return None
        mask = g.registers[compiled.predicate]
        if mask is None:
            self.findings.add("unwritten register", compiled.ins, "predicate")
            mask = np.zeros(g.lanes, bool)
        return ~mask if compiled.ins.negated else mask

    def _branch(self, g: Group, ins: Instruction, mask: Mask) -> list[Group]:
        """Take a branch, or return the groups that it parts a group into."""
        target = self.program.labels[str(ins.operands[0])]
        if mask is None:
            g.pc = target
            return []
        by_program = mask.reshape(len(g.programs), -1)
        taken = by_program.any(1)
        if (taken != by_program.all(1)).any():
            raise Unsupported(f"threads of a program part at line {ins.line}: {ins.text}")
        if taken.all():
            g.pc = target
            return []
        if not taken.any():
            return []
        there, here = g.take(np.flatnonzero(taken)), g.take(np.flatnonzero(~taken))
        there.pc = target
        return [there, here]

    def _watch_registers(self, g: Group, compiled: _Compiled) -> None:
        ins, flying = compiled.ins, g.products
        if flying.accumulators or flying.factors:
            written, read = set(compiled.writes), set(compiled.reads)
            if (written | read) & flying.accumulators or written & flying.factors:
                kind = "register of wgmma in flight"
                self.findings.add(kind, ins, "touched before the wait")
            elif read & flying.factors:
                # As of a zero that is also a factor; PTX forbids it, though nothing is changed.
                self.findings.add("formal: factor of a wgmma in flight read", ins)
        for r in compiled.writes:
            g.products.last_write[r] = g.step

    def _finish(self, g: Group, ins: Instruction) -> None:
        if g.shared.copying:
            self.findings.add("cp.async never waited for", ins)
        if g.products.open or g.products.groups:
            self.findings.add("wgmma never waited for", ins)
