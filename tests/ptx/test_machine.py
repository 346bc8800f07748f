"""The machine notices hazards in a few lines of PTX, and none in the same lines done right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.findings import Findings, Unsupported
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.machine import Machine
from tests.ptx.parse import parse

THREADS, PROGRAMS = 64, 2
MODULE = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 16 kernel_param_0
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r3;
{body}
	ret;
}}
"""
# A thread's word, that of its neighbour in a warp, and that of its fellow in the other warp.
OWN = "st.shared.b32 [ %r5 + 0 ], %r1;"
NEIGHBOUR = "xor.b32 %r6, %r5, 4; ld.shared.b32 %r7, [ %r6 + 0 ];"
FELLOW = "xor.b32 %r6, %r5, 128; ld.shared.b32 %r7, [ %r6 + 0 ];"
BARRIER, WARP_BARRIER = "bar.sync 0;", "bar.warp.sync -1;"
# A word of global memory for each thread of each program.
PLACE = (
    "shl.b32 %r6, %r2, 6; add.s32 %r6, %r6, %r1; mul.wide.s32 %rd2, %r6, 4; "
    "add.s64 %rd3, %rd1, %rd2;"
)
COPY = "cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4; cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"


def run(body: str, words: int = THREADS * PROGRAMS, written: bool = True) -> set[str]:
    """Run two programs of two warps, and return the kinds of findings."""
    findings = Findings()
    data = np.arange(words, dtype=np.uint32).view(np.uint8)
    mask = None if written else np.zeros(data.size, bool)
    memory = GlobalMemory({0: data}, {0: mask}, findings)
    address = memory.allow(0, 0, (words,), (1,), 4)
    program = parse(MODULE.format(body="\t" + body.replace("; ", ";\n\t")))
    parameters = {"kernel_param_0": address}
    Machine(program, memory, 4 * THREADS, parameters, findings).run(PROGRAMS, PROGRAMS)
    return {f.kind for f in findings.values()}


HAZARDS = {
    "read after another warp's write": (
        f"{OWN} {FELLOW}", f"{OWN} {BARRIER} {FELLOW}", "shared race: read after write",
    ),
    "write after another warp's read": (
        f"{OWN} {BARRIER} {FELLOW} {OWN}", f"{OWN} {BARRIER} {FELLOW} {BARRIER} {OWN}",
        "shared race: write after read",
    ),
    "read after a write in the warp": (
        f"{OWN} {NEIGHBOUR}", f"{OWN} {WARP_BARRIER} {NEIGHBOUR}",
        "within a warp: read after write",
    ),
    "write after a read in the warp": (
        f"{OWN} {WARP_BARRIER} {NEIGHBOUR} {OWN}",
        f"{OWN} {WARP_BARRIER} {NEIGHBOUR} {WARP_BARRIER} {OWN}",
        "within a warp: write after read",
    ),
    "warps write one word": (
        "and.b32 %r6, %r5, 1151; st.shared.b32 [ %r6 + 0 ], %r1;",
        "and.b32 %r6, %r5, 1279; st.shared.b32 [ %r6 + 0 ], %r1;",
        "one store, two values at one shared address",
    ),
    "lanes of a warp write one word": (
        "and.b32 %r6, %r5, -8; st.shared.b32 [ %r6 + 0 ], %r1;", OWN,
        "within a warp: one store, two values at one address",
    ),
    "read of what nobody wrote": (
        FELLOW, f"{OWN} {BARRIER} {FELLOW}", "read of unwritten shared memory",
    ),
    "shared memory out of bounds": (
        "st.shared.b32 [ %r5 + 4 ], %r1;", OWN, "shared access out of bounds",
    ),
    "copy read before its wait": (
        f"{PLACE} {COPY} ld.shared.b32 %r7, [ %r5 + 0 ]; {WAIT}",
        f"{PLACE} {COPY} {WAIT} ld.shared.b32 %r7, [ %r5 + 0 ];",
        "shared memory read before its cp.async is waited for",
    ),
    "copy waited for by others alone": (
        f"{PLACE} {COPY} {WAIT} {FELLOW}", f"{PLACE} {COPY} {WAIT} {BARRIER} {FELLOW}",
        "shared race: read after write",
    ),
    "copy never waited for": (
        f"{PLACE} {COPY}", f"{PLACE} {COPY} {WAIT}", "cp.async never waited for",
    ),
    "global memory out of bounds": (
        f"{PLACE} st.global.b32 [ %rd3 + 4 ], %r1;", f"{PLACE} st.global.b32 [ %rd3 + 0 ], %r1;",
        "global access out of bounds",
    ),
    "programs write one word": (
        "st.global.b32 [ %rd1 + 0 ], %r2;", f"{PLACE} st.global.b32 [ %rd3 + 0 ], %r2;",
        "global memory written by two programs",
    ),
    "an addition and a read": (
        f"{PLACE} ld.global.b32 %r7, [ %rd3 + 0 ]; "
        "atom.global.gpu.relaxed.add.f32 %r8, [ %rd3 + 0 ], %r7;",
        f"{PLACE} atom.global.gpu.relaxed.add.f32 %r8, [ %rd3 + 0 ], %r1;",
        "global memory both added to and otherwise accessed",
    ),
    "an addition without a result and a read": (
        f"{PLACE} ld.global.b32 %r7, [ %rd3 + 0 ]; red.global.add.f32 [ %rd3 + 0 ], %r7;",
        f"{PLACE} red.global.add.f32 [ %rd3 + 0 ], %r1;",
        "global memory both added to and otherwise accessed",
    ),
    "register read before it is written": (
        "add.s32 %r6, %r7, 1;", "mov.b32 %r7, 1; add.s32 %r6, %r7, 1;", "unwritten register",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_noticed(name):
    wrong, right, kind = HAZARDS[name]
    assert kind in run(wrong)
    assert run(right) == set()


def test_lanes_that_write_the_same_to_one_word_are_no_failure():
    (kind,) = run("st.shared.b32 [ %r4 + 0 ], %r2;")
    assert kind.startswith("benign")


def test_a_read_of_what_torch_empty_left_is_noticed():
    body = f"{PLACE} ld.global.b32 %r7, [ %rd3 + 0 ];"
    assert run(body, written=False) == {"read of unwritten global memory"}
    assert run(body) == set()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("mul24.lo.s32 %r6, %r1, 3;", "mul24.lo.s32"),
        ("add.sat.s32 %r6, %r1, 3;", "add.sat.s32"),
        ("ld.volatile.shared.b32 %r6, [ %r5 + 0 ];", "ld.volatile.shared.b32"),
        ("red.global.max.s32 [ %rd1 + 0 ], %r1;", "red.global.max.s32"),
        ("mov.u32 %r6, %smid;", "%smid"),
        ("bar.sync 1;", "bar.sync 1"),
        ("setp.lt.u32 %p1, %r1, 32; bar.sync 0; @%p1 bra $L; $L: ;", "threads of a program part"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", "bar.sync"),
    ],
    ids=["name", "modifier", "volatile", "reduction", "operand", "barrier", "parting", "guard"],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(body, named):
    with pytest.raises(Unsupported, match=r"line|operand") as refusal:
        run(body)
    assert named in str(refusal.value)


def test_programs_that_branch_otherwise_are_both_right():
    """Each adds another number to its words."""
    body = (
        f"{PLACE} setp.eq.b32 %p1, %r2, 0; mov.b32 %r7, 5; @%p1 bra $ONE; mov.b32 %r7, 9; "
        "$ONE: ; add.s32 %r8, %r7, %r1; st.global.b32 [ %rd3 + 0 ], %r8;"
    )
    findings = Findings()
    data = np.zeros(4 * THREADS * PROGRAMS, np.uint8)
    memory = GlobalMemory({0: data}, {0: None}, findings)
    address = memory.allow(0, 0, (THREADS * PROGRAMS,), (1,), 4)
    program = parse(MODULE.format(body="\t" + body.replace("; ", ";\n\t")))
    machine = Machine(program, memory, 4 * THREADS, {"kernel_param_0": address}, findings)
    machine.run(PROGRAMS, PROGRAMS)
    found = memory.bytes_of(0).view(np.uint32).reshape(PROGRAMS, THREADS)
    np.testing.assert_array_equal(found, np.arange(THREADS) + np.array([[5], [9]]))
    assert not findings
