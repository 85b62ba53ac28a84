"""Polishes the winner of a race: proposes the lowest removals of the corrected energy, and races them."""

from __future__ import annotations

from ..problem import Removal, RemovalProblem
from ..solvers import solve
from ..solvers.candidates import swaps
from ..surgery.feasible import Removable
from .ledger import Ledger
from .race import race
from .refit import refit

PROPOSALS = 32  # removals that enter the race of a polishing round; most leave it after an eighth of the samples


def polish(
    ledger: Ledger, problem: RemovalProblem, budget: float, removable: Removable | None = None
) -> list[tuple[Removal, str]]:
    """Refit the energy to what was measured, propose its lowest removals and swaps of the best, race them; repeat.

    Returns the removals that were measured on the way, with the round that proposed them.
    """
    tried: list[tuple[Removal, str]] = []
    round_ = 0
    while ledger.passes < budget:
        fitted, best, round_ = refit(ledger, problem), ledger.best(), round_ + 1
        low = [state.removed for state in solve(fitted, states=len(ledger.values) + PROPOSALS, solver="tabu").states]
        low = [removed for removed in low if removed not in ledger.values]
        new = (low if removable is None else removable.among(low))[: PROPOSALS // 2]
        near = [removed for removed in swaps(fitted, best) if removed not in ledger.values and removed not in new]
        new += (near if removable is None else removable.among(near))[: PROPOSALS - len(new)]
        if not new:
            break
        race(ledger, [best, *new])
        tried += [(removed, f"polish:{round_}") for removed in new]
    return tried
