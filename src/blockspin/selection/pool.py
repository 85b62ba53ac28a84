"""Candidates worth measuring: low states, the ground states of resampled energies, what cheap baselines choose."""

from __future__ import annotations

from collections.abc import Sequence

from .. import baselines
from ..problem import Removal, RemovalProblem
from ..solvers import Spectrum
from ..solvers.candidates import Candidate, distinct, states_as_candidates


def cheap_choices(problem: RemovalProblem, activations: baselines.Activations) -> list[Candidate]:
    """What the baselines that cost next to nothing would remove; consecutive units only where the problem allows it."""
    choices = [
        baselines.last_blocks(problem),
        baselines.block_influence(problem, activations),
        baselines.norm_ratio(problem, activations),
    ]
    if baselines.consecutive_run(problem, activations) is not None:
        choices.append(baselines.angular_distance(problem, activations))
    return choices


def pool_of(
    problem: RemovalProblem,
    spectrum: Spectrum,
    others: Sequence[Candidate] = (),
    *,
    max_candidates: int = 20,
    ground_states: Sequence[Removal] = (),
) -> list[Candidate]:
    """Candidates worth a race: distinct low states, others, and the ground states of resampled energies."""
    states = distinct(states_as_candidates(spectrum))[:max_candidates]
    resampled = [Candidate(removed, "resampled", problem.energy(removed)) for removed in ground_states]

    # Where several propose the same removal, the first keeps it.
    pool: dict[Removal, Candidate] = {}
    for candidate in [*states, *others, *resampled]:
        pool.setdefault(candidate.removed, candidate)
    return list(pool.values())
