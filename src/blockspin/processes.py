"""Several processes on one run, as `torchrun` and `accelerate launch` start them: each takes its share of the batches.

All processes make the same calls on the same values. What a batch gives does not depend on the process that computes it
and is handed to all, in the order of the batches, so that every process goes on with the same numbers, whatever their
number. Files are read and written by the main process alone.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import islice
from typing import TypeVar

from .progress import console

T = TypeVar("T")

TIMEOUT = timedelta(hours=6)  # the other processes wait while the main one packs a text or solves a problem

_alone: ContextVar[bool] = ContextVar("alone", default=False)  # inside work that the others do not do
_KNOWN = "raised in all processes"  # a note on errors that all processes have been told of


def start() -> None:
    """Meet the other processes, if a launcher has started several; only the main one shows anything from here on."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    if not state.is_main_process:
        sys.stdout = console.file = open(os.devnull, "w")  # noqa: SIM115, PTH123 (until the process ends)


def num_processes() -> int:
    """How many processes share the work; 1 in work that one process does alone."""
    return 1 if _alone.get() else _distributed()[0]


def is_main() -> bool:
    """Whether this process reads and writes the files."""
    return _distributed()[1] == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that this process takes: every n-th of n processes."""
    return items if num_processes() == 1 else items[_distributed()[1] :: num_processes()]


def share_of_neighbours(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that this process takes where neighbours belong together: a run of them."""
    processes = num_processes()
    rank = _distributed()[1] if processes > 1 else 0
    return items[rank * len(items) // processes : (rank + 1) * len(items) // processes]


def gathered(values: Iterator[T]) -> Iterator[T]:
    """What all processes give, in the order of the items that `share` has shared out; each gives one for each of its.

    Raises:
        Exception: what was raised in any of them, in all of them.
        ValueError: one of them has ended.
    """
    if num_processes() == 1:
        yield from values
        return

    # In rounds, so that a process that keeps the results on disk can do so as they come. The last one finds no item
    # anywhere, and leaves every iterator at its end.
    while any(found := _exchanged(lambda: list(islice(values, 1)))):
        for given in found:
            yield from given


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, for all of them; the others do not call it.

    Raises:
        Exception: what it raises, in all of them.
    """
    if num_processes() == 1:
        return make()
    main = is_main()
    found: T = _exchanged(lambda: make() if main else None)[0]  # type: ignore[assignment]
    return found


def is_known(error: BaseException) -> bool:
    """Whether all processes have raised this error, at the same place: then the main one can tell of it."""
    return _KNOWN in getattr(error, "__notes__", ())


def _exchanged(make: Callable[[], T]) -> list[T]:
    """What `make` returns in each process, in their order; work inside it is not shared."""
    import torch.distributed as dist

    value, own = None, None
    try:
        with _working_alone():
            value = make()
    except Exception as error:
        own = error

    everything: list[tuple[T, Exception | None]] = [(None, None)] * num_processes()  # type: ignore[list-item]
    try:
        dist.all_gather_object(everything, (value, _picklable(own)))
    except RuntimeError as error:  # what gloo makes of a closed connection
        if own is not None:
            raise own from None
        raise ValueError("another of the processes has ended; see what it says") from error

    raised = [error for _, error in everything if error is not None]
    if raised:
        raise _noted(own or raised[0])
    return [given for given, _ in everything]


def _distributed() -> tuple[int, int]:
    """(number of processes, which of them this is)."""
    torch = sys.modules.get("torch")  # whoever has not imported it has met no other process
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


@contextmanager
def _working_alone() -> Iterator[None]:
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def _noted(error: Exception) -> Exception:
    if not is_known(error):
        error.add_note(_KNOWN)
    return error


def _picklable(error: Exception | None) -> Exception | None:
    """The error itself, or its message where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # classes of errors may take other arguments than they keep
        return ValueError(str(error)) if isinstance(error, ValueError) else RuntimeError(str(error))
    return error
