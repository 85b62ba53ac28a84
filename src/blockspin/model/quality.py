"""How good shortened models are: loss, KL divergence from the original and agreement, sample by sample.

A measure sees the predictions of one chunk of tokens: no more logits are ever made, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from ..memory import states_limit
from ..problem import Floats, Removal
from ..processes import gathered, num_processes, share_of_neighbours
from ..scatter import standard_error
from .batches import (
    Batch,
    BatchSize,
    Room,
    check_finite,
    frozen,
    input_device,
    make_batches,
    predicted_tokens,
    token_mean,
)
from .head import SplitModel, log_softmax, split_model
from .largest_batch import tokens_that_fit
from .offload import is_offloaded
from .passes import in_order_of_walk, over_removals, removal_passes
from .streaming import Job, swept
from .tracing import TracedModel, trace_model


class Reference:
    """What the original predicts for some tokens; made when first needed, once for all models compared with it.

    labels: (tokens,) the tokens that follow. predict: returns the log-probabilities.
    """

    def __init__(self, labels: Tensor, predict: Callable[[], Tensor]) -> None:
        self.labels = labels
        self._predict = predict

    def split(self, size: int) -> list[Reference]:
        """The same for so many tokens at a time."""
        parts = []
        for start in range(0, len(self.labels), size):
            rows = slice(start, start + size)
            parts.append(Reference(self.labels[rows], partial(self._predicted, rows)))
        return parts

    @cached_property
    def log_probabilities(self) -> Tensor:
        """(tokens, vocabulary), float32 or wider."""
        return self._predict()

    def _predicted(self, rows: slice) -> Tensor:
        """The log-probabilities of some of the tokens."""
        return self.log_probabilities[rows]

    @cached_property
    def probabilities(self) -> Tensor:
        """(tokens, vocabulary)."""
        return self.log_probabilities.exp()

    @cached_property
    def top(self) -> Tensor:
        """(tokens,) the most likely token."""
        return self.log_probabilities.argmax(-1)


# (log-probabilities of a model (tokens, vocabulary), what the original predicts) -> (tokens, number of measures)
# The log-probabilities are the measure's own, to be overwritten: fresh memory costs more than the arithmetic.
Measure = Callable[[Tensor, Reference], Tensor]


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
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Floats:
    """(number of removals, number of samples, number of measures): each model without some blocks, on each sample.

    Several processes share the batches; where there is only one, the removals.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """
    batches = make_batches(samples, batch_size)
    if len(batches) == 1 and num_processes() > 1:
        chosen = _own_part(traced, removals, batches[0])
        own = [removals[k] for k in chosen]

        def of_own() -> Iterator[tuple[Sequence[int], Floats]]:
            if own:
                yield chosen, measured(traced, own, samples, measure, batch_size=batch_size)

        of_each: dict[int, Floats] = {}  # (number of samples, number of measures)
        for numbers, rows in gathered(of_own()):
            of_each |= zip(numbers, rows, strict=True)
        return np.stack([of_each[k] for k in range(len(removals))])

    with_whole = [(), *removals]
    limit = states_limit(input_device(traced.model))

    def run(batch: Batch, outputs: Iterator[tuple[int, Tensor]]) -> Tensor:
        return _against_whole(traced, batch, outputs, measure, limit)  # (removals, batch, measures)

    parts = over_removals(traced, with_whole, samples, run, batch_size=batch_size, progress=progress)
    found: list[Floats] = [np.zeros(0)] * len(samples)  # of each sample (removals, measures)
    for batch, values in parts:
        for place, sample in enumerate(batch.indices):
            found[sample] = values[:, place].numpy()
    return np.stack(found, axis=1)


def _own_part(traced: TracedModel, removals: Sequence[Removal], batch: Batch) -> list[int]:
    """The removals that this process measures on a batch that all have: neighbours in the walk through their prefixes.

    Those whose predictions the head makes together (`compared`) stay together, so that they are rounded as ever.
    """
    order, chunk = in_order_of_walk(traced, removals), traced.halves.chunk
    in_last_chunk = int(batch.predicting.sum()) % chunk or chunk  # tokens, of which all other chunks have no fewer
    together = chunk // in_last_chunk

    groups = [order[first : first + together] for first in range(0, len(order), together)]
    return [k for group in share_of_neighbours(groups) for k in group]


def measured_in_sweeps(
    traced: TracedModel, wanted: Sequence[tuple[Sequence[Removal], Tensor]], measure: Measure
) -> Iterator[Floats]:
    """As `measured` for one sample after the other, each with removals of its own, but all share the reading of blocks.

    Yields (number of removals, number of measures) for each. Only for offloaded models that share passes.

    wanted: removals and the sample on which they are measured.
    """
    jobs = []
    for removals, sample in wanted:
        (batch,) = make_batches([sample], 1)
        jobs.append(Job(batch, ((), *removals)))
    limit = states_limit(input_device(traced.model))
    with traced.halves.resident_head():
        for batch, outputs in swept(traced, jobs):
            yield _against_whole(traced, batch, outputs, measure, limit)[:, 0].numpy()


def _against_whole(
    traced: TracedModel, batch: Batch, outputs: Iterator[tuple[int, Tensor]], measure: Measure, limit: int
) -> Tensor:
    """(removals, batch, measures) of the outputs of a batch, of which the whole model's come first."""
    _, whole = next(outputs)
    whole = batch.used(whole)  # (tokens, width)
    values: dict[int, Tensor] = {}
    for group in _groups(batch, outputs, limit):
        hidden = [states for _, states in group]
        found = compared(traced.halves, hidden, traced.halves, whole, batch, measure)  # (group, batch, measures)
        for (k, _), rows in zip(group, found, strict=True):
            values[k] = rows
    return torch.stack([values[k] for k in sorted(values)])


def _groups(batch: Batch, outputs: Iterator[tuple[int, Tensor]], limit: int) -> Iterator[list[tuple[int, Tensor]]]:
    """The hidden states (tokens, width) of several passes together, as many as fit into so many bytes; at least one."""
    group: list[tuple[int, Tensor]] = []
    for k, hidden in outputs:
        used = batch.used(hidden)
        group.append((k, used))
        if (len(group) + 1) * used.nbytes > limit:
            yield group
            group = []
    if group:
        yield group


def compared(
    ours: SplitModel, hidden: Sequence[Tensor], original: SplitModel, whole: Tensor, batch: Batch, measure: Measure
) -> Tensor:
    """Token means of each sample, (number of models, batch, number of measures) float64 on the host.

    What the original predicts is computed once for all models.

    hidden: of each model (tokens, width), what the head of `ours` is applied to at the tokens that `batch.used` picks.
    whole: the same of the original.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    labels = batch.used(batch.token_ids.roll(-1, 1))  # (tokens,) the tokens that follow
    parts: list[list[Tensor]] = [[] for _ in hidden]
    chunk = min(ours.chunk, original.chunk)
    for start in range(0, len(labels), chunk):
        tokens = slice(start, start + chunk)
        reference = Reference(labels[tokens], partial(original.log_probabilities, whole[tokens]))
        number = len(reference.labels)

        # From its softmax to its measures a row stays in the cache of a CPU: memory is slower than the arithmetic.
        size = ours.cached if whole.device.type == "cpu" else number
        references = reference.split(size)

        # Where there are few tokens, the head has several models at a time: it is faster on more rows.
        together = chunk // number
        for first in range(0, len(hidden), together):
            group = slice(first, first + together)
            rows = torch.cat([states[tokens] for states in hidden[group]])  # (models * tokens, width)
            logits = torch.split(ours.logits(rows), number)  # of each model (tokens, vocabulary)
            for values, own in zip(parts[group], logits, strict=True):
                for few, theirs in zip(torch.split(own, size), references, strict=True):
                    values.append(measure(log_softmax(few), theirs))
            del logits, own, few  # no two groups at a time

    # The tokens of a sample lie side by side.
    per_token = torch.stack([torch.cat(values) for values in parts]).double().cpu()  # (models, tokens, measures)
    lengths = (batch.lengths - 1).tolist()
    means = torch.stack([part.mean(dim=1) for part in torch.split(per_token, lengths, dim=1)], dim=1)
    for values in means:
        check_finite(values.sum(dim=1), batch)
    return means


def shared_losses(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> list[float]:
    """Token-mean cross-entropy without the blocks of each removal, in nats: `mean_loss` of every shortened model.

    Raises:
        ValueError: unusable samples or removals, or a loss that is NaN or infinite.
    """
    values = measured(traced, removals, samples, loss, batch_size=batch_size, progress=progress)
    losses: list[float] = token_mean(values[..., 0], samples).tolist()
    return losses


def shared_qualities(
    traced: TracedModel,
    removals: Sequence[Removal],
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
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


def quality_of(
    model: nn.Module, original: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize = "auto"
) -> Quality:
    """The quality of any model with the vocabulary of `original`.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """

    def with_own_loss(log_probabilities: Tensor, reference: Reference) -> Tensor:
        """(tokens, 4): the loss of the original besides."""
        own = loss(reference.log_probabilities, reference)
        return torch.cat([quality(log_probabilities, reference), own.to(log_probabilities.device)], dim=1)

    values = values_of(model, original, samples, with_own_loss, batch_size)
    return _summary(values[:, :3], values[:, 3:], samples)


def values_of(
    model: nn.Module, original: nn.Module, samples: Sequence[Tensor], measure: Measure, batch_size: BatchSize = "auto"
) -> Floats:
    """(number of samples, number of measures): token means of any model with the vocabulary of `original`.

    Raises:
        ValueError: unusable samples, or a value that is NaN or infinite.
    """
    if is_offloaded(model) or is_offloaded(original):
        return _values_in_sweeps(trace_model(model), trace_model(original), samples, measure, batch_size)
    ours, theirs = split_model(model), split_model(original)

    def run(batch: Batch) -> list[list[float]]:
        hidden = batch.used(ours.hidden_of(batch))  # (tokens, width)
        whole = batch.used(theirs.hidden_of(batch))
        found: list[list[float]] = compared(ours, [hidden], theirs, whole, batch, measure)[0].tolist()
        return found

    values: dict[int, list[float]] = {}
    room = Room(tokens_that_fit(model, original))
    with frozen(model), frozen(original), ours.resident_head(), theirs.resident_head(), torch.no_grad():
        for batch, found in room.shared_results(make_batches(samples, batch_size), run):
            values |= zip(batch.indices, found, strict=True)
    return np.array([values[i] for i in range(len(samples))], dtype=np.float64)


def _values_in_sweeps(
    ours: TracedModel, theirs: TracedModel, samples: Sequence[Tensor], measure: Measure, batch_size: BatchSize
) -> Floats:
    """As `values_of`, where weights are offloaded: those of each model are read once for all samples."""
    own, whole = (_used_states(traced, samples, batch_size) for traced in (ours, theirs))
    values: dict[int, list[float]] = {}
    with torch.no_grad(), ours.halves.resident_head(), theirs.halves.resident_head():
        for batch in make_batches(samples, batch_size):
            hidden, reference = (torch.cat([states[i] for i in batch.indices]) for states in (own, whole))
            found = compared(ours.halves, [hidden], theirs.halves, reference, batch, measure)[0]
            values |= zip(batch.indices, found.tolist(), strict=True)
    return np.array([values[i] for i in range(len(samples))], dtype=np.float64)


def _used_states(traced: TracedModel, samples: Sequence[Tensor], batch_size: BatchSize) -> dict[int, Tensor]:
    """For each sample what the head is applied to at the tokens that predict another one, (tokens, width)."""
    found: dict[int, Tensor] = {}
    for batch, outputs in removal_passes(traced, [()], samples, batch_size=batch_size):
        _, hidden = next(outputs)
        found |= zip(batch.indices, torch.split(batch.used(hidden), (batch.lengths - 1).tolist()), strict=True)
    return found


def _summary(values: Floats, whole: Floats, samples: Sequence[Tensor]) -> Quality:
    """Means and standard errors. values: (number of samples, 3) of a model. whole: the same of the original, of which
    only the loss is read."""
    weights = predicted_tokens(samples).numpy()
    loss, kl, agreement = token_mean(values.T, samples).tolist()
    above_error = standard_error(values[:, 0] - whole[:, 0], weights)
    return Quality(loss, kl, agreement, above_error, standard_error(values[:, 1], weights))


def loss(log_probabilities: Tensor, reference: Reference) -> Tensor:
    """Cross-entropy of each token in nats, (tokens, 1)."""
    labels = reference.labels.to(log_probabilities.device)
    return -log_probabilities.gather(1, labels[:, None])


def kl(log_probabilities: Tensor, reference: Reference) -> Tensor:
    """KL(original || model) of each token in nats, (tokens, 1); overwrites the log-probabilities."""
    device = log_probabilities.device
    whole = reference.log_probabilities.to(device)
    apart = torch.sub(whole, log_probabilities, out=log_probabilities)  # (tokens, vocabulary)
    p = reference.probabilities.to(device)
    return apart.mul_(p).sum(dim=1, keepdim=True)  # more precise than inner products, which sum in order


def quality(log_probabilities: Tensor, reference: Reference) -> Tensor:
    """Loss, KL divergence and agreement of each token, (tokens, 3); overwrites the log-probabilities."""
    same = log_probabilities.argmax(-1) == reference.top.to(log_probabilities.device)  # (tokens,)
    agreement = same.to(log_probabilities.dtype)[:, None]
    own_loss = loss(log_probabilities, reference)
    return torch.cat([own_loss, kl(log_probabilities, reference), agreement], dim=1)


MEASURES: dict[str, Measure] = {"kl": kl, "loss": loss}  # of one number a token, by the names of objectives
