"""Many removals as one batch: on a GPU a pass over a few tokens takes as long as a pass over thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..problem import Removal, rows_of
from .batches import Batch, input_device
from .residual import ResidualBranches, patched_forward, stream_in, stream_of, with_stream
from .tracing import TracedModel

TOKENS = 16_384  # of a stacked pass: with so many a GPU is busy whatever the model


def is_worth_stacking(traced: TracedModel, batch: Batch) -> bool:
    """Whether this batch alone leaves most of a GPU idle. On a CPU, passes that share their first blocks are faster."""
    few = batch.token_ids.numel() <= TOKENS // 4
    return few and traced.halves.is_split and input_device(traced.model).type == "cuda"


def stacked_passes(traced: TracedModel, batch: Batch, removals: Sequence[Removal]) -> Iterator[tuple[int, Tensor]]:
    """(k, what leaves the decoder without removals[k]) for every k, nothing removed first; (batch, length, width) each.

    The samples are repeated for as many removals as make `TOKENS` together. All blocks run for all of them, and those
    units add nothing to the residual stream that the removal of a row has. Call it on a `frozen` model.
    """
    size = len(batch.lengths)
    together = max(1, TOKENS // batch.token_ids.numel())
    order = sorted(range(len(removals)), key=lambda k: len(removals[k]))  # nothing removed first
    for first in range(0, len(order), together):
        group = order[first : first + together]
        stacked = Batch(
            batch.indices * len(group), batch.token_ids.repeat(len(group), 1), batch.lengths.repeat(len(group))
        )

        removed = torch.from_numpy(rows_of([removals[k] for k in group], traced.num_units))  # (len(group), num_units)
        with closed_in_rows(traced, removed.repeat_interleave(size, dim=0)):
            hidden = traced.halves.hidden_of(stacked)  # (len(group) * batch, length, width)
        yield from zip(group, torch.split(hidden, size), strict=True)


@contextmanager
def closed_in_rows(traced: TracedModel, removed: Tensor) -> Iterator[None]:
    """Inside, units leave the residual stream as it was in some rows of the batch.

    removed: (rows, N) bool, the units that each row goes without.
    """
    with ExitStack() as patches:
        for layer, trace, units, of_branch in zip(
            traced.layers, traced.traces, traced.units_in, traced.branches_in, strict=True
        ):
            if not removed[:, list(units)].any():
                continue
            if len(units) == 1:
                forward = _block_closed(layer.forward, removed[:, units[0]], trace.batch_dim)
            else:
                rows = {branch: removed[:, unit] for branch, unit in of_branch.items()}
                forward = _branches_closed(layer.forward, rows, trace.batch_dim)
            patches.enter_context(patched_forward(layer, forward))
        yield


def _block_closed(run: Callable[..., Any], rows: Tensor, batch_dim: int) -> Callable[..., Any]:
    """A forward pass of a block that leaves the stream as it was in some rows, bool (rows,). run: its own."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        entered = stream_of(args, kwargs)
        output = run(*args, **kwargs)
        left = stream_in(output)
        closed = _along(rows, left, batch_dim)
        return with_stream(output, torch.where(closed, entered.to(left.device), left))

    return forward


def _branches_closed(run: Callable[..., Any], rows: Mapping[int, Tensor], batch_dim: int) -> Callable[..., Any]:
    """A forward pass of a block whose branches add nothing in some rows: branch -> bool (rows,). run: its own."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        def gate(branch: Tensor) -> Tensor:
            if branches.number not in rows:
                return branch
            return branch.masked_fill(_along(rows[branches.number], branch, batch_dim), 0.0)

        with ResidualBranches(stream_of(args, kwargs), gate) as branches:
            return run(*args, **kwargs)

    return forward


def _along(rows: Tensor, like: Tensor, batch_dim: int) -> Tensor:
    """(rows,) as a tensor with the dimensions of another one, which counts rows in `batch_dim`."""
    shape = [1] * like.ndim
    shape[batch_dim] = len(rows)
    return rows.to(like.device).view(shape)
