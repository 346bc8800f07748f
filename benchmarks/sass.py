"""Machine code of a compiled Triton kernel, counted: no GPU needed, nothing is measured."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from rlr_fast.kernels import _launch

# An SM's shared memory in bytes and the clocks of one scheduler for one FP32 instruction of a
# warp: sm_80 has 16 FP32 lanes a scheduler, later architectures 32.
_SHARED = {arch: most + 1024 for arch, most in _launch.SHARED.items()}
_FP32_CLOCKS = {80: 2, 86: 1, 89: 1, 90: 1, 100: 1, 120: 1}
# Warps and programs that an SM holds at the most.
_RESIDENT = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
# The system's own shared memory in each program; from sm_90 on the cubin's count includes it.
_RESERVED_SHARED = 1024
_TENSOR_MEMORY_COLUMNS = 512

_KINDS = {
    "hgmma": "HGMMA IGMMA QGMMA BGMMA",
    "mma": "HMMA IMMA QMMA OMMA BMMA DMMA",
    "tcgen05": "UTCHMMA UTCQMMA UTCIMMA UTCOMMA UTCMXQMMA",
    "tensor_memory": "LDTM STTM UTCCP",
    "fp32": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2",
    "packed": "FFMA2 FADD2 FMUL2",
    "imad": "IMAD IMUL",
    "alu": "FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 ISETP IADD IADD3 IADD32I IABS IMNMX "
    "VIADD VIADDMNMX VIMNMX VIMNMX3 LEA LOP3 LOP32I PLOP3 PRMT SHF SHL SHR SEL SGXT BMSK MOV "
    "MOV32I P2R R2P",
    "pack": "F2FP I2FP I2IP F2IP",
    "convert": "F2F F2I I2F FRND POPC FLO BREV",
    "ldsm": "LDSM",
    "stsm": "STSM",
    "shfl": "SHFL",
    "bar": "BAR",
    "tma": "UTMALDG UTMASTG UTMAREDG UTMAPF UBLKCP UBLKRED",
}
# These end in the bits a thread moves, as in ldg128.
_SIZED = {
    "ldg": "LDG",
    "stg": "STG",
    "ldgsts": "LDGSTS",
    "lds": "LDS",
    "sts": "STS",
    "ldl": "LDL",
    "stl": "STL",
    "atom": "ATOM ATOMG",
    "atoms": "ATOMS",
    "red": "RED REDG",
}
_KIND_OF = {name: kind for kind, names in (_KINDS | _SIZED).items() for name in names.split()}
# A modifier such as 128, U16, F32, F16x2 or BF16_V2.
_WIDTH = re.compile(r"(?:BF|[FUS])?(8|16|32|64|128|256)(?:(?:x|_V)(\d))?")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Resources:
    """What a program takes of an SM.

    ``stores_local`` and ``loads_local`` are the bytes that one thread writes to and reads from
    local memory when each such instruction runs once: register spills, or none. ``programs_by``
    is the number of programs an SM holds by each limit alone.
    """

    registers: int
    stack: int
    stores_local: int
    loads_local: int
    shared: int
    threads: int
    programs_by: Mapping[str, int]

    @property
    def programs(self) -> int:
        """Programs an SM holds at a time."""
        return min(self.programs_by.values())


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``target`` is the address a direct branch or call leads to."""

    address: int
    predicate: str | None
    opcode: str
    operands: tuple[str, ...]
    target: int | None

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """The name under which ``count`` counts it."""
        if self.opcode.startswith("MUFU"):
            return "ex2" if self.opcode.startswith("MUFU.EX2") else "mufu"
        # UT opens the names of tensor memory's and the copy engine's bookkeeping.
        uniform = self.base.startswith("U") and not self.base.startswith("UT")
        kind = _KIND_OF.get(self.base, "uniform" if uniform else "other")
        return f"{kind}{self.width}" if kind in _SIZED else kind

    @property
    def width(self) -> int:
        """Bits a thread moves, where the instruction accesses memory; 32 where none is named."""
        found = [m for m in map(_WIDTH.fullmatch, self.opcode.split(".")[1:]) if m]
        if not found:
            return 32
        return int(found[-1][1]) * int(found[-1][2] or 1)


@dataclass(frozen=True)
class Loop:
    """A loop from the address of its first instruction to that of its last backward branch."""

    start: int
    end: int
    instructions: tuple[Instruction, ...]
    innermost: bool


@dataclass(frozen=True)
class Counts:
    """Instructions by kind; ``counts[kind]`` is 0 for a kind that does not occur.

    The kinds are ``ex2``, ``mufu`` (the others), ``hgmma`` (wgmma), ``mma`` (mma.sync),
    ``tcgen05``, ``tensor_memory``, ``fp32``, ``packed`` (two FP32 a lane), ``imad``, ``alu``,
    ``pack`` (conversions in the ALU), ``convert`` (those in the MUFU's pipe), ``shfl``, ``bar``,
    ``tma``, ``ldsm``, ``stsm``, ``uniform``, ``other``, and with the bits a thread moves at the
    end, as in ``ldg128``, ``ldg``, ``stg``, ``ldgsts``, ``lds``, ``sts``, ``ldl``, ``stl``,
    ``atom``, ``atoms``, ``red``.
    """

    issue: int
    kinds: Mapping[str, int]

    def __getitem__(self, kind: str) -> int:
        return self.kinds.get(kind, 0)


@dataclass(frozen=True)
class Bound:
    """Predicted clocks of one scheduler for 32 scores, by what limits them."""

    clocks_by: Mapping[str, float]

    @property
    def limit(self) -> str:
        """The name of the largest."""
        return max(self.clocks_by, key=self.clocks_by.__getitem__)

    @property
    def clocks(self) -> float:
        """The largest."""
        return self.clocks_by[self.limit]


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str | tuple[str, ...]],
    constexprs: Mapping[Any, Any],
    *,
    arch: int | str,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    divisible: Sequence[Any] = (),
) -> CompiledKernel:
    """Compile a kernel for an architecture that need not be present.

    Args:
        kernel: A function under ``triton.jit``.
        signature: Types by argument, as ``"*bf16"`` or ``"i32"``, for a tuple those of its
            elements; constexprs may be left out.
        constexprs: Values of the compile-time arguments, by name, or (name, index) in a tuple.
        arch: A compute capability of `_launch.SHARED`, or the name of an AMD architecture such as
            ``"gfx942"``.
        num_warps: Warps a program.
        num_stages: Depth of the software pipeline.
        maxnreg: Most registers a thread, where given.
        divisible: Names, or (name, index), of pointers aligned to 16 bytes and integers that are
            multiples of 16; at a launch Triton finds these by itself.
    """
    if triton.knobs.runtime.interpret or not isinstance(kernel, JITFunction):
        raise RuntimeError("only a triton.jit kernel compiles, and only without TRITON_INTERPRET")
    backend, warp = ("hip", 64) if isinstance(arch, str) else ("cuda", 32)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg

    def path(place: str | tuple[str, int]) -> tuple[int, ...]:
        name, *index = (place,) if isinstance(place, str) else place
        return (kernel.arg_names.index(name), *index)

    source = ASTSource(
        fn=kernel,
        signature=dict(signature) | {n: "constexpr" for n in constexprs if isinstance(n, str)},
        constexprs={path(place): value for place, value in constexprs.items()},
        attrs={path(place): [["tt.divisibility", 16]] for place in divisible},
    )
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def resources(compiled: CompiledKernel, code: Sequence[Instruction] | None = None) -> Resources:
    """Registers, memory and residency of a kernel compiled for CUDA.

    Args:
        compiled: The kernel.
        code: Its ``instructions``, where they are at hand.
    """
    text = _cuobjdump(compiled, "--dump-resource-usage")
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
    metadata = compiled.metadata
    arch, warps = metadata.target.arch, metadata.num_warps
    # A kernel under warp specialisation launches more warps than it was asked for.
    found = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])
    warps = int(found[1]) // 32 if found else warps
    static = max(0, used["SHARED"] - _RESERVED_SHARED) if arch >= 90 else used["SHARED"]
    shared = metadata.shared + static
    # Registers are given in blocks of 256 a warp, from a quarter of the file to each scheduler.
    warps_by_registers = 4 * (65536 // 4 // (-(-used["REG"] * 32 // 256) * 256))
    programs_by = {
        "registers": warps_by_registers // warps,
        "shared": _SHARED[arch] // (-(-(shared + _RESERVED_SHARED) // 128) * 128),
        "threads": min(_RESIDENT[arch][0] // warps, _RESIDENT[arch][1]),
    }
    if getattr(metadata, "tmem_size", 0):
        programs_by["tensor_memory"] = _TENSOR_MEMORY_COLUMNS // metadata.tmem_size
    code = instructions(compiled) if code is None else code
    stores, loads = (sum(i.width // 8 for i in code if i.base == base) for base in ("STL", "LDL"))
    return Resources(used["REG"], used["STACK"], stores, loads, shared, 32 * warps, programs_by)


def instructions(compiled: CompiledKernel) -> list[Instruction]:
    """The instructions of a kernel compiled for CUDA."""
    return parse(_cuobjdump(compiled, "-sass"))


def parse(text: str) -> list[Instruction]:
    """The instructions in the disassembly of one function by ``cuobjdump -sass``."""
    parsed = []
    for line in filter(None, map(_LINE.match, text.splitlines())):
        address, predicate, opcode, rest = line.groups()
        operands = tuple(part.strip() for part in rest.split(",") if part.strip())
        target = None
        if opcode.startswith(("BRA", "CALL")) and operands[-1].startswith("0x"):
            target = int(operands[-1], 16)
        parsed.append(Instruction(int(address, 16), predicate, opcode, operands, target))
    return parsed


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops, by address.

    A backward branch makes a loop when every way to it leads through its target; compilers place
    rare code behind the kernel's end, so the branch that returns from there makes none. A loop's
    instructions are those inside its address range from which its branch is reached, both sides
    of a condition among them. Loops that only wait for a barrier are left out, so that the loop
    around one is still innermost.
    """
    at = {i.address: i for i in code}
    after = {i.address: _successors(i, k.address) for i, k in pairwise(code)}
    before: dict[int, list[int]] = {}
    for address, targets in after.items():
        for target in targets:
            before.setdefault(target, []).append(address)
    # An indirect branch hides where it leads: code that nothing else reaches counts as an entry.
    entries: set[int] = set()
    reached: set[int] = set()
    for address in at:
        if address not in reached:
            entries.add(address)
            reached |= _reach([address], after)
    bodies: dict[int, set[int]] = {}
    ends: dict[int, int] = {}
    for i in code:
        if i.target is None or i.target not in at or i.target > i.address or i.base != "BRA":
            continue
        if i.address == i.target or i.address in _reach(entries, after, without=i.target):
            continue
        body = _reach([i.address], before, without=i.target) | {i.target}
        bodies[i.target] = bodies.get(i.target, set()) | body
        ends[i.target] = i.address
    bodies = {k: body for k, body in bodies.items() if not _waits([at[a] for a in body])}
    return [
        Loop(
            start,
            ends[start],
            tuple(at[a] for a in sorted(body) if start <= a <= ends[start]),
            not any(other < body for other in bodies.values()),
        )
        for start, body in sorted(bodies.items())
    ]


def count(code: Sequence[Instruction]) -> Counts:
    """Issue slots, every instruction but NOP, and instructions by kind."""
    kinds = Counter(i.kind for i in code if i.base != "NOP")
    return Counts(kinds.total(), dict(kinds))


def bound(counts: Counts, elements: float, *, arch: int = 90) -> Bound:
    """Clocks for 32 scores, one a lane of a warp: a model from counts, not a measurement.

    A scheduler issues an instruction a clock and has 4 lanes for MUFU and conversions, 16 for
    the ALU and 32 for FP32 (16 on sm_80; packed FP32 takes two turns, IMAD two clocks at least).
    Tensor cores, memory and latency are not in the model.

    Args:
        counts: Counts of one turn of a loop.
        elements: Scores a thread handles in one turn.
        arch: A compute capability.
    """
    single = _FP32_CLOCKS[arch]
    clocks = {
        "issue": counts.issue,
        "mufu": 8 * (counts["ex2"] + counts["mufu"] + counts["convert"]),
        "fp32": single * (counts["fp32"] + 2 * counts["packed"]) + 2 * counts["imad"],
        "alu": 2 * (counts["alu"] + counts["pack"]),
    }
    return Bound({name: value / elements for name, value in clocks.items()})


def _cuobjdump(compiled: CompiledKernel, option: str) -> str:
    """What cuobjdump prints about the kernel's cubin."""
    if "cubin" not in compiled.asm:
        raise ValueError("machine code is read from kernels compiled for CUDA only")
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise RuntimeError(f"{error}; Triton's wheel for Linux carries it") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [tool, option, "-fun", compiled.metadata.name, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()}")
    return done.stdout


def _successors(i: Instruction, following: int) -> list[int]:
    """Where control may go after an instruction."""
    targets = [] if i.target is None else [i.target]
    # A uniform branch names its condition among its operands.
    always = i.predicate is None and (i.base != "BRA" or len(i.operands) == 1)
    if not (always and i.base in ("BRA", "BRX", "BRXU", "JMP", "EXIT", "RET")):
        targets.append(following)
    return targets


def _reach(
    entries: Iterable[int],
    edges: Mapping[int, Sequence[int]],
    without: int | None = None,
) -> set[int]:
    """The addresses reached from the entries on ways that avoid ``without``."""
    reached: set[int] = set()
    waiting = list(entries)
    while waiting:
        address = waiting.pop()
        if address not in reached and address != without:
            reached.add(address)
            waiting.extend(edges.get(address, ()))
    return reached


def _waits(code: Sequence[Instruction]) -> bool:
    """Whether a loop tries a barrier or sleeps, and does no arithmetic in floating point."""
    work = {"ex2", "mufu", "fp32", "packed", "hgmma", "mma", "tcgen05", "tensor_memory", "tma"}
    tries = any(i.base in ("SYNCS", "NANOSLEEP") for i in code)
    return tries and not any(i.kind in work for i in code)
