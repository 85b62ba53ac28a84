"""Shortened LLaMA (arXiv 2402.02834): one-shot scores from the loss without each block, or from its weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..model.batches import check_finite, frozen, make_batches
from ..model.blocks import find_stack
from ..model.head import split_model
from ..model.losses import sample_losses
from ..model.quality import shared_losses
from ..model.tracing import trace_model
from ..problem import RemovalProblem, Units
from ..progress import track
from ..solvers.candidates import Candidate
from .scores import from_scores

FIRST, LAST = 4, 2  # blocks at the ends that the "+" variant keeps


def losses_without_each(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    units: Units = "blocks",
    batch_size: int = 8,
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
    model: nn.Module, samples: Sequence[Tensor], *, batch_size: int = 8, progress: bool = False
) -> NDArray[np.float64]:
    """(N,) Taylor importance: sum over the weights w of block i of |w * dL/dw|, L the mean over samples of their loss.

    The gradient is that of the whole set, taken before the absolute value. All parameters of a block count, norms
    too. No other method here needs gradients of the weights; they take the memory of one more copy of the blocks.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    layers = find_stack(model).layers
    weights = list(layers.parameters())
    sums = []
    for w in weights:
        sums.append(torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)))

    batches = make_batches(samples, batch_size)
    halves = split_model(model)
    with frozen(model), torch.enable_grad():
        for w in weights:
            w.requires_grad_(True)
        try:
            for batch in track(batches, "Weight gradients", len(batches), show=progress):
                losses = sample_losses(halves, halves.hidden_of(batch), batch)  # (batch,)
                check_finite(losses.detach(), batch)
                gradients = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient
        finally:
            for w in weights:
                w.requires_grad_(False)  # `frozen` turns on again what was on before

    # Blocks that share a weight have it counted in each.
    importance = {}
    for w, total in zip(weights, sums, strict=True):
        importance[w] = float((w.detach() * total).abs().sum()) / len(samples)
    scores = np.zeros(len(layers))
    for i, layer in enumerate(layers):
        for w in layer.parameters():
            scores[i] += importance[w]
    return scores


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
