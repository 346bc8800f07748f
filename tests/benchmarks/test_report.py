"""The benchmark report: tables and plots from records, and nothing that no record says."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import report

ENVIRONMENT = {
    "device_name": "A processor",
    "device": "cpu",
    "threads": 2,
    "python": "3.11",
    "packages": {"torch": "2.15"},
}


def content(*results: dict) -> dict:
    return {
        "environment": ENVIRONMENT,
        "made": "2026-01-01",
        "commit": "abc",
        "command": "pytest --benchmark",
        "results": list(results),
    }


def operator(**changes: object) -> dict:
    result = {
        "suite": "operators", "operator": "lca", "shape": "8x8-d16-w3", "tokens": 64, "width": 16,
        "window": 3, "batch": 1, "heads": 8, "dtype": "fp32", "direction": "forward",
        "rival": "tiled", "label": "ours", "least_bytes": 10, "outcome": "ok", "errors": {"o": 0},
        "median_s": 1e-3, "peak_bytes": 2**20,
    }  # fmt: skip
    return result | changes


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_slope_is_the_exponent_of_the_largest_sizes(power):
    sizes = [2.0, 64.0, 128.0, 256.0]
    values = [50.0, *(3 * s**power for s in sizes[1:])]
    assert report.slope(sizes, values) == pytest.approx(power)
    assert math.isnan(report.slope([1], [1]))


def test_operators_show_time_memory_and_what_did_not_run(tmp_path):
    text = report.figures(
        {
            "a.json": content(
                operator(),
                operator(rival="dense", median_s=5e-3),
                operator(rival="authors", outcome="OOM", reason="too large"),
                operator(rival="flex-64", outcome="unavailable", reason="no GPU", label="flex"),
                operator(rival="sdpa", outcome="wrong", reason="differs"),
            )
        },
        tmp_path,
    )
    assert "A processor" in text and "`a.json`" in text and "`pytest --benchmark`" in text
    assert "| tiled | 1 ms | 1.0 MiB |" in text
    assert "| dense | 5 ms |" in text
    assert "| authors | OOM |" in text
    assert "| sdpa | WRONG |" in text
    assert "`flex-64`: no GPU" in text
    assert (tmp_path / "a-baselines.png").stat().st_size > 0


def test_the_host_has_a_column_where_it_was_measured(tmp_path):
    text = report.figures(
        {"a.json": content(operator(host_s=2e-4), operator(rival="dense", host_s=1e-5))}, tmp_path
    )
    assert "| baseline | forward | host | memory |" in text
    assert "| tiled | 1 ms | 200 µs | 1.0 MiB |" in text


def test_kernels_of_one_name_are_added_up(tmp_path):
    times = {"key_kernel": 1e-3, "void at::fill<a>(int)": 1e-6, "void at::fill<b>(int)": 2e-6}
    found = operator(suite="kernels", deterministic=True, kernels_s=times)
    text = report.figures({"a.json": content(found)}, tmp_path)
    assert "| kernel | forward, deterministic |" in text
    assert "| key_kernel | 1 ms |" in text and "| at::fill | 3 µs |" in text


def test_tiles_are_ranked_by_the_whole_call(tmp_path):
    def candidate(stages: int, own: bool, call_s: float) -> dict:
        tiles = {"queries": 64, "stages": stages, "registers": 0}
        return operator(suite="tiles", kernel="key", tiles=tiles, own=own, call_s=call_s)

    text = report.figures(
        {"a.json": content(candidate(1, True, 3e-3), candidate(2, False, 2e-3))}, tmp_path
    )
    fast, own = (
        "| queries=64 stages=2 | 1 ms | 2 ms |  |",
        "| queries=64 stages=1 | 1 ms | 3 ms | yes |",
    )
    assert text.index(fast) < text.index(own)


@pytest.mark.parametrize("axis", ["tokens", "batch"])
def test_scaling_prints_the_exponents_that_it_draws(axis, tmp_path):
    results = [
        operator(suite="scaling", axis=axis, median_s=1e-9 * n**2, peak_bytes=n) | {axis: n}
        for n in (256, 1024, 4096)
    ]
    text = report.figures({"b.json": content(*results)}, tmp_path)
    assert "| lca forward tiled | 2.00 | 1.00 |" in text
    assert (tmp_path / f"b-scaling-{axis}.png").stat().st_size > 0


def test_everything_between_the_markers_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before {report.BEGIN} old {report.END} after\n")
    record = {"format": 1, **content(operator())}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before ") and text.endswith(" after\n")
    assert "A processor" in text and "old" not in text
