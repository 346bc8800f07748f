"""Progress bars that follow a count told from elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, quiet: bool) -> Iterator[tqdm]:
    """Show a bar of images on standard error while the block runs; nothing if ``quiet``."""
    with tqdm(total=total, desc=what, unit="img", disable=quiet, leave=False) as bar:
        yield bar


def follow(bar: tqdm) -> Callable[[int, int], None]:
    """Return a function (done, total) that sets the bar to what is done."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show
