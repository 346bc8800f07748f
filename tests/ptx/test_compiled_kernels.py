"""The kernels' compiled code, run for sm_80 and sm_90 by the machine, and bugs planted in it.

What is run is the choice of `cases` and `planted`; `python -m tests.ptx` runs everything.
"""

from __future__ import annotations

import json

import pytest

from tests.ptx.cases import ARCHES, CHOICE, DTYPES

triton = pytest.importorskip("triton", reason="compiling the kernels needs Triton")

from tests.ptx.driver import machine_as_device  # noqa: E402

# Before Triton 3.8 the operand of a product is packed behind the fence that orders registers before
# it. The compiler of NVIDIA keeps the order: on an H100 all results with Triton 3.6 are within
# their budgets.
_KNOWN = (
    "register written after wgmma.fence"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    else None
)

EXAMPLES = ("softmax", "columns", "tuples", "matmul-100x72x80-ta", "matmul-64x32x128-tb")
CASES = [
    pytest.param(arch, dtype, name, id=f"sm_{arch}-{dtype}-{name}")
    for arch, by_dtype in CHOICE.items()
    for dtype, names in by_dtype.items()
    for name in names
]


@pytest.fixture(scope="module")
def rows(compiler, tmp_path_factory):
    """Return all rows, by architecture, dtype and name."""
    out, found = tmp_path_factory.mktemp("ptx") / "rows.json", {}
    for arguments in (("cases", "planted", "--choice"), ("examples", "--case", *EXAMPLES)):
        done = compiler.main("tests.ptx.__main__", *arguments, "--out", out)
        # 1: a row is bad, which is a test's to say.
        assert done.returncode in (0, 1) and out.exists(), done.stderr
        for row in json.loads(out.read_text()):
            found[row["arch"], row["dtype"], row["name"]] = row
        out.unlink()
    return found


@pytest.mark.parametrize(("arch", "dtype", "name"), CASES)
def test_a_kernel_is_within_its_budget_and_leaves_memory_alone(rows, arch, dtype, name):
    row = rows[arch, dtype, name]
    assert [f for f in row["findings"] if _KNOWN is None or _KNOWN not in f] == []
    assert row["verdicts"]
    for result, verdict in row["verdicts"].items():
        assert verdict["ok"], f"{result}: {verdict['error']:.3g} of {verdict['allowed']:.3g}"


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_run(rows, arch):
    run = {
        launch["kernel"]
        for row in rows.values()
        if row["arch"] == arch
        for launch in row.get("launches", ())
    }
    operators = {f"{name}.forward.forward_kernel" for name in ("mlka", "lca")}
    operators |= {f"lca.backward.{name}_kernel" for name in ("backward", "gather")}
    operators |= {
        f"mlka.backward.{name}_kernel" for name in ("backward_key", "backward_query", "delta")
    }
    others = {"reference.prepare_kernel", "distance.forward_kernel", "distance.backward_kernel"}
    assert run == operators | others


def test_planted_bugs_are_noticed(rows):
    planted = {key: row for key, row in rows.items() if "noticed" in row}
    assert [key for key, row in planted.items() if not row["noticed"]] == []
    assert len(planted) >= 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_machine_is_right_about_small_kernels(rows, name):
    found = {key[:2]: row for key, row in rows.items() if key[2] == name}
    assert len(found) == len(ARCHES) * len(DTYPES)
    assert [f"sm_{arch} {dtype}" for (arch, dtype), row in found.items() if not row["ok"]] == []


def test_the_interpreter_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), machine_as_device("80"):
        pass
