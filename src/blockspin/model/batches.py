"""Token samples as padded batches that fit into memory, and what is common to all passes over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..memory import OutOfMemory, is_out_of_memory, release_memory
from ..problem import Floats
from ..processes import gathered, share
from ..progress import bar, console
from .offload import running_device

T = TypeVar("T")
BatchSize = int | Literal["auto"]  # samples of the longest length in a batch
BUSY_GPU, BUSY_CPU = 16_384, 2_048  # tokens of a batch beyond which passes get no faster


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
    def filled(self) -> Tensor:
        """(batch, length) bool: the tokens that are not padding."""
        return torch.arange(self.token_ids.shape[1]) < self.lengths[:, None]

    @property
    def predicting(self) -> Tensor:
        """(batch, length) bool: the tokens that predict another one, all of a sample but its last."""
        return torch.arange(self.token_ids.shape[1]) < self.lengths[:, None] - 1

    def halves(self) -> tuple[Batch, Batch]:
        """The first rows and the others, without the padding that they do not need."""
        middle = (len(self.indices) + 1) // 2
        return self._part(slice(0, middle)), self._part(slice(middle, None))

    def _part(self, rows: slice) -> Batch:
        lengths = self.lengths[rows]
        return Batch(self.indices[rows], self.token_ids[rows, : int(lengths.max())], lengths)

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
        if not bool(self.filled.all()):
            inputs["attention_mask"] = self.filled.long().to(device)
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


def make_batches(samples: Sequence[Tensor], batch_size: BatchSize) -> list[Batch]:
    """Group samples of similar length, so that little is padding; the longest first, so that memory runs out early.

    samples: 1-D int64 tensors of token ids.
    batch_size: how many of the longest samples make a batch. One of shorter samples has more of them, as many as have
        no more tokens, padding included. "auto": as many as keep the device busy (`BUSY_GPU`, `BUSY_CPU`).

    Raises:
        ValueError: there is no sample, one is shorter than two tokens, or batch_size is not positive.
    """
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if len(samples) == 0:
        raise ValueError("there are no samples; give at least one")
    for i, sample in enumerate(samples):
        if sample.ndim != 1 or len(sample) < 2:
            raise ValueError(f"sample {i} has shape {tuple(sample.shape)}; a sample is 1-D with at least two tokens")

    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    busy = BUSY_GPU if torch.cuda.is_available() else BUSY_CPU
    tokens = busy if batch_size == "auto" else batch_size * len(samples[order[0]])  # of a batch, padding included

    batches, start = [], 0
    while start < len(order):
        rows = max(1, tokens // len(samples[order[start]]))
        batches.append(_batch_of(samples, order[start : start + rows]))
        start += rows
    return batches


def _batch_of(samples: Sequence[Tensor], indices: Sequence[int]) -> Batch:
    """These samples side by side."""
    rows = [samples[i] for i in indices]
    token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)  # (batch, length)
    return Batch(tuple(indices), token_ids, torch.tensor(list(map(len, rows))))


class Room:
    """Runs something on batches, and learns how large they may be: one that does not fit into memory is halved.

    Results belong to samples, so that they are the same up to rounding, however a batch is cut.

    tokens: of a batch, padding included, that should fit (`tokens_that_fit`): one that has more is halved at once.
    fallback: what is tried where a single sample does not fit. fallen_back: whether it is; then `run` does it.
    """

    def __init__(self, tokens: float, fallback: str | None = None) -> None:
        self.fallback, self.fallen_back = fallback, False
        self._tokens = tokens  # as far as is known

    def results(
        self, batches: Sequence[Batch], run: Callable[[Batch], T], title: str = "", done: int = 0, show: bool = False
    ) -> Iterator[tuple[Batch, T]]:
        """Yield every batch, or its parts, with what `run` gives for it.

        title, show: of a progress bar over the samples, of which an earlier run has done some.

        Raises:
            OutOfMemory: not even one sample fits.
        """
        waiting = self.cut(batches)
        with bar(show) as display:
            task = display.add_task(title, total=done + sum(len(batch.indices) for batch in batches), completed=done)
            while waiting:
                batch = waiting.pop(0)
                try:
                    result = run(batch)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                else:
                    yield batch, result
                    display.advance(task, len(batch.indices))
                    continue

                # Here what the error held is free.
                release_memory()
                self._lower(batch)
                waiting = self.cut([batch, *waiting])

    def shared_results(
        self, batches: Sequence[Batch], run: Callable[[Batch], T], title: str = "", done: int = 0, show: bool = False
    ) -> Iterator[tuple[Batch, T]]:
        """As `results`. Several processes share the batches, and all yield what each of them has found."""
        yield from gathered(self.results(share(batches), run, title, done, show))

    def together(self, batches: Sequence[Batch], run: Callable[[], T]) -> T:
        """What `run` gives, which needs all batches at once and cuts them itself (`cut`). Where memory runs out, it
        starts again, and the largest batches are halved.

        Raises:
            OutOfMemory: not even single samples fit.
        """
        while True:
            try:
                return run()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise

            # Here what the error held is free.
            release_memory()
            self._lower(max(self.cut(batches), key=lambda batch: (len(batch.indices) > 1, batch.token_ids.numel())))

    def cut(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, halved until each is as small as is known to be needed."""
        fitting: list[Batch] = []
        for batch in batches:
            if len(batch.indices) > 1 and batch.token_ids.numel() > self._tokens:
                fitting += self.cut(batch.halves())
            else:
                fitting.append(batch)
        return fitting

    def _lower(self, batch: Batch) -> None:
        """Batches as large as this one do not fit."""
        rows, length = batch.token_ids.shape
        if rows > 1:
            self._tokens = rows * length // 2
            said = f"{rows // 2} at a time from here on"
        elif self.fallback is not None and not self.fallen_back:
            self._tokens, self.fallen_back = math.inf, True
            said = f"{self.fallback} from here on"
        else:
            raise OutOfMemory(
                f"out of memory with one sample of {length:,} tokens; shorten the samples (--max-length), load the "
                "model in a narrower dtype (--dtype bfloat16), or spread it (--device-map auto, --stream)"
            )
        console.print(f"Out of memory with {rows} x {length:,} tokens: {said}.", style="yellow", highlight=False)


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


def token_mean(values: Floats, samples: Sequence[Tensor]) -> Floats:
    """Means over all predicted tokens, (...,), of the token means of each sample, (..., number of samples)."""
    tokens = predicted_tokens(samples).numpy()  # (number of samples,)
    return np.asarray(values @ (tokens / tokens.sum()))
