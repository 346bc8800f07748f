"""Where a call's time goes: each kernel on the GPU, by PyTorch's profiler, and the host.

``python -m benchmarks.kernels --record NAME`` for both operators at the headline shapes, by default
and deterministic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import record, timing
from benchmarks.arguments import positive
from benchmarks.shapes import HEADLINE, OPERATORS, Problem, make_inputs

_REPEATS = 10


def kernel_seconds(
    call: Callable[[], object], flush: Callable[[], object], repeats: int = _REPEATS
) -> dict[str, float]:
    """Return the device time of each kernel of a call, by name, largest first.

    Args:
        call: What is run; it must have run before.
        flush: Run before each repetition; its own kernels are left out.
        repeats: Of them the median is taken; a kernel launched several times counts as often.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush()
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and "FillFunctor<unsigned char>" not in event.name:
            times.setdefault(event.name, []).append(event.device_time / 1e6)
    whole = {name: statistics.median(t) * len(t) / repeats for name, t in times.items()}
    return dict(sorted(whole.items(), key=lambda item: -item[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--batch", type=positive, default=64)
    record.add_record_option(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU to measure", file=sys.stderr)
        return 1
    recorder = record.Recorder(options.record)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for shape in HEADLINE:
        for operator in reversed(OPERATORS):
            problem = Problem(operator, shape, options.batch, torch.bfloat16)
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                for direction, call in _calls(problem).items():
                    flush = timing.Flush(call)
                    times = kernel_seconds(call, flush)
                    recorder.add(
                        {"suite": "kernels", "outcome": "ok", **problem.info(),
                         "direction": direction, "deterministic": deterministic,
                         "host_s": flush.host_seconds, "kernels_s": times}
                    )  # fmt: skip
                    total = timing.in_words(sum(times.values()))
                    mode = ", deterministic" if deterministic else ""
                    print(f"{problem.name} {direction}{mode}: {total}, host "
                          f"{timing.in_words(flush.host_seconds)}", flush=True)  # fmt: skip
    torch.use_deterministic_algorithms(False)
    recorder.close()
    return 0


def _calls(problem: Problem) -> dict[str, Callable[[], object]]:
    inputs = make_inputs(problem, torch.device("cuda"))
    leaves = inputs[:3]

    def forward() -> torch.Tensor:
        operator = OPERATORS[problem.operator]
        return operator(*leaves, problem.grid, problem.window, backend="triton")

    output = forward()

    def backward() -> object:
        return torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=True)

    backward()
    return {"forward": forward, "backward": backward}


if __name__ == "__main__":
    sys.exit(main())
