"""Global memory of a launch: copies of its tensors' storages, and who accessed which bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.alu import Array, U
from tests.ptx.findings import Findings
from tests.ptx.parse import Instruction

BASE = 0x7F00_0000_0000
# Bytes between two storages, which nobody may access.
_GUARD = 4096
# Bytes that are watched as one.
_CELL = 2
_NOBODY, _SEVERAL = -1, -2


@dataclass(frozen=True)
class Access:
    """What some threads access with one instruction: an address and as many bytes for each."""

    instruction: Instruction
    programs: Array
    threads: Array
    addresses: Array
    width: int


class GlobalMemory:
    """An arena of storages with guards between them, and a shadow for its cells.

    A cell knows whether a view that was passed contains it, whether anybody has written it, the
    programs that wrote and read it, and whether it was added to.
    """

    def __init__(
        self,
        storages: Mapping[int, Array],
        written: Mapping[int, Array | None],
        findings: Findings,
    ) -> None:
        """Copy storages.

        Args:
            storages: The bytes of each.
            written: Which of them hold a value; ``None``: all.
            findings: Where to note what is wrong.
        """
        self.findings = findings
        self.places: dict[int, tuple[int, int]] = {}
        end = _GUARD
        for key, data in storages.items():
            self.places[key] = (end, data.size)
            end += -(-data.size // 256) * 256 + _GUARD
        self.data = np.full(end, 0xFF, np.uint8)
        cells = end // _CELL
        self.inside = np.zeros(cells, bool)
        self.written = np.zeros(cells, bool)
        self.writer = np.full(cells, _NOBODY, np.int32)
        self.reader = np.full(cells, _NOBODY, np.int32)
        self.added = np.zeros(cells, bool)
        for key, data in storages.items():
            start, size = self.places[key]
            self.data[start : start + size] = data
            mask = written[key]
            first, last = start // _CELL, (start + size) // _CELL
            whole = size // _CELL * _CELL
            self.written[first:last] = True if mask is None else mask[:whole:_CELL]

    def allow(
        self, key: int, offset: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
    ) -> int:
        """Let a view of a storage be accessed, and return its address.

        Args:
            key: Of the storage.
            offset: Bytes before the view.
            shape: Of the view.
            strides: In elements.
            itemsize: Bytes of an element.
        """
        start, _ = self.places[key]
        at = np.array([start + offset], np.int64)
        for n, s in zip(shape, strides, strict=True):
            at = (at[:, None] + np.arange(n, dtype=np.int64) * s * itemsize).reshape(-1)
        for byte in range(0, itemsize, _CELL):
            self.inside[(at + byte) // _CELL] = True
        return BASE + start + offset

    def bytes_of(self, key: int) -> Array:
        """Return the bytes of a storage."""
        start, size = self.places[key]
        return self.data[start : start + size]

    def written_bytes(self, key: int) -> Array:
        """Return which bytes of a storage hold a value."""
        start, size = self.places[key]
        return np.repeat(self.written[start // _CELL : (start + size) // _CELL], _CELL)

    def load(self, access: Access) -> Array:
        """Return the bytes (threads, width)."""
        at, allowed = self._check(access)
        width = access.width
        unit = min(width, 8)
        dtype = U[8 * unit]
        data = np.full((len(at), width), 0xFF, np.uint8)
        view = data.view(dtype)
        source = self._as(dtype)
        for i in range(width // unit):
            view[allowed, i] = source[(at[allowed] + unit * i) // unit]
        program = access.programs[allowed]
        unwritten = False
        for cell in self._cells(at[allowed], width):
            unwritten |= not self.written[cell].all()
            writer = self.writer[cell]
            if ((writer != _NOBODY) & (writer != program)).any():
                self._find("global memory read that another program writes", access)
            if self.added[cell].any():
                self._find("global memory both added to and otherwise accessed", access)
            reader = self.reader[cell]
            own = (reader == _NOBODY) | (reader == program)
            self.reader[cell] = np.where(own, program, _SEVERAL)
            # Programs that read it with the same instruction.
            self.reader[cell[self.reader[cell] != program]] = _SEVERAL
        if unwritten:
            self._find("read of unwritten global memory", access)
        return data

    def store(self, access: Access, data: Array) -> None:
        """Write the bytes (threads, width)."""
        at, allowed = self._check(access)
        width = access.width
        at, program = at[allowed], access.programs[allowed]
        data = np.ascontiguousarray(data[allowed])
        unit = min(width, 8)
        dtype = U[8 * unit]
        target, view = self._as(dtype), data.view(dtype)
        for i in range(width // unit):
            where = (at + unit * i) // unit
            target[where] = view[:, i]
            if (target[where] != view[:, i]).any():
                self._find("one store, two values at one global address", access)
        for cell in self._cells(at, width):
            writer = self.writer[cell]
            if ((writer != _NOBODY) & (writer != program)).any():
                self._find("global memory written by two programs", access)
            reader = self.reader[cell]
            if ((reader != _NOBODY) & (reader != program)).any():
                self._find("global memory written that another program reads", access)
            if self.added[cell].any():
                self._find("global memory both added to and otherwise accessed", access)
            self.writer[cell] = program
            if (self.writer[cell] != program).any():
                self._find("global memory written by two programs", access)
            self.written[cell] = True

    def add(self, access: Access, addends: Sequence[Array]) -> None:
        """Add float32 atomically, one for each 4 bytes of the width."""
        at, allowed = self._check(access)
        at = at[allowed]
        for i, addend in enumerate(addends):
            np.add.at(self._as(np.float32), (at + 4 * i) >> 2, addend[allowed])
        for cell in self._cells(at, access.width):
            if not self.written[cell].all():
                self._find("addition to unwritten global memory", access)
            if ((self.writer[cell] != _NOBODY) | (self.reader[cell] != _NOBODY)).any():
                self._find("global memory both added to and otherwise accessed", access)
            self.added[cell] = True

    def _as(self, dtype: Any) -> Array:
        return self.data[: self.data.size // 16 * 16].view(dtype)

    @staticmethod
    def _cells(at: Array, width: int) -> list[Array]:
        return [(at + byte) // _CELL for byte in range(0, width, _CELL)]

    def _find(self, kind: str, access: Access, detail: str = "") -> None:
        self.findings.add(kind, access.instruction, detail)

    def _check(self, access: Access) -> tuple[Array, Array]:
        """Return each thread's place in the arena, and whether it may access it."""
        at, width = access.addresses - BASE, access.width
        aligned = at % width == 0
        if not aligned.all():
            self._find("misaligned global access", access, hex(int(access.addresses[~aligned][0])))
        in_arena = (at >= 0) & (at + width <= self.data.size - 16)
        inside = in_arena.copy()
        for cell in self._cells(np.where(in_arena, at, 0), width):
            inside &= self.inside[cell]
        if not inside.all():
            bad = np.flatnonzero(~inside)[0]
            self._find(
                "global access out of bounds", access,
                f"program {access.programs[bad]} thread {access.threads[bad]} address "
                f"{int(access.addresses[bad]):#x}, {(~inside).sum()} threads",
            )  # fmt: skip
        return at, inside & aligned
