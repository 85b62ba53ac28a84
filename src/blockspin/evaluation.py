"""What a model is worth and what it costs: perplexity, parameters, bytes, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from .batches import frozen, make_batches, mean_loss
from .blocks import find_blocks
from .progress import track


@dataclass(frozen=True)
class Evaluation:
    """One row of the result table.

    loss: token-mean cross-entropy in nats, on the samples of the evaluation; perplexity is its exponential.
    num_bytes: size of the weights on disk.
    tokens_per_second: prefill throughput; compare it only within one run.
    removed, energy: of the candidate, where the model is one.
    """

    name: str
    num_blocks: int
    loss: float
    num_parameters: int
    num_bytes: int
    tokens_per_second: float
    removed: tuple[int, ...] = ()
    energy: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


def perplexity(model: nn.Module, samples: Sequence[Tensor], batch_size: int = 8) -> float:
    """exp of the token-mean cross-entropy over all predicted tokens of the samples.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    return math.exp(mean_loss(model, samples, batch_size))


def tokens_per_second(
    models: Sequence[nn.Module],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    rounds: int = 5,
    progress: bool = True,
) -> list[float]:
    """Prefill throughput of each model on the same batch: the median of several rounds.

    The models take turns within each round, so that a machine that slows down or speeds up does so for all of them.
    """
    batch = max(make_batches(samples, batch_size), key=lambda b: int(b.lengths.sum()))
    seconds: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in track(range(rounds + 1), "Timing", rounds + 1, show=progress):
            for model, times in zip(models, seconds, strict=True):
                with frozen(model):
                    started = time.perf_counter()
                    batch.forward(model)[0, 0, 0].item()  # waits for the device
                    times.append(time.perf_counter() - started)
    return [int(batch.lengths.sum()) / statistics.median(times[1:]) for times in seconds]


def evaluate_models(
    models: Mapping[str, nn.Module],
    num_bytes: Sequence[int],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Evaluation]:
    """A row for each named model: loss on the samples, parameters, size, and speed measured in turns.

    num_bytes: size of each model's weights on disk.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    losses = [
        mean_loss(model, samples, batch_size)
        for model in track(models.values(), "Evaluating", len(models), show=progress)
    ]
    speeds = tokens_per_second(list(models.values()), samples, batch_size=batch_size, progress=progress)
    return [
        Evaluation(
            name=name,
            num_blocks=len(find_blocks(model)),
            loss=loss,
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_bytes=size,
            tokens_per_second=speed,
        )
        for (name, model), loss, size, speed in zip(models.items(), losses, num_bytes, speeds, strict=True)
    ]


def results_table(rows: Sequence[Evaluation]) -> Table:
    """The rows as a terminal table; parameters, size and speed also relative to the first row."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("model", "removed blocks", "perplexity", "parameters", "on disk", "tokens/s"):
        table.add_column(column, justify="left" if column in ("model", "removed blocks") else "right", overflow="fold")
    first = rows[0]
    for row in rows:
        share, speed = row.num_parameters / first.num_parameters, row.tokens_per_second / first.tokens_per_second
        table.add_row(
            row.name,
            ",".join(map(str, row.removed)),
            f"{row.perplexity:.2f}",
            f"{_short(row.num_parameters)} {share:.0%}",
            f"{_short(row.num_bytes)}B",
            f"{row.tokens_per_second:,.0f} {speed:.2f}x",
        )
    return table


def _short(number: float) -> str:
    """Three digits and a unit: 2.76 M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} T"
