"""A race between removals: those that cannot win leave early, so that few are measured on all samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..problem import Removal
from .ledger import Ledger

SHARES = (8, 4, 2, 1)  # the rounds measure an eighth of the samples, a quarter, a half, all
CLEARLY = 2.0  # standard errors of a paired difference beyond which a removal counts as worse


def race(ledger: Ledger, removals: Sequence[Removal]) -> None:
    """Successive halving: measure all on an eighth of the samples, those still promising on a quarter, and so on.

    A removal leaves when it is worse than the best by more than two standard errors of the difference on the same
    samples, or when it is in the worse half.
    """
    num_samples = len(ledger.weights)
    rounds = sorted({max(1, num_samples // share) for share in SHARES})
    alive = list(dict.fromkeys(removals))

    for number in rounds:
        ledger.extend(alive, number)
        if number == num_samples:
            break

        ranked = sorted(alive, key=lambda removed: (ledger.mean(removed, number), removed))
        promising = []
        for removed in ranked:
            above, error = ledger.difference(removed, ranked[0])
            if above <= CLEARLY * error:
                promising.append(removed)
        alive = promising[: max(2, math.ceil(len(ranked) / 2))]
