"""The work of a verb, and what its user reads where something stops it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from rlr_fast.cli.messages import follow_peer, refuse, tells, wants_traceback
from rlr_fast.cli.verbs import Verb
from rlr_fast.functional import BackendError
from rlr_fast.models.backbone import BackboneWeightsError
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.training.distributed import PeerError, processes_wanted
from rlr_fast.training.feature_cache import CacheError
from rlr_fast.training.run_dir import TrainingError

_USER_ERRORS = (
    ValueError,
    BackboneWeightsError,
    BackendError,
    CheckpointError,
    CacheError,
    TrainingError,
    OSError,
)
# Where the errors of torch.compile are defined; not imported, for that takes seconds.
_COMPILER = ("torch._dynamo.", "torch._inductor.")


def run(verb: Verb, job: Callable[[], int]) -> int:
    """Do the work of a verb; return the exit code, see `rlr_fast.cli.main`."""
    if processes_wanted() > 1 and not verb.distributed:
        message = f"rlr-fast {verb.name} works in one process; start it without torchrun"
        return refuse(message) if tells() else follow_peer()
    try:
        return job()
    except BrokenPipeError:  # an OSError, but nobody is left to read a message
        return 1
    except PeerError as error:
        follow_peer()
        return 2 if error.told else refuse(str(error))
    except _USER_ERRORS as error:
        if wants_traceback():
            raise
        return refuse(str(error))
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        return refuse(f"out of GPU memory ({first_line}); {verb.less_memory}")
    except RuntimeError as error:
        if not type(error).__module__.startswith(_COMPILER) or wants_traceback():
            raise
        first_line = str(error).splitlines()[0]
        return refuse(
            f"--compile cannot compile here ({first_line}); the same command without it does the "
            "same, to rounding"
        )
    except KeyboardInterrupt:
        if tells():
            print(f"\nrlr-fast: interrupted{verb.interrupted}", file=sys.stderr)
        return 130
