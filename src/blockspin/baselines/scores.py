"""Methods that score blocks by what they do to the hidden states; one pass over the data serves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..model.batches import Batch, BatchSize, frozen, make_batches
from ..model.branches import followed
from ..model.head import widened
from ..model.residual import patched_forward, stream_in, stream_of
from ..model.streaming import walked
from ..model.tracing import TracedModel, skipped, trace_model
from ..problem import Floats, Removal, RemovalProblem, Units
from ..solvers.candidates import Candidate, fill
from .greedy import remove_greedily


@dataclass(frozen=True)
class Activations:
    """What the units do to the hidden states h_0 (enters unit 0) to h_N (leaves the last unit, before the norm).

    cosine: (N,) mean over tokens of cos(h_i, h_{i+1}); of sub-layers the score of LLM-Drop (arXiv 2406.15786).
    ratio: (N,) mean over tokens of |h_{i+1}| / |h_i|.
    angle: (N+1, N+1) mean over samples of arccos(cos(h_i, h_j)) / pi at the sample's last token.
    """

    cosine: NDArray[np.float64]
    ratio: NDArray[np.float64]
    angle: NDArray[np.float64]


def measure_activations(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    units: Units = "blocks",
    removed: Sequence[int] = (),
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Activations:
    """One streaming pass: hidden states are reduced to sums as they come; only last-token states are kept for a batch.

    units: what is scored: blocks, or each of their residual branches.
    removed: units to bypass; their cosine and ratio are 1, as are those of blocks that rest (`BlockTrace.rests`).

    Raises:
        ValueError: unusable samples or units.
    """
    return _activations(trace_model(model, units), samples, removed, batch_size, progress)


def _activations(
    traced: TracedModel, samples: Sequence[Tensor], removed: Sequence[int], batch_size: BatchSize, progress: bool
) -> Activations:
    def run(batch: Batch) -> Sequence[Tensor]:
        """The sums over a batch."""
        sums = _Sums(traced, [batch])
        with sums.watched():
            traced.halves.hidden_of(batch)
        sums.finish(0)
        return sums.values

    batches = make_batches(samples, batch_size)
    total = _Sums(traced, [])
    with frozen(traced.model), skipped(traced, removed), torch.no_grad():
        if traced.is_offloaded and traced.shares_passes:
            total = traced.room.together(batches, partial(_summed_in_a_sweep, traced, batches))
        else:
            for _, values in traced.room.shared_results(batches, run, "Activations", show=progress):
                total.add(values)

    tokens = sum(map(len, samples))
    cosine, ratio, angle = total.values
    return Activations((cosine / tokens).numpy(), (ratio / tokens).numpy(), (angle / len(samples)).numpy())


def _summed_in_a_sweep(traced: TracedModel, batches: Sequence[Batch]) -> _Sums:
    """The sums over all batches, each block being read once; of the batches, the parts that fit into memory."""
    fitting = traced.room.cut(batches)
    total = _Sums(traced, fitting)
    with total.watched():
        for place in walked(traced, fitting):
            total.place = place
    for place in range(len(fitting)):
        total.finish(place)
    return total


class _Sums:
    """What the units do to the hidden states, summed up while the blocks run.

    batches: what runs through them. place: of the batch that a block takes next, set by who runs the blocks.
    """

    def __init__(self, traced: TracedModel, batches: Sequence[Batch]) -> None:
        self.traced, self.batches = traced, batches
        self.place = 0

        number = traced.num_units
        self._cosine = torch.zeros(number, dtype=torch.float64)
        self._ratio = torch.zeros(number, dtype=torch.float64)
        self._angle = torch.zeros(number + 1, number + 1, dtype=torch.float64)

        # Of each batch what enters unit i at the last token of each sample, (batch, width).
        self._last: list[dict[int, Tensor]] = [{} for _ in batches]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what the units do is added to the sums."""
        with ExitStack() as patches:
            for block, layer in enumerate(self.traced.layers):
                patches.enter_context(patched_forward(layer, self._watching(block, layer.forward)))
            yield

    def _watching(self, block: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass of a block that also adds what its units do to the sums. run: its own."""
        units, batch_dim = self.traced.units_in[block], self.traced.traces[block].batch_dim
        branches, number = self.traced.branches_in[block], self.traced.traces[block].branches

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_of(args, kwargs)
            output, additions = followed(lambda: run(*args, **kwargs), stream)

            # A block that is one unit is seen as a whole; one that is bypassed adds nothing.
            after = [stream_in(output)] * len(units)
            if len(units) > 1 and len(additions) == number:
                after = [additions[branch] for branch in branches]
            for unit, entered, left in zip(units, [stream, *after], after, strict=False):
                self._add(unit, entered, left, batch_dim)
            return output

        return forward

    def _add(self, unit: int, entered: Tensor, left: Tensor, batch_dim: int) -> None:
        """Add what a unit does to the batch that runs."""
        batch = self.batches[self.place]
        length = batch.token_ids.shape[1]
        before = _by_token(entered, batch_dim, length)  # (batch, length, width)
        after = _by_token(left, batch_dim, length).to(before.device)
        filled = batch.filled.to(before.device)  # (batch, length)

        norm_before, norm_after = before.norm(dim=-1), after.norm(dim=-1)  # (batch, length)
        self._cosine[unit] += _total((before * after).sum(-1) / (norm_before * norm_after), filled)
        self._ratio[unit] += _total(norm_after / norm_before, filled)

        rows, ends = torch.arange(len(batch.lengths)), batch.lengths - 1
        last = self._last[self.place]
        last.setdefault(unit, before[rows, ends].cpu())
        last[unit + 1] = after[rows, ends].cpu()

    def finish(self, place: int) -> None:
        """Add the angles of a batch that all blocks have taken."""
        lengths, last = self.batches[place].lengths, self._last[place]

        # Blocks that rest did not run: they leave the hidden states as they are.
        for (unit, *_), trace in zip(self.traced.units_in, self.traced.traces, strict=True):
            if trace.rests:
                last[unit + 1] = last[unit]
                self._cosine[unit] += lengths.sum()
                self._ratio[unit] += lengths.sum()

        states = torch.stack([last[i] for i in range(self.traced.num_units + 1)], dim=1)  # (batch, N+1, width)
        directions = nn.functional.normalize(states.double(), dim=-1)
        angles = torch.arccos((directions @ directions.mT).clamp(-1, 1)) / np.pi  # (batch, N+1, N+1)
        self._angle += angles.sum(dim=0)
        last.clear()

    @property
    def values(self) -> Sequence[Tensor]:
        """Of the batches that are finished: cosines and ratios (N,) over tokens, angles (N+1, N+1) over samples."""
        return self._cosine, self._ratio, self._angle

    def add(self, values: Sequence[Tensor]) -> None:
        """Add the `values` of other batches."""
        for total, more in zip(self.values, values, strict=True):
            total += more


def from_scores(problem: RemovalProblem, scores: ArrayLike, source: str) -> Candidate:
    """Remove the blocks of lowest score, as the problem allows; of equal scores the first.

    scores: (N,), one for each block; low is dispensable.
    """
    removed = fill(problem, np.argsort(np.asarray(scores), kind="stable").tolist())
    return Candidate(removed, source, problem.energy(removed))


def last_blocks(problem: RemovalProblem) -> Candidate:
    """Remove the last M blocks that may go: the simplest rule, as deep layers change the hidden states least."""
    return from_scores(problem, -np.arange(problem.num_blocks), "last blocks")


def block_influence(problem: RemovalProblem, activations: Activations) -> Candidate:
    """ShortGPT (arXiv 2403.03853): BI_i = 1 - mean over tokens of cos(h_i, h_{i+1}); remove the M lowest at once."""
    return from_scores(problem, 1 - activations.cosine, "block influence")


def iterative_block_influence(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Candidate:
    """Block influence, measured again after each removal: the lowest goes, M times.

    Removed blocks are bypassed, so all indices are those of the original model.
    """
    traced = trace_model(model, problem.units)

    def influence(removed: Removal, free: Sequence[int]) -> Floats:
        return 1 - _activations(traced, samples, removed, batch_size, progress=False).cosine[list(free)]

    found = remove_greedily(problem, influence, "iterative block influence", progress=progress)
    return replace(found, loss=None)  # an influence is no loss


def norm_ratio(problem: RemovalProblem, activations: Activations) -> Candidate:
    """Ministral 3 (arXiv 2601.08584): s_i = mean over tokens of |h_{i+1}| / |h_i|; remove the M lowest."""
    return from_scores(problem, activations.ratio, "norm ratio")


def angular_distance(problem: RemovalProblem, activations: Activations) -> Candidate:
    """Consecutive blocks (arXiv 2403.17887): d(l, n) = mean arccos(cos(h_l, h_{l+n})) / pi at the last token; remove
    the n blocks from l* = argmin_l d(l, n).

    From each l the shortest run that meets the problem is considered: n = M blocks, or as many as reach a budget.

    Raises:
        ValueError: no run of consecutive blocks meets the problem (protected blocks or kinds lie between).
    """
    removed = consecutive_run(problem, activations)
    if removed is None:
        raise ValueError("angular distance removes consecutive blocks, and no such run is what is to be removed")
    return Candidate(removed, "angular distance", problem.energy(removed))


def consecutive_run(problem: RemovalProblem, activations: Activations) -> Removal | None:
    """The run of consecutive units that `angular_distance` removes; None where none meets the problem."""
    n = problem.num_blocks
    runs = []  # (angle, first unit, unit after the last)
    for first in range(n):
        for end in range(first + 1, n + 1):
            if problem.allows(range(first, end)):
                runs.append((activations.angle[first, end], first, end))
                break
    if not runs:
        return None
    _, first, end = min(runs)
    return tuple(range(first, end))


def _by_token(hidden: Tensor, batch_dim: int, length: int) -> Tensor:
    """Hidden states as (batch, length, width) in float32 or wider; where a model keeps several, all are one vector."""
    hidden = hidden.movedim(batch_dim, 0)
    token_dim = hidden.shape.index(length, 1)
    hidden = hidden.movedim(token_dim, 1).flatten(2)
    return widened(hidden)


def _total(values: Tensor, mask: Tensor) -> float:
    """Sum of values (batch, length) over the tokens that are not padding."""
    return float(values.double()[mask].sum())
