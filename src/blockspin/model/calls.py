"""What every block is given besides the hidden states, noted in one pass, so that a block can run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .residual import stream_in, stream_of, with_entering


@dataclass(frozen=True)
class BlockCall:
    """A call of a block in a pass over a batch.

    args, kwargs: what it was given: the hidden states, and the masks, positions and others that the model made.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def stream(self) -> Tensor:
        """The hidden states that entered the block."""
        return stream_of(self.args, self.kwargs)

    def run(self, stream: Tensor) -> Tensor:
        """What the block makes of other hidden states of the same shape."""
        args, kwargs = with_entering(self.args, self.kwargs, stream)
        output: Tensor = stream_in(self.layer(*args, **kwargs))
        return output


@contextmanager
def noted_calls(layers: Sequence[nn.Module]) -> Iterator[list[BlockCall]]:
    """Notes the calls of all blocks in the pass made inside, in the order in which they are made."""
    calls: list[BlockCall] = []

    def noting(layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(BlockCall(layer, args, kwargs))

        return hook

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(noting(layer), with_kwargs=True).remove)
        yield calls
