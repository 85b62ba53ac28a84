"""The loss of each sample, a chunk of tokens at a time: neither pass holds more logits than those of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, BatchSize, Room, check_finite, frozen, make_batches, token_mean
from .head import SplitModel, split_model
from .largest_batch import tokens_that_fit

_SEED_STRIDE = 1_000_003  # apart by a prime, so that the seeds of samples and of runs do not meet


def sample_losses(halves: SplitModel, hidden: Tensor, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """Token-mean cross-entropy of each sample, (batch,) in nats; every token but the first is a label.

    Differentiable in the hidden states; the parameters of the head get no gradient.

    hidden: (batch, length, width), from `SplitModel.hidden_of`.
    labels: (batch, length) other labels, the one at position t for the token after t.
    """
    if labels is None:
        labels = nn.functional.pad(batch.token_ids[:, 1:], (0, 1))  # the label of a token is its successor

    used = batch.used(hidden), batch.used(labels).to(hidden.device)  # (tokens, width), (tokens,)
    losses: Tensor = _TokenLosses.apply(*used, halves)  # type: ignore[no-untyped-call]

    # (tokens,) spread over (batch, length), 0 where nothing is predicted.
    predicting = batch.predicting.to(losses.device)
    spread = torch.zeros(predicting.shape, dtype=losses.dtype, device=losses.device)
    return spread.masked_scatter(predicting, losses).sum(dim=1) / (batch.lengths.to(losses.device) - 1)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token, (tokens,), from hidden states (tokens, width) and labels (tokens,).

    The gradient of every token's loss is computed with the loss and kept, (tokens, width), instead of the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, halves: SplitModel) -> Tensor:
        differentiate = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if differentiate else None
        losses = []
        for start in range(0, len(hidden), halves.chunk):
            part = slice(start, start + halves.chunk)
            chunk = hidden[part].detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                log_probabilities = halves.log_probabilities(chunk)  # (tokens of the chunk, vocabulary)
                wanted = labels[part, None].to(log_probabilities.device)
                own = -log_probabilities.gather(1, wanted)[:, 0]
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(own.sum(), chunk)[0]
            losses.append(own.detach())

        ctx.save_for_backward(gradient)
        return torch.cat(losses).to(hidden.device)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # (tokens, width)
        return (above[:, None] * gradient).to(gradient.dtype), None, None


def drawn_labels(halves: SplitModel, hidden: Tensor, batch: Batch, seed: int) -> Tensor:
    """(batch, length) tokens drawn from the model's own predictions; those of a sample depend on nothing but it."""
    drawn = torch.zeros_like(batch.token_ids)
    for place, (row, index) in enumerate(zip(hidden.detach(), batch.indices, strict=True)):
        generator = torch.Generator().manual_seed(_SEED_STRIDE * seed + index)
        uniform = torch.rand(len(row), 1, generator=generator)  # (length, 1)
        for start in range(0, len(row), halves.chunk):
            part = slice(start, start + halves.chunk)

            # By inversion of the distribution function, whose last value is 1 only to rounding.
            cumulated = halves.log_probabilities(row[part]).exp().cumsum(-1)  # (tokens of the chunk, vocabulary)
            found = torch.searchsorted(cumulated, uniform[part].to(cumulated) * cumulated[:, -1:])
            drawn[place, part] = found[:, 0].clamp(max=cumulated.shape[-1] - 1).cpu()
    return drawn


def mean_loss(model: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize = "auto") -> float:
    """Cross-entropy of `model`, the mean over all predicted tokens of all samples, in nats.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    losses = losses_of(model, samples, batch_size)
    return float(token_mean(losses.numpy(), samples))


def losses_of(model: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize = "auto") -> Tensor:
    """(number of samples,) float64: the token-mean cross-entropy of each sample, in nats.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    halves = split_model(model)

    def run(batch: Batch) -> Tensor:
        """(batch,)."""
        return sample_losses(halves, halves.hidden_of(batch), batch).double().cpu()

    found = torch.zeros(len(samples), dtype=torch.float64)
    with frozen(model), halves.resident_head(), torch.no_grad():
        for batch, losses in Room(tokens_that_fit(model)).shared_results(make_batches(samples, batch_size), run):
            check_finite(losses, batch)
            found[list(batch.indices)] = losses
    return found
