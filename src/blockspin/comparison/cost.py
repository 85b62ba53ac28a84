"""What finding a removal costs, in forward passes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.blocks import find_stack
from ..model.residual import stream_in, stream_of
from ..processes import gathered

KEEP_SECONDS = 5.0  # between two times that a cost is kept


@dataclass
class MethodCost:
    """passes: forward passes of the whole model over the calibration samples that would cost as much; a backward pass
    counts as one more through the activations and one more through the weights."""

    passes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: MethodCost) -> MethodCost:
        return MethodCost(self.passes + other.passes, self.seconds + other.seconds)


@contextmanager
def counted(model: nn.Module, tokens: int, keep: Callable[[MethodCost], None] | None = None) -> Iterator[MethodCost]:
    """Counts the blocks that run inside, bypassed ones not, in passes of the whole model over `tokens` tokens.

    A block that runs without some of its sub-layers counts as a whole one.

    keep: is given what was counted so far, every few seconds: for costs that outlive the process. The passes of several
    processes are added up when it is done.
    """
    cost, started = MethodCost(), time.perf_counter()
    kept = started
    layers = find_stack(model).layers

    def count(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal kept
        before = stream_of(args, kwargs)  # (batch, length, width)
        after = stream_in(output)
        if after is before:  # a bypassed block hands on the very tensor that it got
            return

        # A backward pass through the activations costs another forward pass, one through the weights a third.
        runs = 1
        if after.requires_grad:
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            runs += 2 if trains else 1
        batch_tokens = after.shape[0] * after.shape[1]
        cost.passes += runs * batch_tokens / len(layers) / tokens

        now = time.perf_counter()
        if keep is not None and now - kept > KEEP_SECONDS:
            cost.seconds, kept = now - started, now
            keep(cost)

    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.register_forward_hook(count, with_kwargs=True)
            hooks.callback(handle.remove)
        yield cost
    cost.seconds = time.perf_counter() - started
    cost.passes = sum(gathered(iter([cost.passes])))
