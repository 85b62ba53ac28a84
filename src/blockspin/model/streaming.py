"""Many passes in one sweep over the weights: block by block, all hidden states that need a block go through it.

For models whose blocks lie in host memory or on disk: the weights of a block are read once for all removals and all
batches, and not once for every pass. What the blocks compute, and on which tensors, is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..memory import available_memory
from ..problem import Removal
from ..progress import track
from .batches import Batch, frozen
from .blocks import check_removal
from .calls import BlockCall
from .offload import resident_in_turn, running_device
from .residual import entered_by
from .spill import SpilledStates, check_spill_room, spilled_states
from .tracing import TracedModel, block_calls, branches_bypassed, bypassed

STATES_SHARE = 0.5  # of the memory that is free, for the hidden states of a sweep


@dataclass(frozen=True)
class Job:
    """A batch, and the removals that are measured on it."""

    batch: Batch
    removals: tuple[Removal, ...]

    def state_bytes(self, bytes_per_token: float) -> int:
        """Of the hidden states that are held at a time at most: those of each removal, and what is just computed."""
        states = len(set(self.removals)) + 1
        return int(states * self.batch.token_ids.numel() * bytes_per_token)


@dataclass(frozen=True)
class Branch:
    """Removals that agree on the blocks so far.

    members: their places among the removals of the job. state: the number of their hidden states, which they share.
    """

    members: list[int]
    state: int


class BatchInSweep:
    """The hidden states of a batch at one block of a sweep, a branch for all removals that agree so far."""

    def __init__(self, traced: TracedModel, job: Job, states: SpilledStates) -> None:
        self.batch = job.batch
        self._traced, self._job, self._states = traced, job, states
        self._calls: list[BlockCall] = block_calls(traced, job.batch)
        everything = list(range(len(job.removals)))
        self._branches = [Branch(everything, states.add(self._calls[0].stream.cpu()))]

    def go_through(self, block: int, device: torch.device) -> None:
        """Take the branches behind a block, which runs once for each way to shorten it that their removals have."""
        following: list[Branch] = []
        for branch in self._branches:
            # The places of the removals by the units of the block that they take.
            ways: dict[tuple[int, ...], list[int]] = {}
            units = self._traced.units_in[block]
            for k in branch.members:
                gone = tuple(unit for unit in units if unit in self._job.removals[k])
                ways.setdefault(gone, []).append(k)

            entering = self._states.get(branch.state)
            if units not in ways:
                self._states.drop(branch.state)

            # Those that keep the block come first, so that the removal of nothing stays the first of all.
            for gone in sorted(ways):
                if gone == units:
                    following.append(Branch(ways[gone], branch.state))
                    continue
                leaving = self._run(block, gone, entering.to(device))
                following.append(Branch(ways[gone], self._states.add(leaving.cpu())))
        self._branches = following

    def _run(self, block: int, gone: Sequence[int], stream: Tensor) -> Tensor:
        """What the block makes of the stream without some of its units."""
        if not gone:
            return self._calls[block].run(stream)
        branches = self._traced.whole_and_partial(gone)[1][block]
        with branches_bypassed(self._traced, block, branches):
            return self._calls[block].run(stream)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """(k, what leaves the decoder without the blocks of removal k) for every k, nothing removed first; for once."""
        for branch in self._branches:
            with at_the_end(self._traced, self._states.get(branch.state)):
                hidden = self._traced.halves.hidden_of(self.batch)
            self._states.drop(branch.state)
            for k in branch.members:
                yield k, hidden


def jobs_of(traced: TracedModel, removals: Sequence[Removal], batches: Sequence[Batch]) -> list[Job]:
    """All removals on every batch.

    Raises:
        ValueError: unusable removals.
    """
    checked = tuple(check_removal(removed, traced.num_units) for removed in removals)
    return [Job(batch, checked) for batch in batches]


def swept(
    traced: TracedModel, jobs: Sequence[Job], memory_limit: int | None = None, progress: bool = False
) -> Iterator[tuple[Batch, Iterator[tuple[int, Tensor]]]]:
    """Yield the batch of every job with its outputs: (k, what leaves the decoder without the blocks of removal k).

    It takes as few sweeps over the weights as the hidden states of all batches allow. Where memory runs out, which a
    sweep meets at the first block, it starts again with batches that are halved.

    memory_limit: bytes of hidden states on the host; None: half of what is free. Batches share a sweep as long as their
        states fit; what a single batch has beyond that goes into a temporary file.

    Raises:
        ValueError: no room for the temporary file.
    """
    if not jobs:
        return
    if memory_limit is None:
        memory_limit = int(STATES_SHARE * available_memory())

    with frozen(traced.model), torch.no_grad():
        stream = block_calls(traced, jobs[-1].batch)[0].stream
        bytes_per_token = stream.nbytes / jobs[-1].batch.token_ids.numel()
        groups = _groups(jobs, bytes_per_token, memory_limit)
        for number, group in enumerate(groups):
            title = "Sweep" if len(groups) == 1 else f"Sweep {number + 1} of {len(groups)}"
            with spilled_states(memory_limit) as states:
                sweep = partial(_one_sweep, traced, group, states, title, progress)
                for in_sweep in traced.room.together([job.batch for job in group], sweep):
                    yield in_sweep.batch, in_sweep.outputs()


def walked(traced: TracedModel, batches: Sequence[Batch], memory_limit: int | None = None) -> Iterator[int]:
    """Take all batches through the blocks in one sweep, for those who watch the blocks (and start again where memory
    runs out: `Room.together`).

    Yields the place of the batch that a block takes next: of all batches at the first block, then at the second.

    Raises:
        ValueError: no room for a temporary file.
    """
    if memory_limit is None:
        memory_limit = int(STATES_SHARE * available_memory())

    with frozen(traced.model), torch.no_grad(), spilled_states(memory_limit) as states:
        calls = [block_calls(traced, batch) for batch in batches]
        check_spill_room(sum(call[0].stream.nbytes for call in calls) - memory_limit)
        held = [states.add(call[0].stream.cpu()) for call in calls]

        for block, layer in enumerate(resident_in_turn(list(traced.layers))):
            device = running_device(layer)
            for place, number in enumerate(held):
                yield place
                leaving = calls[place][block].run(states.get(number).to(device))
                states.drop(number)
                held[place] = states.add(leaving.cpu())


def _groups(jobs: Sequence[Job], bytes_per_token: float, memory_limit: int) -> list[list[Job]]:
    """Neighbouring jobs whose hidden states fit into memory together; a job that does not fit is alone.

    Raises:
        ValueError: there is no room on the disk for what such a job has beyond the limit.
    """
    groups: list[list[Job]] = []
    held = 0  # bytes of the last group
    for job in jobs:
        needed = job.state_bytes(bytes_per_token)
        check_spill_room(needed - memory_limit)
        if not groups or held + needed > memory_limit:
            groups.append([])
            held = 0
        groups[-1].append(job)
        held += needed
    return groups


def _one_sweep(
    traced: TracedModel, jobs: Sequence[Job], states: SpilledStates, title: str, progress: bool
) -> list[BatchInSweep]:
    """Take all branches of the jobs through all blocks; of each, the batches that fit into memory."""
    states.clear()
    batches = []
    for job in jobs:
        batches += [BatchInSweep(traced, Job(part, job.removals), states) for part in traced.room.cut([job.batch])]

    needed = _blocks_that_run(traced, jobs)
    layers = resident_in_turn([traced.layers[i] for i in needed])
    for i, layer in track(zip(needed, layers, strict=True), title, len(needed), show=progress):
        device = running_device(layer)
        for batch in batches:
            batch.go_through(i, device)
    return batches


@contextmanager
def at_the_end(traced: TracedModel, stream: Tensor) -> Iterator[None]:
    """Inside, no block runs in a pass: the rest of the model goes on with the hidden states that leave the last one."""
    with bypassed(traced, range(traced.num_units)), entered_by(traced.layers[0], stream):
        yield


def _blocks_that_run(traced: TracedModel, jobs: Sequence[Job]) -> list[int]:
    """The blocks that are not part of every removal."""
    always = set(range(traced.num_units))
    for job in jobs:
        for removed in job.removals:
            always.intersection_update(removed)
    bypassed, _ = traced.whole_and_partial(always)
    return [i for i in range(traced.depth) if i not in bypassed]
