"""Per-sample gradients of the loss with respect to the gates, and the Hessian estimate H = A^T A / m made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..journal import Journal
from ..model import fingerprint
from ..model.batches import Batch, BatchSize, Room, check_finite, frozen, make_batches
from ..model.gates import gated
from ..model.largest_batch import tokens_that_fit
from ..model.losses import drawn_labels, sample_losses
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Units
from ..settings import say
from .energies import Energies, finished_rows, keep_rows

Labels = Literal["text", "model"]


@dataclass(frozen=True, repr=False)
class Gradients(Energies):
    """The gradient of every sample's loss with respect to the gate of every block.

    matrix: (num_samples, num_blocks) float32, the paper's A: d loss_s / d alpha_i at alpha = 1.
    blocks: the blocks of the model, one a column.
    losses: (num_samples,) float32, token-mean cross-entropy of each sample under the whole model, in nats.
    metadata: where the gradients come from (model, calibration set, seed, ...), as text.
    """

    shapes: ClassVar[dict[str, tuple[str, ...]]] = {"matrix": ("samples", "blocks"), "losses": ("samples",)}

    matrix: NDArray[np.float32]
    blocks: tuple[Block, ...]
    losses: NDArray[np.float32]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hessian(self) -> NDArray[np.float64]:
        """H = A^T A / num_samples, (num_blocks, num_blocks): the empirical Fisher estimate of the curvature."""
        a = self.matrix.astype(np.float64)
        hessian: NDArray[np.float64] = a.T @ a / len(a)
        return hessian

    @property
    def mean_gradient(self) -> NDArray[np.float64]:
        """g, (num_blocks,): mean of A over the samples, the first-order term that `beta` weighs."""
        mean: NDArray[np.float64] = self.matrix.astype(np.float64).mean(axis=0)
        return mean

    def resampled(self, generator: np.random.Generator) -> Gradients:
        """As many samples, drawn with replacement: one bootstrap replicate."""
        rows = generator.integers(0, len(self.matrix), len(self.matrix))
        return replace(self, matrix=self.matrix[rows], losses=self.losses[rows])


def estimate_gradients(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    labels: Labels = "text",
    seed: int = 0,
    batch_size: BatchSize = "auto",
    units: Units = "blocks",
    gradient_checkpointing: bool = False,
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Gradients:
    """The gradient of each sample's loss with respect to each block's gate: the paper's A, and with it H.

    One backward pass a batch, of the sum of its samples' losses: with a gate for every sample and block, the gradients
    of different samples do not mix. Only gates get gradients, no parameters. The result does not depend on batch size,
    order or padding beyond rounding.

    Args:
        model: a causal language model of transformers, on any device or spread by `device_map`.
        samples: 1-D int64 tensors of at least two token ids.
        labels: "text" takes the samples' own tokens as labels, so that H is the empirical Fisher matrix (the paper);
            "model" draws them from the model's predictions, by the seed, so that H estimates the Fisher matrix itself,
            the Gauss-Newton curvature of the KL divergence from the whole model.
        batch_size: of `make_batches`. A batch that does not fit into memory is halved; a single sample that should not
            fit, or does not, is taken with gradient checkpointing, and it is said.
        units: what has a gate: each block, or each of their residual branches.
        gradient_checkpointing: keep only each block's input for the backward pass: less memory, a third more time.
        partial: a file of finished batches, so that the same call continues; remove it when the result is saved.
        metadata: kept in the result.
        progress: show a bar with the time left.

    Raises:
        ValueError: unusable samples, a model whose blocks cannot be found or which is not causal, a loss that is NaN
            or infinite, a partial file of another model or other samples, or memory that runs out.
    """
    batches = make_batches(samples, batch_size)
    traced = trace_model(model, units)
    label_seed = seed if labels == "model" else None

    journal = Journal(partial, fingerprint.of_results(model, samples, labels, label_seed or 0, units))
    losses, matrix = _kept(journal, len(samples), traced.num_units)
    remaining = [batch for batch in batches if np.isnan(losses[list(batch.indices)]).any()]
    done = len(samples) - sum(len(batch.indices) for batch in remaining)
    fitting = tokens_that_fit(model, backward=not gradient_checkpointing)
    room = Room(fitting, fallback=None if gradient_checkpointing else "gradient checkpointing")
    say([] if gradient_checkpointing else _checkpointing_note(remaining, fitting))

    def run(batch: Batch) -> NDArray[np.float32]:
        too_long = batch.token_ids.numel() > fitting  # a single sample: larger batches are halved before they come here
        checkpointing = gradient_checkpointing or room.fallen_back or too_long
        return np.column_stack(gate_gradients(traced, batch, checkpointing, label_seed))  # (batch, 1 + num_blocks)

    with frozen(model), traced.halves.resident_head():
        for batch, rows in room.shared_results(remaining, run, "Gradients", done, progress):
            keep_rows(journal, batch.indices, rows)
            losses[list(batch.indices)], matrix[list(batch.indices)] = rows[:, 0], rows[:, 1:]

    return Gradients(matrix, traced.units, losses, metadata or {})


def _checkpointing_note(batches: Sequence[Batch], fitting: float) -> list[str]:
    """The note that samples of more tokens than should fit are taken with gradient checkpointing; none without them."""
    too_long = [length for batch in batches for length in batch.lengths.tolist() if length > fitting]
    if not too_long:
        return []
    return [
        "Note: half of the free memory should not hold what the blocks keep for the gradients of a sample of "
        f"{min(too_long):,} tokens; {len(too_long):,} of this length or longer are taken with gradient checkpointing, "
        "a third more time."
    ]


def _kept(journal: Journal, num_samples: int, num_units: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Losses (num_samples,) and A (num_samples, num_units) as far as the journal has them; other losses are NaN."""
    losses = np.full(num_samples, np.nan, dtype=np.float32)
    matrix = np.zeros((num_samples, num_units), dtype=np.float32)

    # A row of the journal is the loss of a sample, then its gradient.
    for index, row in finished_rows(journal):
        losses[index], matrix[index] = row[0], row[1:]
    return losses, matrix


def gate_gradients(
    traced: TracedModel,
    batch: Batch,
    gradient_checkpointing: bool = False,
    label_seed: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Losses (batch,) and rows of A (batch, num_blocks) of one batch; call it while the model is `frozen`.

    A_si = d loss_s / d alpha_i at alpha = 1 (the paper's definition of the gradient matrix).
    label_seed: draw the labels from the model with this seed; None takes the tokens of the text.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    alphas = torch.ones(len(batch.indices), traced.num_units, dtype=torch.float32)
    alphas = alphas.to(next(traced.model.parameters()).device).requires_grad_(True)
    with torch.enable_grad(), gated(traced, alphas, gradient_checkpointing):
        hidden = traced.halves.hidden_of(batch)  # (batch, length, width)
        labels = None if label_seed is None else drawn_labels(traced.halves, hidden, batch, label_seed)
        losses = sample_losses(traced.halves, hidden, batch, labels)
        check_finite(losses.detach(), batch)
        torch.autograd.backward(losses.sum())
    assert alphas.grad is not None
    return losses.detach().float().cpu().numpy(), alphas.grad.cpu().numpy()
