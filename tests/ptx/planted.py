"""Bugs planted in the PTX of the kernels, each of which must fail a run.

They are of the kinds that a kernel, or Triton's compiler, could have: a barrier, a fence, a wait or
a mask that is missing, an address or a constant that is a little off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.ptx.cases import ARCHES, CASES
from tests.ptx.findings import Unsupported
from tests.ptx.runs import run

# A function of the PTX that returns it damaged.
Damage = Callable[[str], str]
Replacement = str | Callable[[re.Match[str]], str]

BARRIER = r"bar\.sync\s+0;"
# One before values that each warp rearranges for itself, in shared memory that it used before.
_BARRIER_OF_LANES = (
    r"bar\.sync\s+0;(?=(?:(?!bar\.sync|\bbra\b|ld\.shared|ldmatrix)[\s\S])*?bar\.warp\.sync)"
)
_WINDOW_5 = r"(setp\.lt\.u32\s+%p\d+, %r\d+), 5;"
_DESCRIPTOR = r"46116862933\d+"
_WAIT = r"wgmma\.wait_group\.sync\.aligned 0;"


class NotApplicable(Exception):
    """The PTX has nothing to damage."""


def nth(pattern: str, n: int, replacement: Replacement) -> Damage:
    """Replace the nth match, from 0 or, negative, from the end."""

    def damage(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        if not -len(matches) <= n < len(matches):
            raise NotApplicable(f"{len(matches)} matches of {pattern}")
        m = matches[n]
        new = replacement if isinstance(replacement, str) else replacement(m)
        return ptx[: m.start()] + new + ptx[m.end() :]

    return damage


def every(pattern: str, replacement: Replacement) -> Damage:
    """Replace every match."""

    def damage(ptx: str) -> str:
        new, count = re.subn(pattern, replacement, ptx)
        if not count:
            raise NotApplicable(f"no match of {pattern}")
        return new

    return damage


@dataclass(frozen=True)
class Bug:
    """A bug in one kernel of a case.

    Attributes:
        name: What is wrong.
        case: Of `CASES`.
        kernel: Whose PTX is damaged.
        damage: How.
        arches: Where it can be planted.
        dtype: In which it is.
        chosen: Where the tests plant it.
    """

    name: str
    case: str
    kernel: str
    damage: Damage
    arches: tuple[str, ...] = ARCHES
    dtype: str = "bf16"
    chosen: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.case} {self.kernel}: {self.name}"


def notice(bug: Bug, arch: str) -> str:
    """Return what the machine notices of a bug; nothing if it misses it."""
    launched: set[str] = set()

    def change(kernel: str, ptx: str) -> str:
        launched.add(kernel)
        return bug.damage(ptx) if kernel == bug.kernel else ptx

    try:
        backward = bug.kernel != "forward_kernel"
        result = run(CASES[bug.case], arch, bug.dtype, change, backward)
    except Unsupported as refusal:
        return f"refused: {refusal}"
    if bug.kernel not in launched:
        raise NotApplicable(f"{bug.case} launches no {bug.kernel}")
    kinds = sorted({f.kind for _, f in result.log.findings(mild=False)})
    wrong = [f"{name} off by {result.verdicts[name].error:.1e}" for name in result.wrong]
    return "; ".join(kinds + wrong)


_MLKA, _LCA = "mlka-9x13-w5-d16-chunks", "lca-9x13-w5-d16-chunks"
_LOOP = "mlka-16x16-w5-d64-mixed"

_BUGS = (
    Bug(
        "wait for one group of copies fewer", _LOOP, "forward_kernel",
        nth(r"cp\.async\.wait_group\s+(\d+)", 0, lambda m: f"cp.async.wait_group {int(m[1]) + 1}"),
    ),
    Bug("windows two wider", _LOOP, "forward_kernel", every(_WINDOW_5, r"\1, 7;")),
    Bug(
        "one constant of a window's test", _LOOP, "forward_kernel",
        nth(_WINDOW_5, 0, lambda m: f"{m[1]}, 6;"),
    ),
    Bug(
        "signed comparison for unsigned", _LOOP, "backward_key_kernel",
        every(r"setp\.lt\.u32(\s+%p\d+, %r\d+, 5;)", r"setp.lt.s32\1"),
    ),
    Bug(
        "a store without its mask", _MLKA, "forward_kernel", every(r"@%p\d+ (st\.global)", r"\1"),
        chosen=("80",),
    ),
    Bug(
        "a load without its mask", _MLKA, "forward_kernel", every(r"@%p\d+ (ld\.global)", r"\1"),
    ),
    Bug(
        "cp.async ignores its mask", _LCA, "forward_kernel",
        every(r"(cp\.async\.cg[^;]*), 0x10, %r\d+;", r"\1, 0x10, 16;"), chosen=("90",),
    ),
    Bug(
        "a store beside its place", _LOOP, "forward_kernel",
        nth(r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0", -1, lambda m: f"{m[1]} 16"),
    ),
    Bug("a store left out", _LOOP, "forward_kernel", nth(r"st\.global\.v4[^;]*;", -1, "")),
    Bug(
        "a coefficient of exp2's cubic doubled", _MLKA, "forward_kernel",
        every(r"0f3F31798D", "0f3FB1798D"), chosen=("80",),
    ),
    Bug("a barrier left out", _MLKA, "backward_key_kernel", nth(BARRIER, 1, ""), chosen=("90",)),
    Bug(
        "a barrier between lanes of a warp left out", _MLKA, "backward_key_kernel",
        nth(_BARRIER_OF_LANES, -1, ""), chosen=("80",),
    ),
    Bug(
        "ln 2 of dK a little off", "mlka-9x13-w5-d16", "backward_key_kernel",
        every(r"0f3F317218", "0f3F337218"), dtype="fp32",
    ),
    Bug(
        "atomics beside their place", _LCA, "backward_kernel",
        nth(r"((?:atom|red)\.global[^\[]*\[ %rd\d+ \+) 0", 0, lambda m: f"{m[1]} 16"),
        chosen=("90",),
    ),
    Bug(
        "atomics without their mask", _LCA, "backward_kernel",
        every(r"@%p\d+ ((?:atom|red)\.global)", r"\1"),
        chosen=("80",),
    ),
    Bug("a barrier left out", _LCA, "backward_kernel", nth(BARRIER, 2, ""), chosen=("90",)),
    Bug("a barrier left out", _LCA, "forward_kernel", nth(BARRIER, 0, "")),
    Bug(
        "the first key of a halo hidden", _LCA, "forward_kernel",
        nth(
            r"selp\.b16(\s+%rs\d+), ([-\d]+), ([-\d]+),", 0,
            lambda m: f"selp.b16{m[1]}, {m[3]}, {m[2]},",
        ), chosen=("80",),
    ),
    Bug(
        "shuffle from the wrong lane", _LCA, "forward_kernel",
        nth(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", 0, lambda m: f"{m[1]}, 4,"),
        chosen=("90",),
    ),
    Bug(
        "ldmatrix at another row", _LCA, "backward_kernel",
        nth(r"(ldmatrix[^\[]*\[%r\d+)\];", 0, lambda m: f"{m[1]}+16];"), chosen=("80",),
    ),
    Bug(
        "ldmatrix forgets to transpose", _LCA, "backward_kernel",
        nth(r"(ldmatrix\S*)\.trans", 0, lambda m: m[1]),
    ),
    Bug(
        "mma with its B swapped", _MLKA, "forward_kernel",
        every(
            r"(mma\.sync\S* \{[^}]*\}, \{[^}]*\}, \{ ?)(%r\d+), (%r\d+)",
            lambda m: f"{m[1]}{m[3]}, {m[2]}",
        ),
        arches=("80",), chosen=("80",),
    ),
    Bug(
        "no fence.proxy.async", _LCA, "forward_kernel", every(r"fence\.proxy\.async\S*;", ""),
        arches=("90",), chosen=("90",),
    ),
    Bug(
        "no fence.proxy.async", _LCA, "backward_kernel", every(r"fence\.proxy\.async\S*;", ""),
        arches=("90",),
    ),
    Bug(
        "no wait for wgmma", _MLKA, "forward_kernel", every(_WAIT, ""), arches=("90",),
        chosen=("90",),
    ),
    Bug("no wait for wgmma", _MLKA, "backward_key_kernel", nth(_WAIT, 0, ""), arches=("90",)),
    Bug(
        "no wgmma.fence", _MLKA, "forward_kernel", every(r"wgmma\.fence\S*;", ""), arches=("90",),
        chosen=("90",),
    ),
    Bug(
        "descriptor a step of K too far", _LOOP, "forward_kernel",
        nth(_DESCRIPTOR, 0, lambda m: str(int(m[0]) + 2)), arches=("90",),
    ),
    Bug(
        "descriptor's stride halved", _LOOP, "forward_kernel",
        every(_DESCRIPTOR, lambda m: str(int(m[0]) - (32 << 32))), arches=("90",),
    ),
    Bug(
        "B not transposed", _MLKA, "forward_kernel",
        every(
            r"(wgmma\.mma_async[^;]*\{[^}]*\}, \{[^}]*\}, %rd\d+, \S+ 1, 1), 1;", r"\1, 0;"
        ),
        arches=("90",),
    ),
    Bug(
        "accumulator not added to", _LOOP, "forward_kernel",
        nth(
            r"(wgmma\.mma_async[^;]*), %p\d+, 1, 1, 0, 0;", 0, lambda m: f"{m[1]}, 0, 1, 1, 0, 0;"
        ),
        arches=("90",),
    ),
)  # fmt: skip


def bugs(arch: str) -> dict[str, Bug]:
    """Return the bugs of an architecture by their titles."""
    return {bug.title: bug for bug in _BUGS if arch in bug.arches}


def barriers(case: str, kernel: str, arch: str, dtype: str = "bf16") -> list[tuple[int, str]]:
    """Leave out each barrier of a kernel that a case reaches.

    Returns:
        The place of each among the kernel's barriers, and what the machine notices without it.
    """
    lines: list[int] = []

    def look(name: str, ptx: str) -> str:
        if name == kernel:
            lines[:] = [ptx.count("\n", 0, m.start()) + 1 for m in re.finditer(BARRIER, ptx)]
        return ptx

    result = run(CASES[case], arch, dtype, look)
    reached: set[int] = set()
    for record in result.log.runs:
        if record.name == kernel:
            reached |= {i for i, line in enumerate(lines) if line not in record.uncovered}
    found = []
    for i in sorted(reached):
        bug = Bug(f"barrier {i}", case, kernel, nth(BARRIER, i, ""), dtype=dtype)
        found.append((i, notice(bug, arch)))
    return found


# Where `barriers` leaves them out; the README says of three why nothing is to be noticed.
BARRIERS = (
    ("mlka-24x24-w11-d16-mixed", "forward_kernel"),
    ("mlka-9x13-w5-d16-chunks", "backward_key_kernel"),
    ("mlka-24x24-w11-d16-mixed-deterministic", "backward_query_kernel"),
    ("lca-9x13-w5-d16-chunks", "forward_kernel"),
    ("lca-9x13-w5-d16-chunks", "backward_kernel"),
)
