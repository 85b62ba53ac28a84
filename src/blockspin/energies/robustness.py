"""How far energies can be trusted: what remains of the answer when the calibration samples are drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Removal, RemovalProblem, rows_of
from ..solvers import solve
from .energies import Energies

OFTEN_ENOUGH = 0.1  # a block that is in this share of the ground states, or stays out in it, is uncertain
MOSTLY_SHARED = 0.75  # where less of the ground state remains, more samples are asked for


@dataclass(frozen=True)
class Robustness:
    """What remains of a problem's ground state when the calibration samples are drawn anew.

    frequency: (num_blocks,) how often each block is in the ground state of a replicate.
    same: how often the ground state is that of all samples. shared: mean share of its blocks that remain.
    order: mean Spearman correlation of the energies of the low states between a replicate and all samples.
    """

    frequency: NDArray[np.float64]
    same: float
    shared: float
    order: float
    ground_states: tuple[Removal, ...]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "frequency": self.frequency.tolist()}

    def summary(self) -> str:
        """One or two sentences, with a warning where more samples are needed."""
        text = (
            f"Drawn anew, the samples give the same ground state in {self.same:.0%} of cases and keep "
            f"{self.shared:.0%} of what it removes; the order of the low states correlates by {self.order:.2f}."
        )

        # What is sometimes in the ground state and sometimes not, the most frequent first.
        order = np.argsort(-self.frequency)
        uncertain = order[(self.frequency[order] > OFTEN_ENOUGH) & (self.frequency[order] < 1 - OFTEN_ENOUGH)]
        if len(uncertain):
            listed = [f"{i} ({self.frequency[i]:.0%})" for i in uncertain]
            text += f" Removed by some of the draws: {', '.join(listed)}."

        if self.shared < MOSTLY_SHARED:
            text += " The energies are uncertain: use more samples."
        return text


def robustness(
    energies: Energies, problem: RemovalProblem, *, replicates: int = 32, states: int = 20, seed: int = 0
) -> Robustness:
    """Bootstrap over the calibration samples: solve the problem again with samples drawn with replacement.

    No model is run. The problems are solved by tabu search, because what matters is the scatter, not a proof.
    """
    generator = np.random.default_rng(seed)
    lowest = [state.removed for state in solve(problem, states=states, solver="tabu", seed=seed).states]
    reference = _ranks(problem, lowest)

    ground_states: list[Removal] = []
    orders = []
    for _ in range(replicates):
        drawn = energies.resampled(generator)
        again = problem.with_energy(drawn.hessian, drawn.mean_gradient)
        ground_states.append(solve(again, states=1, solver="tabu", seed=seed).states[0].removed)
        orders.append(np.corrcoef(_ranks(again, lowest), reference)[0, 1] if len(lowest) > 1 else 1.0)

    picked = rows_of(ground_states, problem.num_blocks)  # (replicates, num_blocks)
    kept = picked[:, list(lowest[0])].sum(axis=1)  # (replicates,) blocks of the ground state of all samples
    return Robustness(
        frequency=picked.mean(axis=0),
        same=ground_states.count(lowest[0]) / replicates,
        shared=float(np.mean(kept / max(1, len(lowest[0])))),
        order=float(np.mean(orders)),
        ground_states=tuple(dict.fromkeys(ground_states)),
    )


def _ranks(problem: RemovalProblem, removals: Sequence[Removal]) -> NDArray[np.int64]:
    """(number of removals,): the place of each in the order of the energies."""
    energies = [problem.energy(removed) for removed in removals]
    return np.argsort(np.argsort(energies, kind="stable"))
