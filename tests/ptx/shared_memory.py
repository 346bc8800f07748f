"""Shared memory of programs that run side by side, and what their threads may not do to it.

Threads of a program are at one place between two barriers and execute an instruction before the
next, so what the order of warps could change is found from marks: a cell remembers the epoch (the
barriers so far) and the thread of its last write and read. Two warps that meet in one epoch at a
cell which one of them writes are a race. So is what meets a ``cp.async`` before it was waited for
(its target holds NaN until then), or a ``wgmma`` that reads in the background.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.alu import Array, U
from tests.ptx.findings import Findings
from tests.ptx.parse import Instruction

BASE = 1024
_NEVER = -1
# The thread of a cell that several warps read, and of one that was not read in this epoch.
_SEVERAL, _NOBODY = -1, -2

# A copy of some bytes for some threads, on its way: their lanes, places and the bytes.
Copy = tuple[Array, Array, Array]


class SharedMemory:
    """Rows of shared memory, one for each of some programs, and a shadow for their cells.

    A lane is a thread of one of the programs, counted over all of them. An offset is a place in a
    program's row.

    Attributes:
        data: The bytes of all rows.
        epoch: Barriers so far.
        warp_epoch: Barriers so far, of warps too.
        fences: Fences so far between ordinary accesses and those of ``wgmma``.
    """

    _SHADOW = (
        "written_in", "written_by", "written_in_warp", "read_in", "read_by", "read_in_warp",
        "fenced", "arriving", "products", "initialized", "copied",
    )  # fmt: skip

    def __init__(self, programs: int, threads: int, size: int, cell: int, findings: Findings):
        """Make rows of ``size`` bytes, watched by cells of ``cell`` bytes."""
        self.findings = findings
        self.threads = threads
        self.size = size
        self.row_size = -(-max(size, 16) // 16) * 16
        self.cell = cell
        self.row_cells = self.row_size // cell
        self.epoch = self.warp_epoch = self.fences = 0
        self.open_copies: list[Copy] = []
        self.copy_groups: list[list[Copy]] = []
        self.data = np.full(programs * self.row_size, 0xFF, np.uint8)
        cells = programs * self.row_cells
        for name in self._SHADOW[:7]:
            setattr(self, name, np.full(cells, _NEVER, np.int32))
        self.arriving = np.zeros(cells, bool)
        self.products = np.zeros(cells, np.int16)
        self.initialized = np.zeros(cells, bool)
        self.copied = np.zeros(cells, bool)
        self._number_lanes(programs)

    def _number_lanes(self, programs: int) -> None:
        self.thread = np.tile(np.arange(self.threads, dtype=np.int32), programs)
        self.row = np.repeat(np.arange(programs, dtype=np.int64), self.threads)

    def take(self, rows: Array) -> SharedMemory:
        """Return the memory of some of the programs."""
        new = object.__new__(SharedMemory)
        new.__dict__.update(self.__dict__)
        new.data = self.data.reshape(-1, self.row_size)[rows].reshape(-1)
        for name in self._SHADOW:
            taken = getattr(self, name).reshape(-1, self.row_cells)[rows].reshape(-1)
            setattr(new, name, taken)
        place = np.full(len(self.row) // self.threads, -1, np.int64)
        place[rows] = np.arange(len(rows))

        def moved(copies: list[Copy]) -> list[Copy]:
            found = []
            for lanes, at, data in copies:
                keep = place[lanes // self.threads] >= 0
                lane = lanes[keep]
                there = place[lane // self.threads] * self.threads + lane % self.threads
                found.append((there, at[keep], data[keep]))
            return found

        new.open_copies = moved(self.open_copies)
        new.copy_groups = [moved(group) for group in self.copy_groups]
        new._number_lanes(len(rows))
        return new

    # Synchronization.

    def barrier(self) -> None:
        self.epoch += 1
        self.warp_epoch += 1

    def warp_barrier(self) -> None:
        self.warp_epoch += 1

    def fence(self) -> None:
        """Order the accesses so far before those of the asynchronous proxy."""
        self.fences += 1

    # Accesses of threads.

    def load(self, ins: Instruction, lanes: Array, addresses: Array, width: int) -> Array:
        """Return the bytes (lanes, width)."""
        at = self._offsets(ins, lanes, addresses, width)
        self._note_read(ins, lanes, at, width)
        unit = min(width, 4)
        first = (self.row[lanes] * self.row_size + at) // unit
        found = self.data.view(U[8 * unit])[first[:, None] + np.arange(width // unit)]
        return np.ascontiguousarray(found).view(np.uint8)

    def store(self, ins: Instruction, lanes: Array, addresses: Array, data: Array) -> None:
        """Write the bytes (lanes, width)."""
        width = data.shape[1]
        at = self._offsets(ins, lanes, addresses, width)
        unit = min(self.cell, width)
        dtype = U[8 * unit]
        first = (self.row[lanes] * self.row_size + at) // unit
        where = first[:, None] + np.arange(width // unit)
        target, view = self.data.view(dtype), np.ascontiguousarray(data).view(dtype)
        _, clash = self._note_write(ins, lanes, at, width, target[where] != view)
        target[where] = view
        lost = target[where] != view
        if lost.any():
            i, j = np.argwhere(lost)[0]
            there = target[where[i, j]].tobytes().hex()
            detail = (
                f"thread {self.thread[lanes[i]]}: {view[i, j].tobytes().hex()}, and another thread "
                f"{there}; {lost.sum()} cells"
            )
            if (lost & clash.any(1)[:, None]).any():
                self.findings.add("one store, two values at one shared address", ins, detail)
            else:
                kind = "within a warp: one store, two values at one address"
                self.findings.add(kind, ins, detail)
        elif clash.any():
            self.findings.add("benign: same value written twice", ins, "by one instruction")

    # Asynchronous copies.

    def start_copy(self, ins: Instruction, lanes: Array, addresses: Array, data: Array) -> None:
        """Begin to write the bytes (lanes, width); until they arrive there is NaN."""
        width = data.shape[1]
        at = self._offsets(ins, lanes, addresses, width)
        cell, _ = self._note_write(ins, lanes, at, width)
        self.arriving[cell] = True
        self.data[self._places(lanes, at, width)] = 0xFF
        self.open_copies = [*self.open_copies, (lanes, at, data)]

    def commit_copies(self) -> None:
        self.copy_groups = [*self.copy_groups, self.open_copies]
        self.open_copies = []

    def wait_for_copies(self, left: int) -> None:
        """Let all groups of copies but the last ``left`` arrive, for the threads that waited."""
        done = max(len(self.copy_groups) - left, 0)
        for group in self.copy_groups[:done]:
            for lanes, at, data in group:
                self.data[self._places(lanes, at, data.shape[1])] = data
                cell = self._cells(lanes, at, data.shape[1])
                self.arriving[cell] = False
                self._mark_written(cell, self.thread[lanes][:, None])
                self.copied[cell] = True
        self.copy_groups = self.copy_groups[done:]

    @property
    def copying(self) -> bool:
        """Whether there are copies that nobody has waited for."""
        return bool(self.open_copies) or any(self.copy_groups)

    # Accesses of wgmma.

    def load_matrix(
        self, ins: Instruction, rows: Array, addresses: Array, dtype: Any
    ) -> tuple[Array, Array]:
        """Return elements as ``wgmma`` reads them, and the cells that hold them.

        Args:
            ins: The product.
            rows: The program's row for each matrix (matrices, 1, 1).
            addresses: (matrices, extent, k).
            dtype: Unsigned and as wide as an element.
        """
        at, size = addresses - BASE, np.dtype(dtype).itemsize
        if (at < 0).any() or (at + size > self.size).any():
            detail = f"offsets {at.min()} to {at.max()} of {self.size}"
            self.findings.add("wgmma reads shared memory out of bounds", ins, detail)
            at = np.clip(at, 0, self.row_size - size)
        found = self.data.view(dtype)[(rows * self.row_size + at) // size]
        cell = np.unique((rows * self.row_cells + at // self.cell).reshape(-1))
        unfenced, copied = self.fenced[cell] == self.fences, self.copied[cell]
        for bad, kind in (
            (self.arriving[cell], "wgmma reads shared memory before its cp.async is waited for"),
            (~self.initialized[cell], "wgmma reads unwritten shared memory"),
            (
                self.written_in[cell] == self.epoch,
                "shared race: wgmma reads without a barrier after the write",
            ),
            (unfenced & ~copied, "wgmma reads without fence.proxy.async after the write"),
            (unfenced & copied, "formal: wgmma reads without fence.proxy.async after a cp.async"),
        ):
            if bad.any():
                self.findings.add(kind, ins, f"{bad.sum()} cells")
        self.read_in[cell], self.read_by[cell] = self.epoch, _SEVERAL
        return found, cell

    def begin_product(self, cells: Array) -> None:
        """Note that a ``wgmma`` reads cells in the background."""
        self.products[cells] += 1

    def end_product(self, cells: Array) -> None:
        """Note that it was waited for."""
        self.products[cells] -= 1
        self.read_in[cells], self.read_by[cells] = self.epoch, _SEVERAL

    # What is watched.

    def _offsets(self, ins: Instruction, lanes: Array, addresses: Array, width: int) -> Array:
        at = addresses - BASE
        aligned = at % width == 0
        if not aligned.all():
            self.findings.add("misaligned shared access", ins, hex(int(addresses[~aligned][0])))
        inside = (at >= 0) & (at + width <= self.size) & aligned
        if not inside.all():
            bad = np.flatnonzero(~inside)[0]
            detail = f"thread {self.thread[lanes[bad]]} offset {int(at[bad])} of {self.size}"
            self.findings.add("shared access out of bounds", ins, detail)
            at = np.where(inside, at, 0)
        return at

    def _places(self, lanes: Array, at: Array, width: int) -> Array:
        return (self.row[lanes] * self.row_size + at)[:, None] + np.arange(width)

    def _cells(self, lanes: Array, at: Array, width: int) -> Array:
        """Return the cells (lanes, cells of one access)."""
        first = self.row[lanes] * self.row_cells + at // self.cell
        return first[:, None] + np.arange(max(1, width // self.cell))

    def _note_read(self, ins: Instruction, lanes: Array, at: Array, width: int) -> None:
        cell = self._cells(lanes, at, width)
        thread = np.broadcast_to(self.thread[lanes][:, None], cell.shape)
        if self.arriving[cell].any():
            self.findings.add("shared memory read before its cp.async is waited for", ins)
        initialized = self.initialized[cell]
        if not initialized.all():
            detail = f"{(~initialized).sum()} cells"
            self.findings.add("read of unwritten shared memory", ins, detail)
        now = self.written_in[cell] == self.epoch
        if now.any():
            writer = self.written_by[cell]
            other_warp = now & (writer // 32 != thread // 32)
            if other_warp.any():
                self._race("shared race: read after write", ins, writer, cell, thread, other_warp)
            close = now & ~other_warp & (writer != thread)
            close &= self.written_in_warp[cell] == self.warp_epoch
            if close.any():
                self._race("within a warp: read after write", ins, writer, cell, thread, close)
        reader = np.where(self.read_in[cell] == self.epoch, self.read_by[cell], _NOBODY)
        alone = (reader == _NOBODY) | ((reader >= 0) & (reader // 32 == thread // 32))
        self.read_by[cell] = np.where(alone, thread, _SEVERAL)
        # Warps that read it with the same instruction.
        last = self.read_by[cell]
        several = (last // 32 != thread // 32) & (last != _SEVERAL)
        self.read_by[cell[several]] = _SEVERAL
        self.read_in[cell] = self.epoch
        self.read_in_warp[cell] = self.warp_epoch

    def _note_write(
        self, ins: Instruction, lanes: Array, at: Array, width: int, differs: Array | None = None
    ) -> tuple[Array, Array]:
        """Note a write.

        Args:
            ins: The instruction.
            lanes: Who writes.
            at: Offsets.
            width: Bytes of an access.
            differs: Whether the value changes what is there, for each cell; ``None``: it does.

        Returns:
            The cells, and for each whether another warp writes it with the same instruction.
        """
        cell = self._cells(lanes, at, width)
        thread = np.broadcast_to(self.thread[lanes][:, None], cell.shape)
        if self.arriving[cell].any():
            self.findings.add("shared memory written while a cp.async is in flight", ins)
        if self.products[cell].any():
            self.findings.add("shared memory written while a wgmma reads it", ins)
        writer = self.written_by[cell]
        other = (self.written_in[cell] == self.epoch) & (writer // 32 != thread // 32)
        if other.any():
            same = differs is not None and not (other & differs).any()
            kind = "benign: same value written twice" if same else "shared race: write after write"
            self._race(kind, ins, writer, cell, thread, other)
        reader, read_now = self.read_by[cell], self.read_in[cell] == self.epoch
        other = read_now & ((reader == _SEVERAL) | (reader // 32 != thread // 32))
        if other.any():
            self._race("shared race: write after read", ins, reader, cell, thread, other)
        close = read_now & ~other & (reader != thread)
        close &= self.read_in_warp[cell] == self.warp_epoch
        if close.any():
            self._race("within a warp: write after read", ins, reader, cell, thread, close)
        self._mark_written(cell, thread)
        clash = self.written_by[cell] // 32 != thread // 32
        return cell, clash

    def _mark_written(self, cell: Array, thread: Array) -> None:
        self.written_by[cell] = thread
        self.written_in[cell] = self.epoch
        self.written_in_warp[cell] = self.warp_epoch
        self.fenced[cell] = self.fences
        self.initialized[cell] = True
        self.copied[cell] = False

    def _race(
        self, kind: str, ins: Instruction, others: Array, cell: Array, thread: Array, bad: Array
    ) -> None:
        i, j = np.argwhere(bad)[0]
        offset = cell[i, j] % self.row_cells * self.cell
        met = "several warps" if others[i, j] == _SEVERAL else f"thread {others[i, j]}"
        detail = f"offset {offset}: thread {thread[i, j]} and {met}, {bad.sum()} cells"
        self.findings.add(kind, ins, detail)
