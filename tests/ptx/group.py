"""Programs that run side by side: their registers, and the products they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.ptx.alu import Array
from tests.ptx.findings import Findings
from tests.ptx.global_memory import Access, GlobalMemory
from tests.ptx.parse import Instruction
from tests.ptx.shared_memory import SharedMemory

# Which lanes an instruction is for; ``None``: all of them.
Mask = Array | None


@dataclass(frozen=True)
class Product:
    """A ``wgmma`` in flight.

    Attributes:
        rows: The program of each cell of shared memory that it reads.
        cells: Those cells, in their program's row.
        accumulators: The registers that it adds to.
        factors: Those of its A, if that is in registers.
    """

    rows: Array
    cells: Array
    accumulators: tuple[int, ...]
    factors: tuple[int, ...]

    def take(self, place: Array) -> Product:
        """Return it for some programs; ``place`` is the new row of each, or -1."""
        rows = place[self.rows]
        return replace(self, rows=rows[rows >= 0], cells=self.cells[rows >= 0])


class Products:
    """The ``wgmma`` in flight of a group of programs, and what must not touch their registers.

    Attributes:
        fence: The step of the last ``wgmma.fence``.
        last_write: The step in which each register was last written, by anything but a product.
        accumulators: The registers that the products in flight add to.
        factors: Those that they read.
    """

    def __init__(self, registers: int) -> None:
        self.fence = -1
        self.last_write = [0] * registers
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []
        self._note_registers()

    def take(self, place: Array) -> Products:
        """Return those of some programs; ``place`` is the new row of each, or -1."""
        new = object.__new__(Products)
        new.fence, new.last_write = self.fence, list(self.last_write)
        new.open = [product.take(place) for product in self.open]
        new.groups = [[product.take(place) for product in group] for group in self.groups]
        new._note_registers()
        return new

    def begin(
        self,
        shared: SharedMemory,
        cells: Array,
        accumulators: Sequence[int],
        factors: Sequence[int],
    ) -> None:
        shared.begin_product(cells)
        rows, cells = np.divmod(cells, shared.row_cells)
        product = Product(rows, cells, tuple(accumulators), tuple(factors))
        self.open = [*self.open, product]
        self.accumulators |= set(accumulators)
        self.factors |= set(factors)

    def commit(self) -> None:
        self.groups = [*self.groups, self.open]
        self.open = []

    def wait(self, shared: SharedMemory, left: int) -> None:
        """Wait for all groups of products but the last ``left``."""
        done = max(len(self.groups) - left, 0)
        for product in (p for group in self.groups[:done] for p in group):
            shared.end_product(product.rows * shared.row_cells + product.cells)
        self.groups = self.groups[done:]
        self._note_registers()

    def _note_registers(self) -> None:
        flying = [*self.open, *(p for group in self.groups for p in group)]
        self.accumulators = {r for product in flying for r in product.accumulators}
        self.factors = {r for product in flying for r in product.factors}


class Group:
    """Programs with the same history of branches, which therefore share a program counter.

    A lane is a thread of one of them, counted over all; a register is an array with one element
    per lane.

    Attributes:
        programs: The number of each in the launch.
        pc: The next instruction.
        step: Instructions so far.
        registers: ``None`` where nothing was written.
        thread: Of each lane.
        program: Of each lane.
    """

    def __init__(
        self,
        programs: Array,
        threads: int,
        registers: int,
        memory: GlobalMemory,
        shared: SharedMemory,
        findings: Findings,
    ) -> None:
        self.programs = programs
        self.threads = threads
        self.pc = 0
        self.step = 1
        self.registers: list[Array | None] = [None] * registers
        self.memory = memory
        self.shared = shared
        self.findings = findings
        self.products = Products(registers)
        self._number_lanes()

    def _number_lanes(self) -> None:
        self.lanes = len(self.programs) * self.threads
        self.thread = np.tile(np.arange(self.threads, dtype=np.int32), len(self.programs))
        self.program = np.repeat(self.programs.astype(np.int32), self.threads)

    def take(self, rows: Array) -> Group:
        """Return the programs at ``rows`` as a group of their own."""
        new = object.__new__(Group)
        new.__dict__.update(self.__dict__)
        new.programs = self.programs[rows]

        def taken(register: Array | None) -> Array | None:
            if register is None:
                return None
            chosen = register.reshape(-1, self.threads)[rows]
            return np.ascontiguousarray(chosen).reshape(-1)

        new.registers = [taken(register) for register in self.registers]
        new.shared = self.shared.take(rows)
        place = np.full(len(self.programs), -1, np.int64)
        place[rows] = np.arange(len(rows))
        new.products = self.products.take(place)
        new._number_lanes()
        return new

    def spread(self, value: Any) -> Array:
        """Return a value for each lane of what may be one for all."""
        return value if np.shape(value) else np.broadcast_to(value, (self.lanes,))

    def selected(self, mask: Mask) -> Array:
        """Return the lanes of a mask."""
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def access(self, ins: Instruction, lanes: Array, addresses: Array, width: int) -> Access:
        """Return an access to global memory by some lanes."""
        return Access(ins, self.program[lanes], self.thread[lanes], addresses, width)
