"""The count of a kernel's machine code, on disassembled text and on kernels compiled for it."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="reading machine code needs Triton")

from benchmarks import sass
from rlr_fast.kernels import distance

# An outer loop that ends in an unconditional branch, an inner one, and the slow path of a shuffle
# behind the kernel's end, whose branch back is no loop; then the end's padding.
NESTED = """
        code for sm_90a
                Function : kernel
        /*0000*/              @!P0 EXIT ;                        /* 0x000000000000894d */
                                                                 /* 0x000fea0003800000 */
        /*0010*/                   LEA R8, P0, R15, R2, 0x8 ;    /* 0x000000020f087211 */
        /*0020*/                   LDG.E.64 R8, desc[UR4][R8.64] ;
        /*0030*/                   FADD R6, R19, R6 ;
        /*0040*/                   MUFU.EX2 R19, R8 ;
        /*0050*/                   BRA.DIV UR6, 0xf0 ;
        /*0060*/                   SHFL.BFLY PT, R9, R0, 0x10, 0x1f ;
        /*0070*/                   FSETP.GEU.AND P0, PT, R9, R16, PT ;
        /*0080*/                   NOP ;
        /*0090*/              @!P0 BRA 0x30 ;
        /*00a0*/                   REDG.E.ADD.F32x2.FTZ.RN.STRONG.GPU desc[UR4][R8.64], R6 ;
        /*00b0*/                   ISETP.NE.U32.AND P0, PT, R0, UR6, PT ;
        /*00c0*/              @!P0 EXIT ;
        /*00d0*/                   MUFU.RCP R1, R2 ;
        /*00e0*/                   BRA 0x10 ;
        /*00f0*/                   IMAD.MOV.U32 R9, RZ, RZ, R21 ;
        /*0100*/                   BRA 0x70 ;
        /*0110*/                   BRA 0x110;
        /*0120*/                   NOP;
"""

# A loop on sm_100 that waits twice for a barrier: once in place, once behind the kernel's end.
WAITING = """
        /*0000*/                   DEPBAR.LE SB0, 0x0 ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13], R0 ;
        /*0020*/              @!P0 BRA 0xa0 ;
        /*0030*/                   LDTM.x128 R4, tmem[UR10+0x10] ;
        /*0040*/                   MUFU.EX2 R19, R8 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11], R68 ;
        /*0060*/              @!P0 BRA 0x50 ;
        /*0070*/                   FADD2 R6, R6.F32x2.HI_LO, R8.F32x2.HI_LO ;
        /*0080*/                   BRA.U !UP1, 0x0 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13], R0 ;
        /*00b0*/              @!P0 BRA 0xa0 ;
        /*00c0*/                   BRA 0x30 ;
"""

SCRIPT = """
import json
import triton
import triton.language as tl
from benchmarks import sass

@triton.jit
def kernel(q, k, out, n, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + depth[None, :])
    total = tl.zeros((M,), tl.float32)
    for start in range(0, n, N):
        key = tl.load(k + (start + columns[:, None]) * D + depth[None, :])
        total += tl.sum(tl.exp2(tl.dot(query, key.T)), 1)
    tl.store(out + rows, total)

def build(arch):
    return sass.compile_kernel(
        kernel,
        {"q": "*bf16", "k": "*bf16", "out": "*fp32", "n": "i32"},
        {"M": 64, "N": 64, "D": 16},
        arch=arch, num_warps=4, num_stages=2, divisible=["q", "k", "out", "n"],
    )

report = {}
for arch in (80, 90, 100):
    compiled = build(arch)
    used = sass.resources(compiled)
    inner = [loop for loop in sass.loops(sass.instructions(compiled)) if loop.innermost]
    counts = max((sass.count(loop.instructions) for loop in inner), key=lambda c: c["ex2"])
    report[arch] = {
        "registers": used.registers, "stack": used.stack, "threads": used.threads,
        "local": used.stores_local + used.loads_local, "shared": used.shared,
        "programs": used.programs, "issue": counts.issue,
        "kinds": counts.kinds, "limit": sass.bound(counts, 32, arch=arch).limit,
    }
try:
    sass.resources(build("gfx942"))
except ValueError as error:
    report["amd"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(compiler):
    return compiler.values(SCRIPT)


def test_parse():
    code = sass.parse(NESTED)
    assert [i.address for i in code] == list(range(0, 0x130, 0x10))
    assert code[9] == sass.Instruction(0x90, "!P0", "BRA", ("0x30",), 0x30)
    assert code[2] == sass.Instruction(0x20, None, "LDG.E.64", ("R8", "desc[UR4][R8.64]"), None)


def test_loops_are_found_and_the_slow_path_is_none():
    found = [(loop.start, loop.end, loop.innermost) for loop in sass.loops(sass.parse(NESTED))]
    assert found == [(0x10, 0xE0, False), (0x30, 0x90, True)]


def test_waiting_is_no_loop():
    (loop,) = sass.loops(sass.parse(WAITING))
    assert (loop.start, loop.end, loop.innermost) == (0x0, 0x80, True)
    counts = sass.count(loop.instructions)
    assert (counts["ex2"], counts["packed"], counts["tensor_memory"]) == (1, 1, 1)


def test_count_of_a_loop():
    (inner,) = (loop for loop in sass.loops(sass.parse(NESTED)) if loop.innermost)
    counts = sass.count(inner.instructions)
    assert counts.issue == 6
    assert counts.kinds == {"fp32": 1, "ex2": 1, "shfl": 1, "alu": 1, "other": 2}
    assert counts["hgmma"] == 0


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("MUFU.RCP", "mufu"),
        ("HGMMA.64x128x16.F32.BF16", "hgmma"),
        ("HMMA.16816.F32.BF16", "mma"),
        ("UTCHMMA", "tcgen05"),
        ("F2FP.BF16.F32.PACK_AB", "pack"),
        ("F2F.F16.F32", "convert"),
        ("IMAD.WIDE.U32", "imad"),
        ("FMNMX3", "alu"),
        ("UIADD3.X", "uniform"),
        ("UTMALDG.2D", "tma"),
        ("UTMACMDFLUSH", "other"),
        ("LDG.E", "ldg32"),
        ("LDGSTS.E.BYPASS.128", "ldgsts128"),
        ("LDS.U8", "lds8"),
        ("LDSM.16.MT88.4", "ldsm"),
        ("LDL.LU.64", "ldl64"),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", "atom32"),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", "red128"),
        ("REDG.E.ADD.F16x8.RN.STRONG.GPU", "red128"),
    ],
)
def test_kind(opcode, kind):
    assert sass.Instruction(0, None, opcode, (), None).kind == kind


def test_bound():
    kinds = {"ex2": 32, "mufu": 1, "convert": 1, "fp32": 96, "packed": 8, "imad": 4, "alu": 40}
    counts = sass.Counts(320, kinds | {"pack": 16})
    bound = sass.bound(counts, 32)
    assert bound.clocks_by == {"issue": 10, "mufu": 8.5, "fp32": 3.75, "alu": 3.5}
    assert (bound.limit, bound.clocks) == ("issue", 10)
    assert sass.bound(counts, 32, arch=80).clocks_by["fp32"] == 7.25


def test_compiled_for_sm_90(report):
    seen = report["90"]
    # 64 x 64 scores by 128 threads.
    assert seen["kinds"]["ex2"] == 32
    assert seen["kinds"]["hgmma"] > 0
    assert seen["limit"] == "mufu"
    assert (seen["stack"], seen["local"], seen["threads"]) == (0, 0, 128)
    assert 32 <= seen["registers"] <= 168
    assert seen["shared"] >= 2 * 64 * 16 * 2
    assert 3 <= seen["programs"] <= 16


def test_compiled_for_others(report):
    for arch, kind in (("80", "mma"), ("100", "tcgen05")):
        assert report[arch]["kinds"]["ex2"] == 32
        assert report[arch]["kinds"][kind] > 0
        assert report[arch]["issue"] == sum(report[arch]["kinds"].values())
    assert "CUDA only" in report["amd"]


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(sass.triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="only without TRITON_INTERPRET"):
        sass.compile_kernel(distance.forward_kernel, {}, {}, arch=90, num_warps=4, num_stages=1)


def test_missing_tool_is_named(monkeypatch):
    compiled = type("Compiled", (), {"asm": {"cubin": b""}})()

    class Absent:
        @property
        def cuobjdump(self):
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(sass.triton.knobs, "nvidia", Absent())
    with pytest.raises(RuntimeError, match="Cannot find cuobjdump; Triton's wheel"):
        sass.instructions(compiled)
