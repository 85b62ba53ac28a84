"""Runs many removals at once: those that agree on the first blocks share the forward pass up to there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ..memory import states_limit
from ..problem import Removal, block_of
from ..processes import gathered, share
from ..progress import track
from .batches import Batch, BatchSize, frozen, input_device, make_batches
from .residual import drop_shallowest, kept_streams
from .stacking import is_worth_stacking, stacked_passes
from .streaming import jobs_of, swept
from .tracing import TracedModel, resumed, skipped

T = TypeVar("T")


def removal_passes(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Iterator[tuple[Batch, Iterator[tuple[int, Tensor]]]]:
    """Yield every batch with what leaves the decoder without the blocks of removals[k]: (k, hidden states) for all k.

    Hidden states (batch, length, width) are what the head is applied to (`traced.halves`) where logits are needed. The
    removals share passes where the model allows it. The one that removes nothing comes first. Where weights of blocks
    are offloaded, all passes share the loading (`swept`).

    Raises:
        ValueError: unusable samples or removals.
    """
    batches = make_batches(samples, batch_size)
    if traced.is_offloaded and traced.shares_passes:
        with traced.halves.resident_head():
            yield from swept(traced, jobs_of(traced, removals, batches), progress=progress)
        return

    with frozen(traced.model), torch.no_grad(), traced.halves.resident_head():
        for batch in track(batches, "Evaluating", len(batches), show=progress):
            yield batch, _passes(traced, batch, removals)


def over_removals(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    run: Callable[[Batch, Iterator[tuple[int, Tensor]]], T],
    *,
    batch_size: BatchSize = "auto",
    title: str = "Evaluating",
    done: int = 0,
    progress: bool = False,
) -> Iterator[tuple[Batch, T]]:
    """Yield every batch with what `run` makes of it and its hidden states (`removal_passes`).

    Batches that do not fit into memory are halved. Several processes share the batches, and all yield the same.

    title, done: of the progress bar, and the samples that an earlier run has done.

    Raises:
        ValueError: unusable samples or removals, or a single sample that does not fit into memory.
    """
    batches = make_batches(samples, batch_size)
    if traced.is_offloaded and traced.shares_passes:
        jobs = jobs_of(traced, removals, share(batches))
        with traced.halves.resident_head():
            sweep = swept(traced, jobs, progress=progress)
            yield from gathered((batch, run(batch, outputs)) for batch, outputs in sweep)
        return

    def run_batch(batch: Batch) -> T:
        return run(batch, _passes(traced, batch, removals))

    with frozen(traced.model), torch.no_grad(), traced.halves.resident_head():
        yield from traced.room.shared_results(batches, run_batch, title, done, progress)


def _passes(traced: TracedModel, batch: Batch, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor]]:
    """The outputs of a batch, with shared passes where the model allows it."""
    if is_worth_stacking(traced, batch) and not traced.room.fallen_back:
        return stacked_passes(traced, batch, removals)
    if traced.shares_passes:
        return shared_passes(traced, batch, removals)
    return plain_passes(traced, batch, removals)


def plain_passes(traced: TracedModel, batch: Batch, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor]]:
    """As `shared_passes`, but every removal is a pass of its own."""
    for k in sorted(range(len(removals)), key=lambda k: len(removals[k])):  # nothing removed first
        with skipped(traced, removals[k]):
            hidden = traced.halves.hidden_of(batch)
        yield k, hidden


def shared_passes(traced: TracedModel, batch: Batch, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor]]:
    """(k, what leaves the decoder without removals[k]) for every k, in the order of a walk through their prefixes.

    Removals are ordered so that those with common first blocks are neighbours, nothing removed first. Each pass keeps
    the hidden states at the blocks where later removals branch off, and starts from the deepest that it can use. Where
    the states exceed `states_limit`, the shallowest are dropped and computed again. Call it on a `frozen` model.
    """
    limit = states_limit(input_device(traced.model))  # bytes
    order, branchings = _walk(removals, list(map(block_of, traced.units)), traced.depth)
    states: dict[int, Tensor] = {}  # block -> hidden states that enter it (batch, length, width), ascending
    for place, k in enumerate(order):
        # States deeper than the common prefix with the removal before are of no use to this one.
        shared = branchings[place - 1] if place else 0
        for block in sorted(states):
            if block > shared:
                del states[block]
        start = max(states, default=0)

        # The passes after this one branch off from it until one shares less with it than is kept already.
        wanted, shallowest = set(), traced.depth
        for branching in branchings[place:]:
            shallowest = min(shallowest, branching)
            if shallowest <= start:
                break
            wanted.add(shallowest)

        beginning = resumed(traced, removals[k], start, states[start]) if states else skipped(traced, removals[k])
        with beginning, kept_streams(traced.layers, wanted - {traced.depth}, limit) as kept:
            hidden = traced.halves.hidden_of(batch)
        states |= kept
        drop_shallowest(states, limit)
        yield k, hidden


def in_order_of_walk(traced: TracedModel, removals: Sequence[Removal]) -> list[int]:
    """The numbers of the removals, those with common first units side by side: neighbours share passes."""
    return _walk(removals, list(map(block_of, traced.units)), traced.depth)[0]


def num_passes(traced: TracedModel, removals: Sequence[Removal]) -> float:
    """What `removal_passes` costs for these removals, in passes of the whole model over the same samples."""
    if traced.shares_passes:
        return _passes_of_walk(removals, traced.units_in)

    # Each is a pass of its own.
    passes = 0.0
    for removed in removals:
        passes += share_that_runs(traced, removed)
    return passes


def share_that_runs(traced: TracedModel, removed: Removal) -> float:
    """The share of the model that runs in a pass without the removed units: all where those cannot be bypassed."""
    return _share_of_blocks(traced.units_in, removed) / traced.depth if traced.can_bypass(removed) else 1.0


def passes_of_walk(removals: Sequence[Removal], depth: int) -> float:
    """What `shared_passes` costs for these removals of a model of `depth` blocks, in passes of the whole model."""
    return _passes_of_walk(removals, [(block,) for block in range(depth)])


def _passes_of_walk(removals: Sequence[Removal], units_in: Sequence[tuple[int, ...]]) -> float:
    """What `shared_passes` costs for these removals, in passes of the whole model.

    units_in: the numbers of the units in each block.
    """
    home = [block for block, numbers in enumerate(units_in) for _ in numbers]
    order, branchings = _walk(removals, home, len(units_in))
    blocks = 0.0
    for start, k in zip([0, *branchings], order, strict=False):
        blocks += _share_of_blocks(units_in[start:], removals[k])
    return blocks / len(units_in)


def _share_of_blocks(units_in: Sequence[tuple[int, ...]], removed: Removal) -> float:
    """How much of these blocks runs without the removed units, in blocks; a unit is an equal share of its block."""
    running = 0.0
    for numbers in units_in:
        running += 1 - len({*numbers} & {*removed}) / len(numbers)
    return running


def _walk(removals: Sequence[Removal], home: Sequence[int], depth: int) -> tuple[list[int], list[int]]:
    """The order of the removals, nothing removed first and common first units side by side, and for each but the last
    of them the first block of which it and the next one take different units; `depth` where they are equal.

    home: the block of each unit.
    """
    order = sorted(range(len(removals)), key=lambda k: [i in removals[k] for i in range(len(home))])
    branchings = []
    for a, b in pairwise(order):
        different = set(removals[a]) ^ set(removals[b])
        branchings.append(home[min(different)] if different else depth)
    return order, branchings
