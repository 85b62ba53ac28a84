"""Measures candidate removals on held-out samples and picks one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from .batches import mean_loss
from .gates import skipped, trace_blocks
from .problem import RemovalProblem
from .progress import track
from .solvers import Spectrum


@dataclass(frozen=True)
class Candidate:
    """A removal from any method, with what is known of it.

    removed: sorted indices of the removed blocks.
    source: the method, e.g. "CBO:0" for the ground state.
    energy: predicted by the problem; None where the method has none.
    loss: measured token-mean cross-entropy without these blocks, in nats; None before it is measured.
    """

    removed: tuple[int, ...]
    source: str
    energy: float | None = None
    loss: float | None = None


def states_as_candidates(spectrum: Spectrum) -> list[Candidate]:
    """State k of the spectrum as the candidate `CBO:k`."""
    return [Candidate(state.removed, f"CBO:{k}", state.energy) for k, state in enumerate(spectrum.states)]


def open_blocks(problem: RemovalProblem, removed: Iterable[int]) -> list[int]:
    """The blocks that may go next on the way from `removed` to a removal that the problem allows; none once it is one.

    `removed` holds the blocks that every allowed removal contains (`problem.reduced.always`).
    """
    r = problem.reduced
    gone = np.isin(r.block, list(removed))
    missing = r.need - np.bincount(r.group[gone], r.weight[gone], minlength=len(r.need))
    free = np.flatnonzero(~gone & (missing[r.group] > 0))
    if r.max_removed < len(r.block) and not r.equality:  # one block stays: it must be small enough to reach the budget
        spare = r.weight.sum() - r.need[0]
        free = np.array([i for i in free if any(r.weight[j] <= spare for j in np.flatnonzero(~gone) if j != i)], int)
    return sorted(r.block[free].tolist())


def fill(problem: RemovalProblem, order: Iterable[int]) -> tuple[int, ...]:
    """The removal made by taking blocks in this order of preference, each where the problem still allows it.

    order: block indices, most dispensable first; every block of the problem once. With a number of blocks to remove
    it is simply the first that are not protected; kinds fill up one by one; a parameter budget is filled until met.
    """
    removed = set(problem.reduced.always)
    for block in order:
        if block in open_blocks(problem, removed):
            removed.add(block)
    return tuple(sorted(removed))


def random_candidate(problem: RemovalProblem, seed: int = 0) -> Candidate:
    """A removal drawn at random among those that the problem allows: the baseline that every method must beat."""
    order = np.random.default_rng(seed).permutation(problem.num_blocks).tolist()
    removed = fill(problem, order)
    return Candidate(removed, "random", problem.energy(removed))


def measure_candidates(
    model: nn.Module,
    candidates: Sequence[Candidate],
    samples: Sequence[Tensor],
    *,
    batch_size: int = 8,
    on_measured: Callable[[Candidate], None] = lambda candidate: None,
    progress: bool = True,
) -> list[Candidate]:
    """The candidates with their measured losses; those that have one already are not measured again.

    on_measured: called with each candidate as soon as it is measured, for example to keep it on disk.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    traces = trace_blocks(model)
    measured = []
    for candidate in track(candidates, "Candidates", len(candidates), show=progress):
        if candidate.loss is None:
            with skipped(model, candidate.removed, traces):
                candidate = replace(candidate, loss=mean_loss(model, samples, batch_size))
            on_measured(candidate)
        measured.append(candidate)
    return measured


def select(
    model: nn.Module,
    spectrum_or_candidates: Spectrum | Sequence[Candidate],
    samples: Sequence[Tensor],
    *,
    max_candidates: int = 20,
    batch_size: int = 8,
    progress: bool = True,
) -> Candidate:
    """The candidate with the lowest loss on `samples`, which should not be those the gradients were computed from.

    The ground state is often not the best: the energy is a prediction, and neighbouring states are close. So the first
    `max_candidates` states are measured, in order of energy.

    Raises:
        ValueError: there is no candidate, the samples are unusable, or a loss is NaN or infinite.
    """
    if isinstance(spectrum_or_candidates, Spectrum):
        candidates = states_as_candidates(spectrum_or_candidates)
    else:
        candidates = list(spectrum_or_candidates)
    if not candidates or max_candidates < 1:
        raise ValueError("there are no candidates to select from")
    measured = measure_candidates(model, candidates[:max_candidates], samples, batch_size=batch_size, progress=progress)
    return best(measured)


def best(measured: Sequence[Candidate]) -> Candidate:
    """The measured candidate of lowest loss; of equals the first."""
    return min(measured, key=lambda candidate: candidate.loss if candidate.loss is not None else float("inf"))
