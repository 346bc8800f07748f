"""The processes of torchrun that work together: shares, sums, and errors that end them all.

Every process runs the same program. What one of them may meet alone (a full disk, a broken file)
happens within `Processes.together`; what all meet alike is raised through `Processes.alike`. So a
job that cannot go on ends everywhere, and one process says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rlr_fast.data.threads import default_workers

T = TypeVar("T")

# A process may wait for another's features for hours. One that died ends its connections, and
# torchrun ends the others, so nobody waits this long for the dead.
_PATIENCE = timedelta(days=7)


class PeerError(RuntimeError):
    """Another process stopped, and so does this one.

    Attributes:
        told: The other process tells its user why; False where it was lost without a word.
    """

    def __init__(self, message: str, *, told: bool) -> None:
        super().__init__(message)
        self.told = told


@dataclass(frozen=True)
class Processes:
    """This process among those that work together; alone unless started by torchrun.

    Attributes:
        rank: From 0; process 0 is the main one: it alone prints and writes results.
        world_size: All processes.
        local_world_size: Those on this machine, which share its memory and its processors.
        host: Their group for Python objects; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    host: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this process prints and writes."""
        return self.rank == 0

    def workers(self, wanted: int | None) -> int:
        """Return the decoding threads of this process: ``wanted``, or its part of the machine."""
        return max(1, default_workers() // self.local_world_size) if wanted is None else wanted

    # Values. Every process must make the same calls in the same order.

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _contact():
            dist.all_gather_object(values, value, group=self.host)
        return values

    def gather(self, value: T) -> list[T] | None:
        """Return the picklable values of all processes in the main one; the others get None."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        with _contact():
            dist.gather_object(value, values, dst=0, group=self.host)
        return values

    def broadcast(self, job: Callable[[], T]) -> T:
        """Run ``job`` in the main process and return its picklable result in every process."""
        value: list[Any] = [None]
        with self.together():
            if self.is_main:
                value[0] = job()
        if self.world_size > 1:
            with _contact():
                dist.broadcast_object_list(value, src=0, group=self.host)
        result: T = value[0]
        return result

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up ``tensor`` over all processes, in place; all get the same bits."""
        if self.world_size > 1:
            with _contact():
                dist.all_reduce(tensor)

    def all_reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients over all processes, in one message; a missing one counts as 0."""
        if self.world_size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        self.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    # Errors

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block in every process; where it fails in one, it fails in all.

        The first process that failed raises its own error. The block must not talk to the others.

        Raises:
            PeerError: The block failed in another process.
        """
        if self.world_size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # raised again below, once the others know
            failure = error
        reasons = self.all_gather(None if failure is None else str(failure) or repr(failure))
        for rank, reason in enumerate(reasons):
            if reason is None:
                continue
            if rank == self.rank and failure is not None:
                raise failure
            raise PeerError(f"process {rank} stopped: {reason}", told=True) from failure

    def agree(self, values: Mapping[str, object]) -> None:
        """Refuse processes that were not given the same values, by name.

        Raises:
            ValueError: Names the value and a process that differs from the main one.
            PeerError: The same, in all but the main process.
        """
        main, *others = self.all_gather(dict(values))
        for rank, other in enumerate(others, 1):
            for name, value in main.items():
                if other[name] != value:
                    message = (
                        f"all processes must work on the same: {name} is {value!r} in process 0 "
                        f"and {other[name]!r} in process {rank}"
                    )
                    raise self.alike(ValueError(message))

    def alike(self, error: Exception) -> Exception:
        """Return what to raise for an error that every process meets: the main one tells it."""
        return error if self.is_main else PeerError(f"process 0 stopped: {error}", told=True)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the other processes that torchrun started, if any, while the block runs.

    A process group that exists already is used and left as it is.

    Raises:
        PeerError: The others cannot be reached.
    """
    exists = dist.is_available() and dist.is_initialized()
    if not exists and processes_wanted() == 1:
        yield Processes()
        return
    if not exists:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        with _contact():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    with _contact():
        host = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        world_size = dist.get_world_size()
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        yield Processes(dist.get_rank(), world_size, local_world_size, host)
    finally:
        dist.destroy_process_group(host if exists else None)


def processes_wanted() -> int:
    """Return how many processes torchrun started, on all machines; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise PeerError(f"lost contact with the other processes: {first_line}", told=False) from (
            error
        )
