"""``pytest --benchmark``: runs the benchmarks alone, checks each before it is timed, records it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.baselines import UnavailableError
from benchmarks.check import WrongResultError
from benchmarks.record import Recorder, bench_device, record_path

_REFINEMENTS = ("--benchmark-headline", "--benchmark-large", "--benchmark-record")
_RECORDER = pytest.StashKey[Recorder]()
# A CPU call longer than this is timed a fixed number of times, without calibration.
_LONG_SECONDS = 0.2
_BUDGET_SECONDS = 2.0
_LONG_ROUNDS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--benchmark`` and what refines it."""
    group = parser.getgroup("rlr_fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="run benchmarks, and nothing else")
    group.addoption(
        "--benchmark-headline",
        action="store_true",
        help="the few figures that matter most: minutes, on a GPU and on two cores of a CPU",
    )
    group.addoption(
        "--benchmark-large", action="store_true", help="also problems that take a CPU minutes"
    )
    group.addoption(
        "--benchmark-record",
        metavar="NAME",
        type=record_path,
        help="write results to benchmarks/results/NAME.json, or to a path that ends in .json",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the benchmarks alone, and show a line for each unless told to be quiet."""
    given = [name for name in _REFINEMENTS if config.getoption(name)]
    if not config.getoption("--benchmark"):
        if given:
            raise pytest.UsageError(f"{given[0]} is of --benchmark, which is not given")
        return
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark measures one call at a time: not with -n")
    if config.option.verbose == 0:
        config.option.verbose = 1
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(Path(__file__).parent)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a benchmark of every case that a file names for this device."""
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = metafunc.module.cases(option("--benchmark-headline"), option("--benchmark-large"))
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport,
) -> tuple[str, str, str] | None:
    """Show a benchmark's median in its line."""
    if isinstance(report, pytest.CollectReport) or report.when != "call" or not report.passed:
        return None
    median = dict(report.user_properties).get("median")
    return None if median is None else ("passed", ".", f"{median}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the benchmarks alone, or all but them."""
    benchmark, headline = map(config.getoption, ("--benchmark", "--benchmark-headline"))
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        wanted = _is_benchmark(item) == benchmark and not (headline and _is_left_out(item))
        (kept if wanted else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _is_left_out(item: pytest.Item) -> bool:
    """Return whether a headline on a CPU leaves a benchmark out of those of its file."""
    chosen = getattr(getattr(item, "module", None), "CPU_HEADLINE", None)
    return chosen is not None and bench_device().type == "cpu" and item.name not in chosen


def _is_benchmark(item: pytest.Item) -> bool:
    return "benchmark" in getattr(item, "fixturenames", ())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Finish the record."""
    recorder = session.config.stash.get(_RECORDER, None)
    if recorder is not None:
        recorder.close()


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """The record of this run; in memory alone without ``--benchmark-record``."""
    made = Recorder(pytestconfig.getoption("--benchmark-record"))
    pytestconfig.stash[_RECORDER] = made
    return made


@pytest.fixture
def measure(
    benchmark: Any, recorder: Recorder, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """Check, then time one call, and record what came of it.

    ``measure(info, group, prepare, make, graph=False, context=nullcontext)``: ``prepare()`` checks
    and returns the errors; ``make()`` returns the call. What a problem is too large for, what
    cannot run here, and a wrong result are recorded in place of figures.
    """

    def run(
        info: dict[str, object],
        group: str,
        prepare: Callable[[], dict[str, float]],
        make: Callable[[], Callable[[], object]],
        graph: bool = False,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(info)
        try:
            with _memory_errors():
                errors = prepare()
                with context():
                    figures = _time(benchmark, make, graph)
        except UnavailableError as error:
            recorder.add({**info, "outcome": "unavailable", "reason": str(error)})
            pytest.skip(str(error))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0][:200]
            recorder.add({**info, "outcome": "OOM", "reason": reason})
            error.__traceback__ = None  # its frames hold the tensors that took the memory
            _free()
            pytest.skip(f"OOM: {reason}")
        except WrongResultError as error:
            recorder.add({**info, "outcome": "wrong", "reason": str(error)})
            raise
        benchmark.extra_info.update(figures, errors=errors)
        if "median_s" in figures:
            record_property("median", timing.in_words(float(str(figures["median_s"]))))
        recorder.add({**info, "outcome": "ok", "errors": errors, **figures})

    return run


def _time(
    benchmark: Any, make: Callable[[], Callable[[], object]], graph: bool
) -> dict[str, object]:
    if benchmark.disabled:
        make()()
        return {}
    if bench_device().type == "cuda":
        result = timing.time_on_gpu(make, graph)
        timing.CLOCK.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds), iterations=1)
        return result.info()
    call = make()
    once = timing.seconds_of(call)
    if once > _LONG_SECONDS:
        rounds = max(1, min(_LONG_ROUNDS, int(_BUDGET_SECONDS / once)))
        # A long call is watched while it is timed: a look each 5 ms costs it nothing that shows.
        peak = timing.cpu_peak(
            lambda: benchmark.pedantic(call, rounds=rounds, iterations=1), seconds=0.005
        )
    else:
        peak = timing.cpu_peak(call)
        benchmark(call)
    return timing.Timing(list(benchmark.stats.stats.data), peak).info()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Make the CPU allocator's complaint the error that a GPU's is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
