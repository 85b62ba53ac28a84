"""How good shortened models are: loss, KL divergence from the original and agreement, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..problem import Removal
from .batches import Batch, check_finite, frozen, make_batches, predicted_tokens, sample_losses, standard_error
from .passes import MEMORY_LIMIT, removal_passes
from .tracing import TracedModel

Floats = NDArray[np.float64]
# (logits, logits of the whole model, batch) -> (batch, number of measures), token means of each sample
Measure = Callable[[Tensor, Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Quality:
    """How good a model is on a text, and how close to the original; means over all predicted tokens.

    loss: cross-entropy in nats. kl: KL(original || this model) in nats. agreement: share of tokens where both models
    predict the same most likely token. above_error, kl_error: standard errors of the loss above the original's and of
    kl, from the scatter between samples; None with one sample.
    """

    loss: float
    kl: float
    agreement: float
    above_error: float | None = None
    kl_error: float | None = None


def measured(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    measure: Measure,
    *,
    batch_size: int = 8,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Floats:
    """(number of removals, number of samples, number of measures): each model without some blocks, on each sample.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """
    with_whole = [(), *removals]
    passes = removal_passes(
        traced, with_whole, samples, batch_size=batch_size, memory_limit=memory_limit, progress=progress
    )
    result: list[list[list[float]]] = []
    for _ in removals:
        result.append([[]] * len(samples))

    for batch, outputs in passes:
        _, whole = next(outputs)  # nothing removed comes first
        for k, logits in outputs:
            values = measure(logits, whole, batch)  # (batch, number of measures)
            for sample, row in zip(batch.indices, values.tolist(), strict=True):
                result[k - 1][sample] = row
    return np.array(result, dtype=np.float64)


def token_mean(values: Floats, samples: Sequence[Tensor]) -> Floats:
    """Means over all predicted tokens, (..., ), of the token means of each sample, (..., number of samples)."""
    tokens = np.array(list(map(len, samples)), dtype=np.float64) - 1  # (number of samples,) predicted ones
    return np.asarray(values @ (tokens / tokens.sum()))


def shared_losses(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> list[float]:
    """Token-mean cross-entropy without the blocks of each removal, in nats: `mean_loss` of every shortened model.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """
    values = measured(
        traced, removals, samples, loss, batch_size=batch_size, memory_limit=memory_limit, progress=progress
    )
    losses: list[float] = token_mean(values[..., 0], samples).tolist()
    return losses


def shared_qualities(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Quality]:
    """The quality of the model without the blocks of each removal, compared with the whole model.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """
    # Losses are set against those of the whole model on the same samples.
    needed = list(removals) if () in removals else [*removals, ()]
    values = measured(traced, needed, samples, quality, batch_size=batch_size, progress=progress)
    whole = values[needed.index(())]  # (number of samples, 3)
    return [_summary(values[k], whole, samples) for k in range(len(removals))]


def quality_of(model: nn.Module, original: nn.Module, samples: Sequence[Tensor], batch_size: int = 8) -> Quality:
    """The quality of any model with the vocabulary of `original`.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    values, whole = np.zeros((2, len(samples), 3))  # loss, divergence, agreement
    with frozen(model), frozen(original), torch.no_grad():
        for batch in make_batches(samples, batch_size):
            reference = batch.forward(original)
            values[list(batch.indices)] = quality(batch.forward(model), reference, batch).numpy()
            whole[list(batch.indices)] = quality(reference, reference, batch).numpy()
    return _summary(values, whole, samples)


def _summary(values: Floats, whole: Floats, samples: Sequence[Tensor]) -> Quality:
    """Means and standard errors. values, whole: (number of samples, 3) of a model and of the original."""
    weights = predicted_tokens(samples)
    above, divergence = torch.from_numpy(values[:, 0] - whole[:, 0]), torch.from_numpy(values[:, 1])
    loss, kl, agreement = token_mean(values.T, samples).tolist()
    above_error, kl_error = standard_error(above, weights), standard_error(divergence, weights)
    return Quality(loss, kl, agreement, above_error, kl_error)


def loss(logits: Tensor, whole: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each sample in nats, (batch, 1)."""
    losses = sample_losses(logits, batch).double().cpu()
    check_finite(losses, batch)
    return losses[:, None]


def kl(logits: Tensor, whole: Tensor, batch: Batch) -> Tensor:
    """KL(original || shortened model) of each sample in nats, (batch, 1) float64.

    logits, whole: (batch, length, vocabulary). Row by row, so that the temporaries are those of one sample.

    Raises:
        ValueError: a divergence is NaN or infinite.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = []
    for row, reference, length in zip(logits, whole, batch.lengths.tolist(), strict=True):
        # Log-probabilities at the positions that predict a token, (length - 1, vocabulary).
        ours = nn.functional.log_softmax(row[: length - 1].to(wide), -1)
        theirs = nn.functional.log_softmax(reference[: length - 1].to(row.device, wide), -1)
        rows.append(nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) / (length - 1))

    divergences = torch.stack(rows).double().cpu()
    check_finite(divergences, batch)
    return divergences[:, None]


def quality(logits: Tensor, whole: Tensor, batch: Batch) -> Tensor:
    """Loss, KL divergence and agreement of each sample, (batch, 3) float64.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    same = (logits.argmax(-1) == whole.argmax(-1).to(logits.device)).double().cpu()  # (batch, length)
    predicting = torch.arange(same.shape[1]) < batch.lengths[:, None] - 1  # (batch, length)
    agreement = (same * predicting).sum(1, keepdim=True) / predicting.sum(1, keepdim=True)  # (batch, 1)
    return torch.cat([loss(logits, whole, batch), kl(logits, whole, batch), agreement], dim=1)
