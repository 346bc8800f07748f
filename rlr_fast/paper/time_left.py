"""How far a series of runs is: a progress bar with the time left, from measured times alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

from tqdm import tqdm


class TimeLeft:
    """Measures a series of runs, each of features, training and the rest (evaluation, mostly).

    Args:
        kinds: The kind of each run, in order; runs of a kind take equal time an image.
        images: Training images of a run, over all its epochs.
        now: The clock.
    """

    def __init__(
        self, kinds: Sequence[str], images: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._kinds, self._images, self._now = list(kinds), images, now
        self._seconds = {"features": 0.0, "train": 0.0, "rest": 0.0}
        self._speeds: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self._rests: list[float] = []
        self._kind = ""
        self._done, self._rest, self._last = 0, 0.0, now()
        self._training = False

    def begin(self) -> None:
        """Begin the next run."""
        self._kind = self._kinds.pop(0)
        self._done, self._rest, self._last, self._training = 0, 0.0, self._now(), False

    def did(self, what: str, images: int) -> None:
        """Count what is done: ``features``, ``train`` or ``eval``, images since the last call.

        A run's first ``train`` are the images of the epochs that an earlier call has trained.
        """
        seconds = self._lap()
        if what == "train":
            self._done += images
            if self._training:
                self._seconds["train"] += seconds
                count, before = self._speeds[self._kind]
                self._speeds[self._kind] = count + images, before + seconds
                return
            self._training = True
        if what == "features":
            self._seconds["features"] += seconds
        else:
            self._count_rest(seconds)

    def end(self, finished: bool) -> None:
        """End the run; one that failed says nothing of those to come."""
        self._count_rest(self._lap())
        if finished:
            self._rests.append(self._rest)
        self._done, self._rest = self._images, 0.0

    def left(self) -> tuple[float, bool] | None:
        """Return the seconds left and whether that is all; None where no step was measured.

        It is not all before a run has ended: what follows training is not known until then. Nor
        are features that will be computed for other levels than those seen.
        """
        measured = [speed for speed in self._speeds.values() if speed[0]]
        if not measured:
            return None
        mean = sum(s for _, s in measured) / sum(count for count, _ in measured)

        def an_image(kind: str) -> float:
            count, seconds = self._speeds.get(kind, (0, 0.0))
            return seconds / count if count else mean

        left = max(0, self._images - self._done) * an_image(self._kind)
        left += sum(self._images * an_image(kind) for kind in self._kinds)
        if not self._rests:
            return left, False
        rest = sum(self._rests) / len(self._rests)
        running = max(0.0, rest - self._rest) if self._done < self._images or self._rest else 0.0
        return left + running + rest * len(self._kinds), True

    def seconds(self) -> dict[str, float]:
        """Return where the time went: ``features``, ``train``, ``rest``."""
        return dict(self._seconds)

    def _lap(self) -> float:
        now = self._now()
        seconds, self._last = now - self._last, now
        return seconds

    def _count_rest(self, seconds: float) -> None:
        self._rest += seconds
        self._seconds["rest"] += seconds


class RunsBar:
    """A progress bar of a series of runs on standard error.

    Args:
        what: What the runs make.
        kinds: The kind of each run, in order.
        train: Training images of a run, over all its epochs.
        test: Test images of a run.
        quiet: Show nothing.
    """

    def __init__(self, what: str, kinds: Sequence[str], train: int, test: int, quiet: bool) -> None:
        self.clock = TimeLeft(kinds, train)
        self._what, self._a_run = what, train + test
        self._runs, self._begun = len(kinds), 0
        self._phase = ""
        self._bar = tqdm(
            total=len(kinds) * self._a_run,
            disable=quiet,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
        )

    def begin(self, name: str) -> None:
        """Begin the next run, called ``name``."""
        self.clock.begin()
        self._begun += 1
        self._name = name
        self._show("")

    def progress(self, what: str, images: int) -> None:
        """Count images done, see `TimeLeft.did`."""
        self.clock.did(what, images)
        if what != self._phase:
            self._show(what)
        self._bar.set_postfix_str(f"left: {_in_words(self.clock.left())}", refresh=False)
        self._bar.update(0 if what == "features" else images)

    def end(self, finished: bool) -> None:
        """End the run."""
        self.clock.end(finished)
        self._bar.update(self._begun * self._a_run - self._bar.n)

    def tell(self, tell: Callable[[str], object], line: str) -> None:
        """Hand a line to ``tell``, with the bar out of its way."""
        with tqdm.external_write_mode():
            tell(line)

    def _show(self, phase: str) -> None:
        self._phase = phase
        self._bar.set_description_str(
            f"{self._what}, run {self._begun} of {self._runs} ({self._name}) {phase}".rstrip()
        )

    def __enter__(self) -> RunsBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()


def _in_words(left: tuple[float, bool] | None) -> str:
    if left is None:
        return "not known yet"
    seconds, all_of_it = left
    text: str = tqdm.format_interval(seconds)
    return text if all_of_it else f"{text} and evaluation"
