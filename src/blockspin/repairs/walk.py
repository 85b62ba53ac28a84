"""Carries the hidden states of a text through a model block by block, so that no more than one block's is held."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..model.batches import Batch, frozen
from ..model.residual import kept_streams
from ..model.tracing import TracedModel, resumed, skipped
from .projections import Observation, observed

_STATES = 8  # of each token and channel: those of both models, the aims, and what is made of them


class Walk:
    """The hidden states of all batches at one block of a model.

    block: where they are. streams: what enters it, one tensor (batch, length, width) a batch.
    home: where the states are kept: on the model's device where several times as much fits, else on the host.
    ran: how many blocks have run on a batch so far.

    Where a block takes more from the blocks before it than their hidden states, a pass starts at the first block again.
    """

    def __init__(self, traced: TracedModel, batches: Sequence[Batch]) -> None:
        self.traced, self.batches = traced, batches
        self.block = 0
        self.home = _home(traced.model, batches)
        self.ran = 0
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
                stream = self.streams[number].to(device)
                inside.enter_context(resumed(self.traced, later, self.block, stream))
            else:
                inside.enter_context(skipped(self.traced, later))
            seen = inside.enter_context(observed(self.traced, self.block, watched))
            self.traced.halves.hidden_of(self.batches[number])
        self.ran += 1 if self.traced.shares_passes else self.block + 1
        return seen

    def step(self) -> list[list[Tensor]]:
        """Go through the block. Returns for each batch the residual stream after each of its additions but the last."""
        between = []
        for number in range(len(self.batches)):
            additions = [addition.to(self.home) for addition in self.look(number).additions]
            between.append(additions[:-1])
            self.streams[number] = additions[-1]
        self.block += 1
        return between

    def _embedded(self, batch: Batch) -> Tensor:
        """The hidden states that enter the first block."""
        others = range(1, self.traced.depth)
        keeping = kept_streams(self.traced.layers, [0])
        with frozen(self.traced.model), torch.no_grad(), skipped(self.traced, others), keeping as streams:
            self.traced.halves.hidden_of(batch)
        return streams[0].to(self.home)


def _home(model: nn.Module, batches: Sequence[Batch]) -> torch.device:
    """Where the hidden states of all batches are kept."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.device.type != "cuda":
        return torch.device("cpu")
    tokens = sum(batch.token_ids.numel() for batch in batches)
    needed = _STATES * tokens * embedding.shape[1] * embedding.element_size()  # bytes
    free, _ = torch.cuda.mem_get_info(embedding.device)
    return embedding.device if needed < free / 2 else torch.device("cpu")
