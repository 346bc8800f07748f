"""Jobs for threads: order, bounds, errors, and that leaving waits."""

from __future__ import annotations

import threading

import pytest

from rlr_fast.data.threads import BackgroundWriter


def test_one_thread_does_jobs_in_order():
    done = []
    with BackgroundWriter(threads=1, jobs=3) as writer:
        for i in range(20):
            writer.submit(lambda i=i: done.append(i))
    assert done == list(range(20))


@pytest.mark.parametrize(
    ("jobs", "cost", "most"),
    [
        pytest.param(3, float("inf"), 3, id="jobs"),
        pytest.param(10, 5.0, 2, id="cost"),
        pytest.param(10, 1.0, 1, id="each-costs-too-much"),
    ],
)
def test_submit_waits_where_jobs_or_their_cost_are_too_many(jobs, cost, most):
    release = threading.Event()

    def job():
        release.wait(30)

    with BackgroundWriter(2, jobs, cost) as writer:
        for _ in range(most):
            writer.submit(job, 2.0)  # there is room
        one_more = threading.Thread(target=writer.submit, args=(job, 2.0))
        one_more.start()
        one_more.join(0.1)
        assert one_more.is_alive()
        release.set()
        one_more.join(30)
        assert not one_more.is_alive()


def test_an_error_reaches_the_next_call_that_meets_it():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWriter(threads=1, jobs=1) as writer:
        writer.submit(fail)
        writer.submit(lambda: None)
        pytest.fail("the second job was taken")


def test_an_error_of_the_last_job_is_met_on_leaving():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWriter(threads=1, jobs=9) as writer:
        writer.submit(fail)


def test_an_interruption_waits_for_what_was_handed_over_and_is_what_is_raised():
    done = []
    release = threading.Event()

    def fail():
        raise OSError("disk full")

    with pytest.raises(KeyboardInterrupt), BackgroundWriter(threads=1, jobs=9) as writer:
        writer.submit(lambda: done.append(release.wait(30)))
        writer.submit(lambda: done.append(True))
        writer.submit(fail)
        release.set()
        raise KeyboardInterrupt
    assert done == [True, True]
