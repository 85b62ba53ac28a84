"""A race between removals: those that cannot win leave early, so that few are measured on all samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..problem import Removal
from .ledger import Ledger


def race(ledger: Ledger, removals: Sequence[Removal]) -> None:
    """Successive halving: measure all on an eighth of the samples, those still promising on a quarter, and so on.

    A removal leaves when it is worse than the best by more than two standard errors of the difference on the same
    samples, or when it is in the worse half.
    """
    number = len(ledger.weights)
    alive = list(dict.fromkeys(removals))
    for rung in sorted({max(1, number // share) for share in (8, 4, 2, 1)}):
        ledger.extend(alive, rung)
        ranked = sorted(alive, key=lambda removed: (ledger.mean(removed, rung), removed))
        apart = [ledger.difference(removed, ranked[0]) for removed in ranked]
        promising = [removed for removed, (mean, error) in zip(ranked, apart, strict=True) if mean <= 2 * error]
        alive = promising[: max(2, math.ceil(len(ranked) / 2))] if rung < number else alive
