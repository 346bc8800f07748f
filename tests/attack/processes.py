"""Commands in processes forked from this one: all is imported, so that each takes little time."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlr_fast.cli import main

ESCAPED = 99  # exit code of a child that an exception left


class Child:
    """A command in a process of its own.

    Args:
        argv: Its words.
        prepare: Called in the process before, for limits.
    """

    def __init__(
        self, argv: Sequence[object], prepare: Callable[[], object] = lambda: None
    ) -> None:
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            code = ESCAPED
            try:
                for number in (1, 2):
                    os.dup2(self._told.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
                prepare()
                code = main([str(word) for word in argv])
            except BaseException as error:
                os.write(2, f"escaped: {type(error).__name__}: {error}".encode())
            finally:
                sys.stdout.flush()
                os._exit(code)

    def after(self, seconds: float, number: int) -> Child:
        """Send a signal after so many seconds."""
        time.sleep(seconds)
        os.kill(self.process, number)
        return self

    def wait(self) -> tuple[int, str]:
        """Return the exit code, negative for a signal, and what it printed."""
        _, status = os.waitpid(self.process, 0)
        self._told.seek(0)
        with self._told:
            return os.waitstatus_to_exitcode(status), self._told.read()


def fault_of(code: int, told: str, codes: Sequence[int] = (0,)) -> str | None:
    """Return what is wrong with the end of a command, in a line."""
    if "Traceback (most recent" in told or "escaped: " in told:
        start = max(0, told.find("Traceback (most recent") - 100)
        return f"traceback: {' '.join(told[start:].split())[:1000]}"
    if "Exception ignored" in told or "Fatal" in told:
        return f"error at the end: {' '.join(told.split())[-300:]}"
    if code not in codes:
        return f"code {code}: {' '.join(told.split())[-300:]}"
    return None


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if "partial" in p.name]


KILL = signal.SIGKILL
