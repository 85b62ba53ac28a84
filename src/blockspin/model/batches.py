"""Runs a model over token samples: padded batches, and the loss of each sample."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .offload import running_device

_IGNORED = -100  # the label that `cross_entropy` leaves out
_SEED_STRIDE = 1_000_003  # apart by a prime, so that the seeds of samples and of runs do not meet


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length.

    indices: (batch,) position of each row in the list of samples; token_ids: (batch, length) int64;
    lengths: (batch,) int64, tokens of each row that are not padding.
    """

    indices: tuple[int, ...]
    token_ids: Tensor
    lengths: Tensor

    def forward(self, model: nn.Module, last_logits: bool = False) -> Tensor:
        """Logits (batch, length, vocabulary). The mask is passed only where there is padding: without it is faster.

        last_logits: where the model can, only those of the last position, for passes made for something else.

        Raises:
            ValueError: a token is beyond the model's embedding.
        """
        check_tokens(model, self.token_ids)
        device = input_device(model)
        positions = torch.arange(self.token_ids.shape[1])
        mask = (positions < self.lengths[:, None]).long()  # (batch, length)
        arguments: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
        if last_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
            arguments["logits_to_keep"] = 1
        logits: Tensor = model(input_ids=self.token_ids.to(device), use_cache=False, **arguments).logits
        return logits


def input_device(model: nn.Module) -> torch.device:
    """The device where token ids must be: that of the embedding, also when the model is spread over several."""
    return running_device(model.get_input_embeddings())  # type: ignore[operator]


def check_tokens(model: nn.Module, token_ids: Tensor) -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        ValueError: there is such a token; the models themselves fail without saying which.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    known, highest = getattr(embedding, "num_embeddings", None), int(token_ids.max())
    if known is not None and highest >= known:
        raise ValueError(
            f"a sample has the token {highest}, but the model knows only {known}; use the tokenizer of this model"
        )


def make_batches(samples: Sequence[Tensor], batch_size: int) -> list[Batch]:
    """Group samples of similar length, so that little is padding; the longest first, so that memory runs out early.

    samples: 1-D int64 tensors of token ids.

    Raises:
        ValueError: there is no sample, one is shorter than two tokens, or batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if len(samples) == 0:
        raise ValueError("there are no samples; give at least one")
    for i, sample in enumerate(samples):
        if sample.ndim != 1 or len(sample) < 2:
            raise ValueError(f"sample {i} has shape {tuple(sample.shape)}; a sample is 1-D with at least two tokens")

    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    batches = []
    for start in range(0, len(order), batch_size):
        indices = tuple(order[start : start + batch_size])
        rows = [samples[i] for i in indices]
        token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)  # (batch, length)
        batches.append(Batch(indices, token_ids, torch.tensor(list(map(len, rows)))))
    return batches


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and its parameters need no gradients; afterwards it is as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trainable:
        p.requires_grad_(False)

    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module in training:
            module.training = True


def sample_losses(logits: Tensor, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """Token-mean cross-entropy of each sample, (batch,) in nats; every token but the first is a label.

    labels: (batch, length) other labels, the one at position t for the token after t.
    """
    if labels is None:
        labels = nn.functional.pad(batch.token_ids[:, 1:], (0, 1))  # the label of a token is its successor

    # The last token of a sample and the padding after it predict nothing.
    lengths = batch.lengths.to(logits.device)
    positions = torch.arange(labels.shape[1], device=logits.device)
    labels = labels.to(logits.device).masked_fill(positions >= lengths[:, None] - 1, _IGNORED)  # (batch, length)

    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), reduction="none")
    return losses.view_as(labels).sum(dim=1) / (lengths - 1)


def drawn_labels(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """(batch, length) tokens drawn from the model's own predictions; those of a sample depend on nothing but it."""
    rows = []
    for row, index in zip(logits.detach(), batch.indices, strict=True):
        generator = torch.Generator().manual_seed(_SEED_STRIDE * seed + index)
        uniform = torch.rand(row.shape[0], 1, generator=generator).to(row.device)  # (length, 1)

        # By inversion of the distribution function, whose last value is 1 only to rounding.
        cumulated = row.softmax(-1, dtype=torch.float32).cumsum(-1)  # (length, vocabulary)
        drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:])  # (length, 1)
        rows.append(drawn[:, 0].clamp(max=row.shape[-1] - 1))
    return torch.stack(rows)


def check_finite(losses: Tensor, batch: Batch) -> None:
    """Raise ValueError, naming the first sample, where a loss is NaN or infinite."""
    for index, loss in zip(batch.indices, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of sample {index} is {loss}; check the weights, or load the model in a wider dtype "
                "(--dtype float32)"
            )


def mean_loss(model: nn.Module, samples: Sequence[Tensor], batch_size: int = 8) -> float:
    """Cross-entropy of `model`, the mean over all predicted tokens of all samples, in nats.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    losses = losses_of(model, samples, batch_size)
    tokens = predicted_tokens(samples)
    return float(losses @ tokens / tokens.sum())


def losses_of(model: nn.Module, samples: Sequence[Tensor], batch_size: int = 8) -> Tensor:
    """(number of samples,) float64: the token-mean cross-entropy of each sample, in nats.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    found = torch.zeros(len(samples), dtype=torch.float64)
    with frozen(model), torch.no_grad():
        for batch in make_batches(samples, batch_size):
            losses = sample_losses(batch.forward(model), batch).double().cpu()  # (batch,)
            check_finite(losses, batch)
            found[list(batch.indices)] = losses
    return found


def predicted_tokens(samples: Sequence[Tensor]) -> Tensor:
    """(number of samples,) float64: every token but the first is predicted; the weight of a sample in a mean."""
    return torch.tensor([len(sample) - 1 for sample in samples], dtype=torch.float64)


def standard_error(values: Tensor, weights: Tensor) -> float | None:
    """The standard error of the weighted mean of independent values, from their scatter; None for a single value.

    It is that of a ratio of two means (Cochran, Sampling Techniques, eq. 2.47): the weights are drawn with the values.

    values, weights: (number,) float64.
    """
    number = len(values)
    if number < 2:
        return None
    weights = weights / weights.sum()
    apart = values - weights @ values
    return float((weights**2 @ apart**2 * number / (number - 1)).sqrt())
