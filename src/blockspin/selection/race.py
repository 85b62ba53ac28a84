"""A race between removals: those that cannot win leave early, so that few are measured on all samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..problem import Removal, RemovalProblem
from .expectation import expectation
from .ledger import Ledger

SHARES = (8, 4, 2, 1)  # the rounds measure an eighth of the samples, a quarter, a half, all
LEAST = 4  # removals that stay in the race, however far they are behind
CLEARLY = 2.0  # standard errors of a difference beyond which a removal counts as worse


def race(ledger: Ledger, removals: Sequence[Removal], form: RemovalProblem | None = None) -> None:
    """Successive halving: measure all on an eighth of the samples, those still promising on a quarter, and so on.

    A removal leaves when it is in the worse half, or expected to be worse than the best by more than two standard
    errors of the difference; but a few stay to the end.

    form: of `expectation`: what is known of the removals besides the measurements.
    """
    num_samples = len(ledger.weights)
    rounds = sorted({max(1, num_samples // share) for share in SHARES})
    alive = sorted(dict.fromkeys(removals))

    for number in rounds:
        ledger.extend(alive, number)
        if number < num_samples:
            expected = expectation(ledger, alive, form)
            most = max(LEAST, math.ceil(len(alive) / 2))
            staying = min(most, max(LEAST, expected.num_promising(CLEARLY)))
            alive = [alive[k] for k in expected.ranked()[:staying]]
