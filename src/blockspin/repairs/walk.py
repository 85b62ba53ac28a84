"""Carries the hidden states of a text through a model block by block, so that no more than one block's is held."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from ..model.batches import Batch, frozen
from ..model.offload import ReadAhead, resident
from ..model.residual import kept_streams
from ..model.tracing import TracedModel, resumed, skipped
from .projections import Observation, observed
from .shelf import Held, Shelf


class Walk:
    """The hidden states of all batches at one block of a model.

    block: where they are. streams: what enters it, (batch, length, width) for each batch. shelf: keeps the states.
    ran: how many blocks have run on a batch so far.

    Where a block takes more from the blocks before it than their hidden states, a pass starts at the first block again.
    Offloaded weights of a block are read once to go through it; for a look or two, make it `resident` first.

    ahead: reads the blocks in the order in which they become resident; None: each is read when it does.
    """

    def __init__(
        self, traced: TracedModel, batches: Sequence[Batch], shelf: Shelf, ahead: ReadAhead | None = None
    ) -> None:
        self.traced, self.batches, self.shelf = traced, batches, shelf
        self.block = 0
        self.ran = 0
        self._ahead = ahead
        with resident(traced.layers[0]):
            self.streams = [self._embedded(batch) for batch in batches]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.traced.depth

    @property
    def layer(self) -> nn.Module:
        """The block."""
        return self.traced.layers[self.block]

    @property
    def batch_dim(self) -> int:
        """The dimension of the streams that counts samples, 0 or 1."""
        return self.traced.traces[self.block].batch_dim

    def resident(self) -> AbstractContextManager[None]:
        """Inside, the weights of the block stay where it runs."""
        return resident(self.layer) if self._ahead is None else self._ahead.resident(self.layer)

    def follow(self, other: Walk) -> None:
        """Take over where the walk through another model is, and the states there."""
        self.block, self.streams = other.block, list(other.streams)

    def look(self, number: int, watched: Sequence[str] = ()) -> Observation:
        """Run the block on a batch, and see what it does; the states stay where they are.

        watched: modules inside the block whose inputs are kept.
        """
        later = range(self.block + 1, self.traced.depth)
        with ExitStack() as inside:
            inside.enter_context(frozen(self.traced.model))
            inside.enter_context(torch.no_grad())
            if self.traced.shares_passes:
                device = next(self.layer.parameters()).device
                stream = self.streams[number].get().to(device)
                inside.enter_context(resumed(self.traced, later, self.block, stream))
            else:
                inside.enter_context(skipped(self.traced, later))
            seen = inside.enter_context(observed(self.traced, self.block, watched))
            self.traced.halves.hidden_of(self.batches[number])
        self.ran += 1 if self.traced.shares_passes else self.block + 1
        return seen

    def step(self) -> list[list[Held]]:
        """Go through the block. Returns for each batch the residual stream after each of its additions but the last."""
        between = []
        with self.resident():
            for number in range(len(self.batches)):
                additions = [self.shelf.keep(addition) for addition in self.look(number).additions]
                between.append(additions[:-1])
                self.streams[number] = additions[-1]
        self.block += 1
        return between

    def _embedded(self, batch: Batch) -> Held:
        """The hidden states that enter the first block."""
        others = range(1, self.traced.depth)
        keeping = kept_streams(self.traced.layers, [0])
        with frozen(self.traced.model), torch.no_grad(), skipped(self.traced, others), keeping as streams:
            self.traced.halves.hidden_of(batch)
        self.ran += 1  # `skipped` does not skip every block
        return self.shelf.keep(streams[0])
