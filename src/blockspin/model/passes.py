"""Runs many removals at once: those that agree on the first blocks share the forward pass up to there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..problem import Removal
from ..progress import track
from .batches import Batch, frozen, make_batches
from .blocks import find_stack
from .gates import BlockTrace, closed, skipped, stream_of, trace_blocks

_NOT_COMPUTED = (KeyError, IndexError, AttributeError, TypeError, ValueError)  # how models say what they miss
MEMORY_LIMIT = 2**30  # bytes of hidden states kept at branching points


def shared_logits(
    model: nn.Module,
    batch: Batch,
    removals: Sequence[Removal],
    traces: Sequence[BlockTrace],
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[int, Tensor]]:
    """(k, logits of the model without removals[k]) for every k, in the order of a walk through their common prefixes.

    Removals are ordered so that those with common first blocks are neighbours, nothing removed first. Each pass keeps
    the hidden states at the blocks where later removals branch off, and starts from the deepest that it can use. Where
    the states exceed `memory_limit` bytes, the shallowest are dropped and computed again. Call it on a `frozen` model.
    """
    depth = len(traces)
    order = sorted(range(len(removals)), key=lambda k: [i in removals[k] for i in range(depth)])
    branch = [_first_difference(removals[a], removals[b], depth) for a, b in pairwise(order)]
    states: list[tuple[int, Tensor]] = []  # (block, hidden states that enter it), ascending
    for place, k in enumerate(order):
        shared = branch[place - 1] if place else 0
        states = [state for state in states if state[0] <= shared]
        start = states[-1] if states else None
        wanted, low = set(), depth
        for later in branch[place:]:
            low = min(low, later)
            if low <= (start[0] if start else 0):
                break
            wanted.add(low)
        logits, kept = _pass(model, batch, removals[k], traces, start, wanted - {depth}, memory_limit)
        states = _within([*states, *kept], memory_limit)
        yield k, logits


def plain_logits(
    model: nn.Module,
    batch: Batch,
    removals: Sequence[Removal],
    traces: Sequence[BlockTrace],
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[int, Tensor]]:
    """As `shared_logits`, but every removal is a pass of its own."""
    for k in sorted(range(len(removals)), key=lambda k: len(removals[k])):  # nothing removed first
        yield k, _bypassing(model, batch, removals[k], traces)


def _bypassing(model: nn.Module, batch: Batch, removed: Removal, traces: Sequence[BlockTrace]) -> Tensor:
    """The logits without some blocks; where others need what these compute, they run and leave the stream as it was."""
    try:
        with skipped(model, removed, traces):
            return batch.forward(model)
    except _NOT_COMPUTED:
        with closed(model, removed):
            return batch.forward(model)


def can_share(model: nn.Module, traces: Sequence[BlockTrace]) -> bool:
    """Whether a pass can start in the middle: tried on four tokens, against whole passes.

    It cannot where a block takes more from the blocks before it than their hidden states, or does not run.
    """
    if any(trace.rests for trace in traces):
        return False
    batch = Batch((0,), torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]))
    depth = len(traces)
    removals = [(), (depth - 1,), (depth // 2,)]
    try:
        shared = dict(shared_logits(model, batch, removals, traces))
    except _NOT_COMPUTED:
        return False
    plain = dict(plain_logits(model, batch, removals, traces))
    rounding = 50 * torch.finfo(plain[0].dtype).eps
    return all(bool((shared[k] - plain[k]).abs().max() <= rounding * plain[k].abs().max()) for k in plain)


def passes_of_walk(removals: Sequence[Removal], depth: int) -> float:
    """What `shared_logits` costs for these removals of a model of `depth` blocks, in passes of the whole model."""
    order = sorted(removals, key=lambda removed: [i in removed for i in range(depth)])
    starts = [0, *(_first_difference(a, b, depth) for a, b in pairwise(order))]
    blocks = sum(depth - start - sum(i >= start for i in r) for start, r in zip(starts, order, strict=False))
    return blocks / depth


def removal_passes(
    model: nn.Module,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Iterator[tuple[Batch, Iterator[tuple[int, Tensor]]]]:
    """Every batch with (k, logits without the blocks of removals[k]) of all k, shared where the model allows it.

    Nothing removed comes first.

    Raises:
        ValueError: unusable samples or removals.
    """
    traces = trace_blocks(model)
    with frozen(model), torch.no_grad():
        outputs = shared_logits if can_share(model, traces) else plain_logits
        batches = make_batches(samples, batch_size)
        for batch in track(batches, "Evaluating", len(batches), show=progress):
            yield batch, outputs(model, batch, removals, traces, memory_limit)


def _pass(
    model: nn.Module,
    batch: Batch,
    removed: Removal,
    traces: Sequence[BlockTrace],
    start: tuple[int, Tensor] | None,
    wanted: set[int],
    memory_limit: int,
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Logits without the removed blocks, and the hidden states that enter the wanted blocks.

    start: (block, hidden states that enter it) of an earlier pass; the blocks before are skipped. The rest of the model
    (embeddings, masks, final norm, head) runs as always, so that nothing needs to be known about it.
    """
    _, stack = find_stack(model)
    skip = {*removed, *range(start[0] if start else 0)}
    if len(skip) == len(stack):  # `skipped` refuses to skip every block; what block 0 computes here is not used
        skip.remove(0)
    kept: list[tuple[int, Tensor]] = []

    def keeping(block: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            kept[:] = _within([*kept, (block, stream_of(args, kwargs))], memory_limit)

        return hook

    def replacing(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        assert start is not None
        return ((start[1], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": start[1]})

    with ExitStack() as hooks:
        hooks.enter_context(skipped(model, sorted(skip), traces))
        if start is not None:
            hooks.callback(stack[start[0]].register_forward_pre_hook(replacing, with_kwargs=True).remove)
        for block in wanted:
            hooks.callback(stack[block].register_forward_pre_hook(keeping(block), with_kwargs=True).remove)
        return batch.forward(model), kept


def _within(states: list[tuple[int, Tensor]], memory_limit: int) -> list[tuple[int, Tensor]]:
    """The deepest of the states that fit into the limit."""
    if not states:
        return states
    fit = memory_limit // max(1, states[0][1].numel() * states[0][1].element_size())
    return states[max(0, len(states) - fit) :]


def _first_difference(a: Removal, b: Removal, depth: int) -> int:
    """The first block that one removal takes and the other does not; `depth` where they are equal."""
    return min(set(a) ^ set(b), default=depth)
