"""Removal of one unit after the other, the cheapest first: the loop that SLEB, FinerCut and iterative scores share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..problem import Floats, Removal, RemovalProblem
from ..progress import track
from ..solvers.candidates import Candidate, open_blocks

Costs = Callable[[Removal, Sequence[int]], Floats]  # of what is gone and of n units that may go next: (n,)


def remove_greedily(problem: RemovalProblem, costs: Costs, name: str, *, progress: bool) -> Candidate:
    """Remove the unit that costs least, together with those already gone, until the goal is met.

    Of equal ones the first goes.

    costs: is asked anew after each removal. What the last unit cost is the loss of the candidate.
    """
    removed, lowest = problem.reduced.always, None

    # A goal counted in units takes as many steps; one in parameters ends when nothing more needs to go.
    steps = int(problem.reduced.quota.sum()) if problem.reduced.exactly else problem.num_blocks
    for _ in track(range(steps), name, steps, show=progress):
        free = open_blocks(problem, removed)
        if not free:
            break
        found = costs(removed, free)
        best = int(np.argmin(found))
        removed, lowest = (*removed, free[best]), float(found[best])

    removed = tuple(sorted(removed))
    return Candidate(removed, name, problem.energy(removed), lowest)
