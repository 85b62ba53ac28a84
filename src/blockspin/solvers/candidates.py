"""Candidate removals: from the states of a spectrum, from an order of preference, at random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..problem import Removal, RemovalProblem, completion
from . import Spectrum


@dataclass(frozen=True)
class Candidate:
    """A removal from any method, with what is known of it.

    removed: sorted indices of the removed blocks.
    source: the method, e.g. "CBO:0" for the ground state.
    energy: predicted by the problem; None where the method has none.
    loss: what removing the blocks was measured to cost, by default the KL divergence from the whole model in nats a
        token; None before it is measured.
    """

    removed: Removal
    source: str
    energy: float | None = None
    loss: float | None = None


def states_as_candidates(spectrum: Spectrum) -> list[Candidate]:
    """State k of the spectrum as the candidate `CBO:k`."""
    candidates = []
    for k, state in enumerate(spectrum.states):
        candidates.append(Candidate(state.removed, f"CBO:{k}", state.energy))
    return candidates


def open_blocks(problem: RemovalProblem, removed: Iterable[int]) -> list[int]:
    """The blocks that may go next on the way from `removed` to a removal that the problem allows; none once it is one.

    `removed` holds the blocks that every allowed removal contains (`problem.reduced.always`).
    """
    gone = set(removed)
    return [block for block in sorted(problem.reduced.block.tolist()) if may_go(problem, gone, block)]


def may_go(problem: RemovalProblem, removed: Iterable[int], block: int) -> bool:
    """Whether a block is one of `open_blocks`."""
    r = problem.reduced
    gone, it = np.isin(r.block, list(removed)), r.block == block  # (n,)
    if not it.any() or gone[it].any():
        return False

    missing = r.quota - np.bincount(r.group[gone], minlength=len(r.quota))  # (groups,)
    if missing[r.group[it]] <= 0:
        return False

    # Without exact counts only what has something of a budget that is not met.
    lacking = r.least - r.weight @ gone  # (budgets,)
    if not r.exactly and not np.any(r.weight[lacking > 0][:, it] > 0):
        return False

    # The budgets must stay within reach.
    return not len(r.least) or completion(r, gone | it) is not None


def fill(problem: RemovalProblem, order: Iterable[int]) -> Removal:
    """The removal made by taking blocks in this order of preference, each where the problem still allows it.

    order: block indices, most dispensable first; every block of the problem once. With a number of blocks to remove
    it is simply the first that are not protected; kinds fill up one by one; budgets are filled until met.
    """
    removed = set(problem.reduced.always)
    for block in order:
        if may_go(problem, removed, block):
            removed.add(block)
    return tuple(sorted(removed))


def without_spare(problem: RemovalProblem, removed: Iterable[int], order: Iterable[int]) -> Removal:
    """An allowed removal less the blocks that its budgets do without; the last in the order of preference stay first.

    With an exact number of blocks there are none.
    """
    left = set(removed)
    for block in reversed([block for block in order if block in left]):
        if problem.allows(left - {block}):
            left.remove(block)
    return tuple(sorted(left))


def random_candidate(problem: RemovalProblem, seed: int = 0) -> Candidate:
    """A removal drawn at random among those that the problem allows: the baseline that every method must beat."""
    order = np.random.default_rng(seed).permutation(problem.num_blocks).tolist()
    removed = fill(problem, order)
    return Candidate(removed, "random", problem.energy(removed))


def distinct(candidates: Sequence[Candidate], apart: int = 2) -> list[Candidate]:
    """One representative, the first, of each group of candidates that differ from it in at most `apart` blocks.

    Blocks that one removes and the other keeps count; exchanging one block makes two. Neighbouring states of a spectrum
    are often nearly the same removal.
    """
    kept: list[Candidate] = []
    for candidate in candidates:
        differences = [len({*candidate.removed} ^ {*other.removed}) for other in kept]
        if min(differences, default=apart + 1) > apart:
            kept.append(candidate)
    return kept


def swaps(problem: RemovalProblem, removed: Iterable[int]) -> list[Removal]:
    """The allowed removals that put one block back and remove another in its place, lowest energy first."""
    gone, open_ = set(removed), problem.reduced.block.tolist()
    allowed = []
    for back in sorted(gone & {*open_}):
        for instead in open_:
            neighbour = tuple(sorted(gone - {back} | {instead}))
            if instead not in gone and problem.allows(neighbour):
                allowed.append(neighbour)
    return sorted(allowed, key=lambda neighbour: (problem.energy(neighbour), neighbour))
