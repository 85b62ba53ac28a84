"""Many removals as one batch: on a GPU a pass over a few tokens takes as long as a pass over thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..problem import Removal
from .batches import Batch, input_device
from .residual import patched_forward, stream_in, stream_of, with_stream
from .tracing import TracedModel

TOKENS = 16_384  # of a stacked pass: with so many a GPU is busy whatever the model


def is_worth_stacking(traced: TracedModel, batch: Batch) -> bool:
    """Whether this batch alone leaves most of a GPU idle. On a CPU, passes that share their first blocks are faster."""
    few = batch.token_ids.numel() <= TOKENS // 4
    can_stack = traced.units == traced.blocks and traced.halves.is_split
    return few and can_stack and input_device(traced.model).type == "cuda"


def stacked_passes(traced: TracedModel, batch: Batch, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor]]:
    """(k, what leaves the decoder without removals[k]) for every k, nothing removed first; (batch, length, width) each.

    The samples are repeated for as many removals as make `TOKENS` together. All blocks run for all of them, and leave
    the residual stream as it was in the rows whose removal has them. Call it on a `frozen` model.
    """
    size = len(batch.lengths)
    together = max(1, TOKENS // batch.token_ids.numel())
    order = sorted(range(len(removals)), key=lambda k: len(removals[k]))  # nothing removed first
    for first in range(0, len(order), together):
        group = order[first : first + together]
        stacked = Batch(
            batch.indices * len(group), batch.token_ids.repeat(len(group), 1), batch.lengths.repeat(len(group))
        )

        removed = torch.zeros((len(group), traced.depth), dtype=torch.bool)
        for row, k in zip(removed, group, strict=True):
            row[list(removals[k])] = True
        with closed_in_rows(traced, removed.repeat_interleave(size, dim=0)):
            hidden = traced.halves.hidden_of(stacked)  # (len(group) * batch, length, width)
        yield from zip(group, torch.split(hidden, size), strict=True)


@contextmanager
def closed_in_rows(traced: TracedModel, removed: Tensor) -> Iterator[None]:
    """Inside, blocks leave the residual stream as it was in some rows of the batch.

    removed: (rows, N) bool, the blocks that each row goes without.
    """

    def closing(run: Callable[..., Any], rows: Tensor, batch_dim: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered = stream_of(args, kwargs)
            output = run(*args, **kwargs)
            left = stream_in(output)

            shape = [1] * left.ndim
            shape[batch_dim] = len(rows)
            return with_stream(output, torch.where(rows.to(left.device).view(shape), entered.to(left.device), left))

        return forward

    with ExitStack() as patches:
        for i, (layer, trace) in enumerate(zip(traced.layers, traced.traces, strict=True)):
            rows = removed[:, i]
            if rows.any():
                patches.enter_context(patched_forward(layer, closing(layer.forward, rows, trace.batch_dim)))
        yield
