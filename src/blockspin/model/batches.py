"""Token samples as padded batches, and what is common to all passes over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .offload import running_device


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length.

    indices: (batch,) position of each row in the list of samples; token_ids: (batch, length) int64;
    lengths: (batch,) int64, tokens of each row that are not padding.
    """

    indices: tuple[int, ...]
    token_ids: Tensor
    lengths: Tensor

    @property
    def predicting(self) -> Tensor:
        """(batch, length) bool: the tokens that predict another one, all of a sample but its last."""
        return torch.arange(self.token_ids.shape[1]) < self.lengths[:, None] - 1

    def used(self, states: Tensor) -> Tensor:
        """(batch, length, ...) -> (tokens, ...): what is at the tokens that predict another one, sample by sample."""
        return states[self.predicting.to(states.device)]

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model is given. The mask only where there is padding: without it is faster.

        Raises:
            ValueError: a token is beyond the model's embedding.
        """
        check_tokens(model, self.token_ids)
        device = input_device(model)
        inputs = {"input_ids": self.token_ids.to(device)}
        mask = torch.arange(self.token_ids.shape[1]) < self.lengths[:, None]  # (batch, length)
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.long().to(device)
        return inputs

    def forward(self, model: nn.Module) -> Tensor:
        """Logits (batch, length, vocabulary): of a few tokens; `SplitModel.hidden_of` is for more.

        Raises:
            ValueError: a token is beyond the model's embedding.
        """
        logits: Tensor = model(**self.inputs(model), use_cache=False).logits
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


class NotFiniteError(ValueError):
    """A loss is NaN or infinite: with this model, in this dtype, nothing can be finished."""


def check_finite(losses: Tensor, batch: Batch) -> None:
    """Raise NotFiniteError, naming the first sample, where a loss is NaN or infinite."""
    for index, loss in zip(batch.indices, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss of sample {index} is {loss}; check the weights, or load the model in a wider dtype "
                "(--dtype float32)"
            )


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
