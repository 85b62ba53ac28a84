"""Runs a few tokens through a model and notes what each block does, and that it does it as a block of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..problem import Block
from .batches import frozen, input_device
from .blocks import looks_at_images
from .branches import ROUNDING, BlockTrace, find_parts, proven_branches
from .offload import resident
from .residual import argument_that_is, patched_forward, stream_in, stream_of

_IDS = [[1, 2, 3, 4], [1, 2, 3, 5], [5, 6, 7, 8]]  # the first two differ in the last token only


class _Watch:
    """What the blocks of a model do in one pass, where each is run by `forward`.

    ran: the blocks in the order in which they ran. streams: what entered and what left each, in this order.
    traces: of the blocks that ran. with_parts: whether to find which modules serve which branch.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, with_parts: bool) -> None:
        self.ran: list[int] = []
        self.streams: list[tuple[Tensor, Tensor]] = []
        self.traces: dict[int, BlockTrace] = {}
        self._model, self._layers, self._with_parts = model, layers, with_parts
        self._further: tuple[Any, ...] = ()  # what the last block returned besides the stream

    def forward(self, i: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run block i, and note what it does."""
        layer, stream = self._layers[i], stream_of(args, kwargs)
        with resident(layer):
            output = run(*args, **kwargs)
            left = stream_in(output)
            branches = proven_branches(run, args, kwargs, left)
            parts: tuple[Any, ...] = ()
            if self._with_parts and branches > 1:
                parts = find_parts(layer, lambda: run(*args, **kwargs), stream)
        if not isinstance(left, Tensor) or left.shape != stream.shape:
            raise ValueError(f"block {i} of {type(self._model).__name__} does not return the residual stream")

        if i - 1 in self.traces:
            passed = [argument_that_is(value, kwargs) for value in self._further]
            self.traces[i - 1] = replace(self.traces[i - 1], passed=tuple(passed))

        samples, shape = len(_IDS), stream.shape
        batch_dim = shape.index(samples) if samples in shape else 0
        self._further = () if left is output else tuple(output[1:])
        self.traces[i] = BlockTrace(branches, 0 if left is output else len(output), batch_dim, parts=parts)
        self.ran.append(i)
        self.streams.append((stream, left))
        return output


def observe_blocks(
    model: nn.Module, layers: nn.ModuleList, blocks: Sequence[Block], with_parts: bool
) -> list[BlockTrace]:
    """What each block does in a pass over a few tokens. with_parts: also which modules serve which branch.

    Raises:
        ValueError: as `trace_model` says.
    """
    watch = _Watch(model, layers, with_parts)

    def watched(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: watch.forward(i, run, args, kwargs)

    token_ids = torch.tensor(_IDS, device=input_device(model))  # (3, 4)
    with ExitStack() as patches, torch.no_grad():
        patches.enter_context(frozen(model))
        for i, layer in enumerate(layers):
            patches.enter_context(patched_forward(layer, watched(i, layer.forward)))
        logits = model(input_ids=token_ids, use_cache=False).logits  # (3, 4, vocabulary)

    _check_causal(model, logits)
    for i, block in enumerate(blocks):
        if i not in watch.traces and looks_at_images(block):
            watch.traces[i] = BlockTrace(0, 0, rests=True)
        elif watch.ran.count(i) != 1:
            raise ValueError(
                f"block {i} of {type(model).__name__} ran {watch.ran.count(i)} times in one pass, not once"
            )
    _check_unchanged_between(model, watch.streams)
    return [watch.traces[i] for i in range(len(blocks))]


def _check_unchanged_between(model: nn.Module, streams: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse a model in which a block does not receive what the one before it returned.

    streams: what entered and what left each block, in the order in which they ran.
    """
    for i, ((_, left), (entered, _)) in enumerate(pairwise(streams)):
        # What is no number is refused where the loss shows it, with a remedy.
        if not torch.allclose(left.to(entered.device), entered, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"{type(model).__name__} changes the hidden states between its blocks {i} and {i + 1}; where a setting "
                "of its configuration does that (rescale_every of RWKV), load it with 0"
            )


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """Refuse a model in which the last token changes the predictions before it. logits: of _IDS."""
    before = logits[:, :-1]
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * before.abs().max()
    if (before[0] - before[1]).abs().max() > rounding:
        raise ValueError(
            f"{type(model).__name__} is not causal: a token changes the predictions before it. "
            "blockspin shortens decoder-only language models, not encoders"
        )
