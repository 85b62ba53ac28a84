"""Perplexity of samples and of whole texts; a model's loss, size and speed as one row of a table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import first_line
from ..model.batches import (
    Batch,
    BatchSize,
    Room,
    check_finite,
    frozen,
    make_batches,
    predicted_tokens,
    token_mean,
)
from ..model.blocks import count_parameters, find_blocks
from ..model.head import split_model
from ..model.largest_batch import tokens_that_fit
from ..model.loading import context_length
from ..model.losses import losses_of, sample_losses
from ..model.offload import is_offloaded
from ..model.passes import over_removals
from ..model.tracing import TracedModel, trace_model
from ..problem import NOUNS, Removal, Units
from ..processes import from_main
from ..progress import track
from ..scatter import plus_minus, standard_error
from ..tables import Column, Table, ranges, short
from .scores import Score

WIKITEXT2 = "wikitext2"


@dataclass(frozen=True)
class Evaluation:
    """One row of the result table.

    loss: token-mean cross-entropy in nats, on the samples of the evaluation; perplexity is its exponential.
    num_bytes: size of the weights on disk.
    tokens_per_second: prefill throughput; compare it only within one run. None for models whose weights do not stay
        where they run: what was timed would be the disk.
    removed, energy: the blocks that are gone, where that is known, and their energy, where the model is a candidate.
    scores: on benchmark tasks, where some were asked for.
    sample_losses, sample_tokens: the loss of each sample, and its predicted tokens, of which `loss` is the mean.
    """

    name: str
    num_blocks: int
    loss: float
    num_parameters: int
    num_bytes: int
    tokens_per_second: float | None
    removed: tuple[int, ...] = ()
    energy: float | None = None
    scores: tuple[Score, ...] = ()
    sample_losses: tuple[float, ...] = ()
    sample_tokens: tuple[int, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def times_as_fast(self, other: Evaluation) -> float | None:
        """The throughput as a multiple of another model's, where both are known."""
        if self.tokens_per_second is None or other.tokens_per_second is None:
            return None
        return self.tokens_per_second / other.tokens_per_second

    def above(self, other: Evaluation) -> tuple[float, float | None]:
        """The loss above that of another model on the same samples, and its standard error where they are known.

        The error is that of the differences sample by sample, since a text that is hard for one model is for the other.
        """
        if not self.sample_losses or self.sample_tokens != other.sample_tokens:
            return self.loss - other.loss, None
        apart = np.subtract(self.sample_losses, other.sample_losses)  # (number of samples,)
        return self.loss - other.loss, standard_error(apart, self.sample_tokens)

    def as_json(self) -> dict[str, Any]:
        scores = list(map(Score.as_json, self.scores))
        return {**asdict(self), "perplexity": self.perplexity, "scores": scores}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Evaluation:
        known = dict(values)
        known.pop("perplexity", None)  # computed from the loss
        known["removed"] = tuple(values["removed"])
        known["scores"] = tuple(map(Score.from_json, values.get("scores", ())))
        known["sample_losses"] = tuple(values.get("sample_losses", ()))
        known["sample_tokens"] = tuple(values.get("sample_tokens", ()))
        return Evaluation(**known)


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a text, cut into windows of `window` tokens that share none.

    loss: nats per predicted token; the first token of a window is not predicted.
    num_tokens, num_bytes: of the whole text.
    """

    text: str
    loss: float
    num_tokens: int
    num_bytes: int
    window: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """loss * tokens / bytes / ln 2 (The Pile, arXiv 2101.00027, section 3.1); does not depend on the tokenizer."""
        return self.loss * self.num_tokens / self.num_bytes / math.log(2)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path = WIKITEXT2,
    *,
    window: int = 2048,
    batch_size: BatchSize = "auto",
) -> TextPerplexity:
    """Perplexity of a whole text: tokenized in one piece, cut into windows, stride = length.

    text: a text file, or "wikitext2" for the test split of WikiText-2 (raw), its rows joined by blank lines: the
    number that papers on compression report at window 2048. A shorter rest at the end is left out, as they do.
    window: tokens; a model with a shorter context gets windows of that length.

    Raises:
        ValueError: the text cannot be read or is shorter than two tokens, or the loss is NaN or infinite.
    """
    window = min(window, context_length(model.config) or window)
    if window < 2:
        raise ValueError(f"a window has at least 2 tokens, not {window} (--window)")

    content = _read_text(text)
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]  # (tokens,)
    if len(ids) < 2:
        raise ValueError(f"{text} has fewer than two tokens; give a longer text (--text)")

    # A text that is shorter than a window is one window.
    window_count = len(ids) // window
    windows = list(ids[: window_count * window].view(window_count, window)) if window_count else [ids]
    losses = sample_losses_of(model, windows, batch_size)
    mean = float(token_mean(losses.numpy(), windows))
    return TextPerplexity(str(text), mean, len(ids), len(content.encode()), window)


def _read_text(text: str | Path) -> str:
    """The content of a text file, or the test split of WikiText-2."""
    try:
        if str(text) != WIKITEXT2:
            return Path(text).read_text()
        from datasets import load_dataset

        return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"cannot read the text {text} ({reason}); give a text file or {WIKITEXT2} (--text)") from error


def perplexity(model: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize = "auto") -> float:
    """exp of the token-mean cross-entropy over all predicted tokens of the samples.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    losses = sample_losses_of(model, samples, batch_size)
    return math.exp(token_mean(losses.numpy(), samples))


def sample_losses_of(model: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize = "auto") -> Tensor:
    """(number of samples,) float64: the token-mean cross-entropy of each sample, in nats.

    As `losses_of`; all batches share a sweep over the weights where these are offloaded.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    if not is_offloaded(model):
        return losses_of(model, samples, batch_size)
    return losses_without(trace_model(model), [()], samples, batch_size)[0]


def losses_without(
    traced: TracedModel, removals: Sequence[Removal], samples: Sequence[Tensor], batch_size: BatchSize = "auto"
) -> Tensor:
    """(number of removals, number of samples) float64: `losses_of` the model without the units of each removal.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """

    def run(batch: Batch, outputs: Iterator[tuple[int, Tensor]]) -> Tensor:
        """(removals, batch)."""
        losses = torch.zeros(len(removals), len(batch.indices), dtype=torch.float64)
        for k, hidden in outputs:
            losses[k] = sample_losses(traced.halves, hidden, batch)
            check_finite(losses[k], batch)
        return losses

    found = torch.zeros(len(removals), len(samples), dtype=torch.float64)
    for batch, losses in over_removals(traced, removals, samples, run, batch_size=batch_size):
        found[:, list(batch.indices)] = losses
    return found


def tokens_per_second(
    models: Sequence[nn.Module],
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
    rounds: int = 5,
    progress: bool = True,
) -> list[float]:
    """Throughput of passes with the loss of all tokens, of each model on the same batch: the median of several rounds.

    The models take turns within each round, so that a machine that slows down or speeds up does so for all of them.
    """
    halves = list(map(split_model, models))

    def run_in_turn(batch: Batch) -> list[float]:
        """Seconds of each model, until the device is done."""
        times = []
        for own in halves:
            with frozen(own.model):
                started = time.perf_counter()
                sample_losses(own, own.hidden_of(batch), batch).tolist()
                times.append(time.perf_counter() - started)
        return times

    with torch.no_grad():
        # The first round warms up and is not counted.
        longest = max(make_batches(samples, batch_size), key=lambda batch: int(batch.lengths.sum()))
        batch, _ = next(Room(tokens_that_fit(*models)).results([longest], run_in_turn))
        seconds = [run_in_turn(batch) for _ in track(range(rounds), "Timing", rounds, show=progress)]

    num_tokens = int(batch.lengths.sum())
    return [num_tokens / statistics.median(times) for times in zip(*seconds, strict=True)]


def evaluate_models(
    models: Mapping[str, nn.Module],
    num_bytes: Sequence[int],
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> list[Evaluation]:
    """A row for each named model: loss on the samples, parameters, size, and speed measured in turns where the weights
    are not offloaded.

    num_bytes: size of each model's weights on disk.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    losses = []  # for each model (number of samples,)
    for model in track(models.values(), "Evaluating", len(models), show=progress):
        losses.append(sample_losses_of(model, samples, batch_size))

    timed = {name: model for name, model in models.items() if not is_offloaded(model)}
    running = list(timed.values())
    measured_speeds = from_main(lambda: tokens_per_second(running, samples, batch_size=batch_size, progress=progress))
    speeds = dict(zip(timed, measured_speeds, strict=True))

    rows = []
    for (name, model), own, size in zip(models.items(), losses, num_bytes, strict=True):
        rows.append(evaluation_of(name, model, own, samples, num_bytes=size, tokens_per_second=speeds.get(name)))
    return rows


def evaluation_of(
    name: str,
    model: nn.Module,
    losses: Tensor,
    samples: Sequence[Tensor],
    *,
    num_bytes: int,
    tokens_per_second: float | None = None,
) -> Evaluation:
    """The row of a model, of which only the structure counts here.

    losses: (number of samples,) its loss on each sample.
    """
    return Evaluation(
        name=name,
        num_blocks=len(find_blocks(model)),
        loss=float(token_mean(losses.numpy(), samples)),
        num_parameters=count_parameters(model),
        num_bytes=num_bytes,
        tokens_per_second=tokens_per_second,
        sample_losses=tuple(losses.tolist()),
        sample_tokens=tuple(map(int, predicted_tokens(samples))),
    )


def results_table(rows: Sequence[Evaluation], units: Units = "blocks") -> Table:
    """A row for each model; perplexity, parameters, size and speed also relative to the first.

    units: what the rows tell to be removed.
    """
    first = rows[0]
    columns = [Column("model", words=True), Column("removed"), Column(NOUNS[units], words=True)]
    columns += map(Column, ("perplexity", "parameters", "on disk", "tokens/s"))
    columns += [Column(score.task) for score in first.scores]

    lines = []
    for row in rows:
        share, speed = row.num_parameters / first.num_parameters, row.times_as_fast(first)
        cells = [
            row.name,
            str(len(row.removed)) if row.removed else "",
            ranges(row.removed),
            f"{row.perplexity:.2f}{_rise(row, first)}",
            f"{short(row.num_parameters)} {share:.0%}",
            short(row.num_bytes, "B"),
            "not timed" if speed is None else f"{row.tokens_per_second:,.0f} {speed:.2f}x",
        ]
        lines.append([*cells, *map(Score.as_text, row.scores)])
    return Table(columns, lines)


def _rise(row: Evaluation, first: Evaluation) -> str:
    """How much higher the perplexity is than the first's, in percent with its standard error; nothing for the first."""
    if row == first:
        return ""
    percent, spread = percent_above(*row.above(first))
    return f" {percent:+z.1f}%{spread}"


def percent_above(loss: float, error: float | None) -> tuple[float, str]:
    """How much higher a perplexity is than another's, in percent, and the standard error of that as text.

    loss: above the other's, in nats. error: its standard error; None: not known.
    """
    ratio = math.exp(loss)
    percent_error = None if error is None else 100 * ratio * error  # the derivative of exp is the ratio
    return 100 * (ratio - 1), plus_minus(percent_error, digits=1)


def texts_table(texts: Mapping[str, Sequence[TextPerplexity]]) -> Table:
    """Models down (name -> the same texts), texts across: perplexity and bits per byte."""
    columns = [Column("model", words=True)]
    for text in next(iter(texts.values())):
        columns += [Column(f"{Path(text.text).name} perplexity ({text.window} tokens)"), Column("bits/byte")]

    rows = []
    for name, of_model in texts.items():
        cells = [name]
        for text in of_model:
            cells += [f"{text.perplexity:.4g}", f"{text.bits_per_byte:.4f}"]
        rows.append(cells)
    return Table(columns, rows)
