"""The work of a verb, and what its user reads where something stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rlr_fast.cli.memory_watch import watched_memory
from rlr_fast.cli.messages import follow_peer, refuse, tells, wants_traceback
from rlr_fast.cli.verbs import Verb

# What PyTorch says where the system has no memory left; on a GPU it has an error of its own.
_ALLOCATOR = "DefaultCPUAllocator"

_AGAIN = 0.05  # seconds after which a signal that was lost in a destructor is sent again

# Where the errors of torch.compile are defined; not imported, for that takes seconds.
_COMPILER = ("torch._dynamo.", "torch._inductor.")


def run(verb: Verb, job: Callable[[], int]) -> int:
    """Do the work of a verb; return the exit code, see `rlr_fast.cli.main`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not verb.distributed:
        message = f"rlr-fast {verb.name} works in one process; start it without torchrun"
        return refuse(message) if tells() else follow_peer()
    try:
        with _terminable(), watched_memory(verb.less_memory):
            return job()
    except BrokenPipeError:  # an OSError, but nobody is left to read a message
        return 1
    except KeyboardInterrupt as error:
        how, number = ("interrupted", signal.SIGINT)
        if isinstance(error, _Terminated):
            how, number = ("terminated", signal.SIGTERM)
        if tells():
            print(f"\nrlr-fast: {how}{verb.interrupted}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        code = _told(verb, error)
        if code is None:
            raise
        return code


class _Terminated(KeyboardInterrupt):
    """The system asks the process to end, as a batch queue does: in the same way as a user."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise `_Terminated` in the block where the process gets SIGTERM, so that it loses nothing.

    Neither that nor an interruption is lost where Python cannot raise it.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    # The main thread alone gets signals. torchrun ends processes that wait for one that is lost,
    # and these would see an exception only when it answers.
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    timers: list[threading.Timer] = []

    def send_again(ignored: sys.UnraisableHookArgs) -> None:
        # Python raised it where nothing can be raised, in a destructor, and would go on without it.
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            hook(ignored)
            return
        is_term = isinstance(ignored.exc_value, _Terminated)
        number = signal.SIGTERM if is_term else signal.SIGINT
        timers.append(threading.Timer(_AGAIN, os.kill, (os.getpid(), number)))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def _told(verb: Verb, error: Exception) -> int | None:
    """Tell the user's mistakes in a line, and return the exit code; None is a mistake of ours."""
    # Imported here, for a verb may do without what defines the errors of others.
    import torch

    from rlr_fast.export.formats import ExportError
    from rlr_fast.functional import BackendError
    from rlr_fast.models.backbone_weights import BackboneWeightsError
    from rlr_fast.models.checkpoint import CheckpointError
    from rlr_fast.training.distributed import PeerError
    from rlr_fast.training.feature_cache import CacheError
    from rlr_fast.training.run_dir import TrainingError

    if isinstance(error, PeerError):
        follow_peer()
        return 2 if error.told else refuse(str(error))
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return refuse(f"out of GPU memory ({first_line}); {verb.less_memory}")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATOR in first_line
    ):
        return refuse(
            f"out of memory ({first_line or 'the system has none left'}); {verb.less_memory}"
        )
    if wants_traceback():
        return None
    models = (BackboneWeightsError, BackendError, CheckpointError, CacheError, TrainingError)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return refuse(f"{error.filename!r}: {error.strerror}")
    if isinstance(error, (ValueError, OSError, ExportError, *models)):
        return refuse(str(error))
    if isinstance(error, RuntimeError) and type(error).__module__.startswith(_COMPILER):
        return refuse(
            f"--compile cannot compile here ({first_line}); the same command without it does the "
            "same, to rounding"
        )
    return None
