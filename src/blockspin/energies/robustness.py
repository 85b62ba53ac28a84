"""How far energies can be trusted: what remains of the answer when the calibration samples are drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import RemovalProblem
from ..solvers import solve
from .energies import Energies


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
    ground_states: tuple[tuple[int, ...], ...]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "frequency": self.frequency.tolist()}

    def summary(self) -> str:
        """One or two sentences, with a warning where more samples are needed."""
        uncertain = [i for i in np.argsort(-self.frequency) if 0.1 < self.frequency[i] < 0.9]
        text = (
            f"Drawn anew, the samples give the same ground state in {self.same:.0%} of cases and keep "
            f"{self.shared:.0%} of its blocks; the order of the low states correlates by {self.order:.2f}."
        )
        if len(uncertain):
            text += " Uncertain blocks: " + ", ".join(f"{i} ({self.frequency[i]:.0%})" for i in uncertain) + "."
        if self.shared < 0.75:
            text += " The energies are uncertain: use more samples."
        return text


def robustness(
    energies: Energies, problem: RemovalProblem, *, replicates: int = 32, states: int = 20, seed: int = 0
) -> Robustness:
    """Bootstrap over the calibration samples: solve the problem again with samples drawn with replacement.

    No model is run. Solved by tabu search: what matters is the scatter, not a proof.
    """
    generator = np.random.default_rng(seed)
    lowest = [state.removed for state in solve(problem, states=states, solver="tabu", seed=seed).states]
    reference = _ranks(problem, lowest)
    ground_states, orders = [], []
    for _ in range(replicates):
        drawn = energies.resampled(generator)
        again = problem.with_energy(drawn.hessian, drawn.mean_gradient if problem.beta else None)
        ground_states.append(solve(again, states=1, solver="tabu", seed=seed).states[0].removed)
        orders.append(np.corrcoef(_ranks(again, lowest), reference)[0, 1] if len(lowest) > 1 else 1.0)
    kept = [len({*removed} & {*lowest[0]}) / max(1, len(lowest[0])) for removed in ground_states]
    frequency = np.bincount([i for removed in ground_states for i in removed], minlength=problem.num_blocks)
    return Robustness(
        frequency=frequency / replicates,
        same=float(np.mean([removed == lowest[0] for removed in ground_states])),
        shared=float(np.mean(kept)),
        order=float(np.mean(orders)),
        ground_states=tuple(dict.fromkeys(ground_states)),
    )


def _ranks(problem: RemovalProblem, removals: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.argsort(np.argsort([problem.energy(removed) for removed in removals], kind="stable"))
