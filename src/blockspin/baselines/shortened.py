"""Shortened LLaMA (arXiv 2402.02834): one-shot scores from the loss without each block, or from its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..memory import OutOfMemory, available_memory, free_memory
from ..model.batches import Batch, BatchSize, Room, check_finite, frozen, make_batches
from ..model.blocks import find_stack
from ..model.gates import checkpointed
from ..model.head import split_model, wide_dtype
from ..model.largest_batch import tokens_that_fit
from ..model.losses import sample_losses
from ..model.offload import is_offloaded
from ..model.quality import shared_losses
from ..model.quantization import check_unquantized
from ..model.tracing import trace_model
from ..problem import RemovalProblem, Units
from ..progress import track
from ..solvers.candidates import Candidate
from .scores import from_scores

FIRST, LAST = 4, 2  # blocks at the ends that the "+" variant keeps
BESIDE = 1 / 2  # of the free memory of a device that sums of gradients may take there


def losses_without_each(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    units: Units = "blocks",
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> NDArray[np.float64]:
    """(N,) loss of the model without unit i, in nats; its order is that of the perplexity.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    traced = trace_model(model, units)
    removals = [(i,) for i in range(traced.num_units)]
    return np.array(shared_losses(traced, removals, samples, batch_size=batch_size, progress=progress))


def weight_importance(
    model: nn.Module, samples: Sequence[Tensor], *, batch_size: BatchSize = "auto", progress: bool = False
) -> NDArray[np.float64]:
    """(N,) Taylor importance: sum over the weights w of block i of |w * dL/dw|, L the mean over samples of their loss.

    The gradient is that of the whole set, taken before the absolute value. All parameters of a block count, norms
    too. No other method here needs gradients of the weights. The gradient of a weight is added to its sum as soon as a
    backward pass has it, and is gone then; the sums, in float32, lie beside the weights where there is room, else on
    the host. Only the inputs of the blocks are kept for the backward pass.

    Raises:
        ValueError: unusable samples, a loss that is NaN or infinite, no room for the sums, or weights that are not in
            memory, or quantised.
    """
    if is_offloaded(model):
        raise ValueError("the gradients of weights need these in memory; the model's are read when they are needed")
    check_unquantized(model, "the gradient of weights")
    layers, halves = find_stack(model).layers, split_model(model)
    batches = make_batches(samples, batch_size)
    sums = _sums_beside(list(layers.parameters()))

    def backward(batch: Batch) -> None:
        losses = sample_losses(halves, halves.hidden_of(batch), batch)  # (batch,)
        check_finite(losses.detach(), batch)
        torch.autograd.backward(losses.sum())

    def first_backward(batch: Batch) -> None:
        """What ran out of memory has left gradients in some of the sums."""
        for total in sums.values():
            total.zero_()
        backward(batch)

    # The first batch is the largest: if its first part fits, so do all the others.
    room = Room(tokens_that_fit(model))
    with frozen(model), checkpointed(layers), _gradients_added(sums), torch.enable_grad():
        next(room.results(batches[:1], first_backward))
        rest = room.cut(batches)[1:]
        for batch in track(rest, "Weight gradients", len(rest) + 1, done=1, show=progress):
            backward(batch)

    # Blocks that share a weight have it counted in each.
    scores = np.zeros(len(layers))
    for i, layer in enumerate(layers):
        for w in layer.parameters():
            scores[i] += float((w.detach().to(sums[w]) * sums[w]).abs().sum()) / len(samples)
    return scores


def _sums_beside(weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Zeros for the gradient of each weight, in float32 or wider.

    Raises:
        OutOfMemory: there is no room for them, neither where the weights are nor on the host.
    """
    needed = sum(w.numel() * wide_dtype(w).itemsize for w in weights)  # bytes
    devices = {w.device for w in weights}
    beside = needed < BESIDE * min(map(free_memory, devices))
    if not beside and needed > available_memory():
        raise OutOfMemory(
            f"the gradients of the weights take {needed / 2**30:.0f} GiB, and the host has "
            f"{available_memory() / 2**30:.0f} GiB free"
        )
    return {w: torch.zeros_like(w, dtype=wide_dtype(w), device=w.device if beside else "cpu") for w in weights}


@contextmanager
def _gradients_added(sums: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, a backward pass adds the gradient of each weight to its sum as soon as it has it, and keeps none."""

    def add(w: nn.Parameter) -> None:
        assert w.grad is not None
        sums[w].add_(w.grad.to(sums[w]))
        w.grad = None

    handles = []
    for w in sums:
        w.requires_grad_(True)
        handles.append(w.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for w, handle in zip(sums, handles, strict=True):
            handle.remove()
            w.grad = None
            w.requires_grad_(False)  # `frozen` turns on again what was on before


def shortened_llama(problem: RemovalProblem, scores: NDArray[np.float64], source: str, plus: bool = False) -> Candidate:
    """Remove the M blocks of lowest score at once; the "+" variant never takes the first four and the last two.

    scores: from `losses_without_each` (perplexity) or `weight_importance` (Taylor).

    Raises:
        ValueError: with "+", too few blocks are left to choose from.
    """
    if plus:
        n = problem.num_blocks
        ends = {*range(min(FIRST, n)), *range(max(0, n - LAST), n)}
        problem = problem.with_protected({*problem.protect, *ends})
    return from_scores(problem, scores, source)
