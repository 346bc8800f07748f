"""What the command tells where it stops: one line, by one of the processes of a machine."""

from __future__ import annotations

import os
import sys
import time

# torchrun ends all processes with the first that ends: the one that says why goes first.
_AFTER_PEER = 1.0


def tells() -> bool:
    """Return whether this process tells what all on its machine meet: the first of torchrun's."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def refuse(message: str) -> int:
    """Tell what stopped the command, and return its exit code."""
    print(f"rlr-fast: error: {message}", file=sys.stderr)
    return 2


def follow_peer() -> int:
    """Let the process that tells why end first, and return the exit code."""
    time.sleep(_AFTER_PEER)
    return 2


def wants_traceback() -> bool:
    """Return whether the user asked for tracebacks in place of lines."""
    return bool(os.environ.get("RLR_FAST_TRACEBACK"))
