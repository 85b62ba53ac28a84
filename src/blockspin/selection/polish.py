"""Polishes the winner of a race: proposes the lowest removals of the corrected energy, and races them."""

from __future__ import annotations

from ..energies.fitted import Fitted
from ..problem import Removal, RemovalProblem
from ..solvers import solve
from ..solvers.candidates import swaps
from ..surgery.feasible import Removable
from .ledger import Ledger
from .race import race
from .refit import refit

PROPOSALS = 32  # removals that enter the race of a polishing round; most leave it after an eighth of the samples


def polish(
    ledger: Ledger,
    problem: RemovalProblem,
    budget: float,
    removable: Removable | None = None,
    fitted: Fitted | None = None,
) -> list[tuple[Removal, str]]:
    """Refit the energy to what was measured, propose its lowest removals and swaps of the best, race them; repeat.

    budget: no round begins after so many passes. removable: only what it allows is proposed; None: everything.
    fitted: of `refit`.

    Returns the removals that were measured on the way, with the round that proposed them.
    """
    tried: list[tuple[Removal, str]] = []
    rounds = 0
    while ledger.passes < budget:
        rounds += 1
        best = ledger.best()
        corrected = refit(ledger, problem, fitted)
        proposed = propose(ledger, corrected, best, removable)
        if not proposed:
            break
        race(ledger, [best, *proposed], corrected)
        tried += [(removed, f"polish:{rounds}") for removed in proposed]
    return tried


def propose(ledger: Ledger, corrected: RemovalProblem, best: Removal, removable: Removable | None) -> list[Removal]:
    """Removals that were not measured yet: half of them the lowest of all, half neighbours of the best.

    corrected: the problem with the energy that both halves are ordered by.
    """
    states = solve(corrected, states=len(ledger.values) + PROPOSALS, solver="tabu").states
    lowest = [state.removed for state in states if state.removed not in ledger.values]
    if removable is not None:
        lowest = removable.among(lowest)
    proposed = lowest[: PROPOSALS // 2]

    known = {*ledger.values, *proposed}
    near = [removed for removed in swaps(corrected, best) if removed not in known]
    if removable is not None:
        near = removable.among(near)
    return proposed + near[: PROPOSALS - len(proposed)]
