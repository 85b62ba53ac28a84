"""Where a repair keeps hidden states: on the model's device, on the host, or in a temporary file, as they fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..memory import available_memory, free_memory
from ..model.batches import Batch, input_device
from ..model.spill import SpilledStates, check_spill_room, spilled_states

COPIES = 8  # of all hidden states at most: those of both models at a block, the aims, and what is being made of them
_SHARE = 0.5  # of the memory that is free


class Held:
    """Hidden states that lie wherever there is room; the room is free again when nobody has this any more.

    width: the size of their last dimension.
    """

    def __init__(self, states: SpilledStates, tensor: Tensor) -> None:
        self.width = tensor.shape[-1]
        self._states, self._number = states, states.add(tensor)
        weakref.finalize(self, states.drop, self._number)

    def get(self) -> Tensor:
        """The states, (batch, length, width)."""
        return self._states.get(self._number)


class Shelf:
    """Keeps hidden states. Made by `open_shelf`.

    home: the device that they are kept on; what exceeds the limit of `states` is in a file.
    """

    def __init__(self, home: torch.device, states: SpilledStates) -> None:
        self.home, self._states = home, states

    def keep(self, tensor: Tensor) -> Held:
        return Held(self._states, tensor.to(self.home))


@contextmanager
def open_shelf(model: nn.Module, batches: Sequence[Batch], memory_limit: int | None = None) -> Iterator[Shelf]:
    """A shelf for the hidden states of these batches.

    They are kept on the model's device where half of its free memory holds them, otherwise on the host, in half of what
    is free there, and beyond that in a temporary file.

    memory_limit: bytes on the host; None: half of what is free.

    Raises:
        ValueError: the disk has no room for the file.
    """
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    device = input_device(model)
    tokens = sum(batch.token_ids.numel() for batch in batches)
    needed = COPIES * tokens * embedding.shape[1] * embedding.element_size()  # bytes

    if device.type == "cuda" and needed < _SHARE * free_memory(device):
        with spilled_states(needed) as states:
            yield Shelf(device, states)
        return

    if memory_limit is None:
        memory_limit = int(_SHARE * available_memory())
    check_spill_room(needed - memory_limit)
    with spilled_states(memory_limit) as states:
        yield Shelf(torch.device("cpu"), states)
