"""A driver for Triton whose device is the machine.

Triton binds the arguments of a launch, specializes and compiles the kernel for an architecture and
looks at the device's limits as it would for a GPU; the launch then runs the PTX on tensors in the
CPU's memory. Its compiler stops at the PTX: ``ptxas`` is not called.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tests.ptx.alu import Array
from tests.ptx.findings import Finding, Findings, Unsupported
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.machine import Machine
from tests.ptx.parse import Program, parse

# A function of a kernel's name and PTX that returns the PTX to run.
Change = Callable[[str, str], str]

# The most shared memory of one program.
_LARGEST_SHARED = {"80": 163 * 1024, "86": 99 * 1024, "89": 99 * 1024, "90": 227 * 1024}
_INTEGERS = re.compile(r"[iu](1|8|16|32|64)")


@dataclass
class Run:
    """What one launch gave.

    Attributes:
        kernel: Module and name.
        programs: Of the grid.
        options: Of the compiler: warps, stages and registers.
        constants: By name.
        seconds: Of this process.
        findings: What is wrong with it, or worth knowing.
        executed: How often each kind of instruction was executed, by a group of programs.
        uncovered: Lines of the PTX that were not.
    """

    kernel: str
    programs: int
    options: dict[str, int]
    constants: dict[str, Any]
    seconds: float
    findings: list[Finding]
    executed: Counter[str]
    uncovered: list[int]

    @property
    def name(self) -> str:
        """Of the kernel alone."""
        return self.kernel.rpartition(".")[2]


@dataclass
class Log:
    """All launches inside `machine_as_device`."""

    runs: list[Run] = field(default_factory=list)

    def findings(self, mild: bool) -> list[tuple[str, Finding]]:
        """Return the findings that are mild, or those that are not, each with its kernel."""
        return [(run.kernel, f) for run in self.runs for f in run.findings if f.mild == mild]


def _bytes(tensor: Tensor) -> Array:
    """Return the bytes of a tensor's whole storage."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(memory, np.uint8)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Unwritten:
    """Which bytes kernels have written, of storages that ``torch.empty`` made.

    They are filled with NaN.
    """

    def __init__(self) -> None:
        # Storages are kept, so that no other takes their address.
        self.storages: dict[int, tuple[Any, Array]] = {}

    def note(self, tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel():
            data = _bytes(tensor)
            data[:] = 0xFF
            self.storages[_key(tensor)] = tensor.untyped_storage(), np.zeros(data.size, bool)
        return tensor

    def written(self, key: int) -> Array | None:
        """Return which bytes were written; ``None``: all."""
        return self.storages[key][1] if key in self.storages else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what ``torch.empty`` and its like make."""
        with contextlib.ExitStack() as stack:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                plain = getattr(owner, name)

                def noted(*args: Any, plain: Any = plain, **kwargs: Any) -> Tensor:
                    return self.note(plain(*args, **kwargs))

                stack.enter_context(mock.patch.object(owner, name, noted))
            yield


def _leaves(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each type of a signature with its argument; Triton passes tuples element by element."""
    if isinstance(signature, tuple):
        for part, element in zip(signature, value, strict=True):
            yield from _leaves(part, element)
    else:
        yield signature, value


def _parameters(
    program: Program, signature: Sequence[Any], arguments: Sequence[Any], memory: GlobalMemory
) -> dict[str, int]:
    """Return what each parameter holds, as bits."""
    numbers: list[int] = []
    for kind, value in _leaves(tuple(signature), tuple(arguments)):
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            size = value.element_size()
            offset = value.storage_offset() * size
            numbers.append(memory.allow(_key(value), offset, value.shape, value.stride(), size))
        elif kind == "fp32":
            numbers.append(struct.unpack("I", struct.pack("f", value))[0])
        elif _INTEGERS.fullmatch(kind):
            numbers.append(int(value))
        else:
            raise Unsupported(f"a kernel's argument of type {kind}")
    # Behind them are pointers to scratch memory, which no kernel that the machine runs has.
    numbers += [0] * (len(program.parameters) - len(numbers))
    names = [name for name, _ in program.parameters]
    return dict(zip(names, numbers, strict=True))


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


_parsed = functools.lru_cache(maxsize=64)(parse)


class MachineDriver:
    """What Triton asks of a driver.

    A device's number is its architecture, so that Triton keeps what it compiled for each apart.
    """

    def __init__(self, arch: str, change: Change | None = None, batch: int = 48) -> None:
        """Make a driver.

        Args:
            arch: ``"80"`` or ``"90"``.
            change: May damage the PTX of a kernel, given its name.
            batch: Programs that run side by side.
        """
        self.arch = int(arch)
        self.change = change
        self.batch = batch
        self.log = Log()
        self.unwritten = _Unwritten()
        # Triton calls a driver for its device and, by this name, for its functions.
        self.utils = self
        # Kept by Triton with what it compiled: another driver may have made it.
        self.launcher_cls = _Launcher

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _LARGEST_SHARED[str(self.arch)]}

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[Any, str, int, int, int]:
        """Return a module, a function, its registers, spills and the most threads."""
        return name, kernel.decode(), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Do nothing: a module is a name."""

    def program(self, name: str, ptx: str) -> Program:
        """Return the program of a kernel, after it was changed."""
        if self.change is not None:
            ptx = self.change(name, ptx)
        return _parsed(ptx)

    def execute(self, launcher: _Launcher, grid: int, ptx: str, arguments: Sequence[Any]) -> Run:
        """Run a launch on its CPU tensors."""
        began = time.process_time()
        source, metadata = launcher.source, launcher.metadata
        for name in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, name, 0):
                raise Unsupported(f"a kernel with {name} {getattr(metadata, name)}")
        function = source.fn
        program = self.program(function.__name__, ptx)
        storages = {_key(tensor): _bytes(tensor) for tensor in _tensors(arguments)}
        written = {key: self.unwritten.written(key) for key in storages}
        findings = Findings()
        memory = GlobalMemory(storages, written, findings)
        parameters = _parameters(program, list(source.signature.values()), arguments, memory)
        machine = Machine(program, memory, metadata.shared, parameters, findings)
        machine.run(grid, self.batch)
        for key, data in storages.items():
            data[:] = memory.bytes_of(key)
            mask = written[key]
            if mask is not None:
                found = memory.written_bytes(key)
                mask[: found.size] |= found
        names = function.arg_names
        constants = {
            names[path[0]]: value for path, value in source.constants.items() if len(path) == 1
        }
        options = {name: getattr(metadata, name) for name in ("num_warps", "num_stages", "maxnreg")}
        return Run(
            f"{function.__module__.removeprefix('rlr_fast.kernels.')}.{function.__name__}",
            grid,
            {name: value for name, value in options.items() if value},
            constants,
            time.process_time() - began,
            list(findings.values()),
            machine.executed,
            [ins.line for ins in program.code if not machine.covered[ins.index]],
        )


class _Launcher:
    """Called by Triton for each launch of a kernel that it has compiled."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source
        self.metadata = metadata

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: str,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        if (grid_y, grid_z) != (1, 1):
            raise Unsupported(f"a grid of {grid_x} x {grid_y} x {grid_z} programs")
        driver = triton.runtime.driver.active
        driver.log.runs.append(driver.execute(self, grid_x, function, arguments))


def _stop_at_ptx(*stages: Any) -> tuple[str, str] | None:
    """Let Triton's compiler end with the PTX, in the place of machine code.

    Triton asks without arguments for what tells such code from others in its cache.
    """
    if not stages:
        return "stop at PTX", "stop at PTX"
    _, named, *_ = stages
    named["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextlib.contextmanager
def machine_as_device(arch: str, change: Change | None = None, batch: int = 48) -> Iterator[Log]:
    """Run Triton's launches on CPU tensors by the machine, and log them.

    Args:
        arch: ``"80"`` or ``"90"``.
        change: May damage the PTX of a kernel, given its name.
        batch: Programs that run side by side.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing compiles under Triton's interpreter: unset TRITON_INTERPRET")
    knobs, driver = triton.knobs, MachineDriver(arch, change, batch)
    with (
        knobs.cache.scope(),
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        driver.unwritten.watching(),
    ):
        # A folder of its own, because what it compiles ends before machine code.
        knobs.cache.dir = os.path.join(knobs.cache.dir, "ptx-machine")
        yield driver.log
