"""Every combination, one after the other: certain, and unbeatable for small problems."""

from __future__ import annotations

import numpy as np

from ..problem import RemovalProblem
from .compiled import compiled
from .moves import Pool, Terms, empty_pool, insert, pool_rows, terms_of, toggle
from .spectrum import Found

LIMIT = 2 * 10**9


def enumerate_all(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> Found:
    """The lowest of all allowed removals. Raises ValueError where there are too many to look at."""
    count = problem.num_candidates
    if count > LIMIT:
        raise ValueError(f"enumerate would have to look at {count:.3g} removals; use solver='exact'")
    n = len(problem.reduced.block)
    pool = empty_pool(states, n)
    every_subset(terms_of(problem.reduced, problem.resolution), pool)
    bound = pool.energy[-1] + problem.reduced.constant if pool.size[0] == states else np.inf
    return Found(pool_rows(pool, n), bound, {"evaluated": count})


@compiled
def every_subset(terms: Terms, pool: Pool) -> None:
    """Depth first over the variables in order; the field of the later ones is updated as variables enter."""
    n = len(terms.linear)
    field = np.zeros((n + 1, n))
    field[0] = terms.linear + np.diag(terms.quadratic)
    energy, count, missing = np.zeros(n + 1), np.zeros(n + 1, np.int64), np.zeros((n + 1, len(terms.need)))
    missing[0] = terms.need
    left = np.zeros((n + 1, len(terms.need)))  # weight of the variables from i on
    for i in range(n - 1, -1, -1):
        left[i] = left[i + 1]
        left[i, terms.group[i]] += terms.weight[i]
    bits = np.zeros(pool.bits.shape[1], np.uint64)
    taken = np.full(n, -1, np.int64)  # per depth: 1, then 0, then back
    i = 0
    while i >= 0:
        if i == n:
            if np.all(missing[n] <= 0):
                insert(pool, energy[n], bits, 0.0)
            i -= 1
            continue
        g = terms.group[i]
        if taken[i] == 1:
            toggle(bits, i)
        taken[i] = 1 if taken[i] == -1 else taken[i] - 1
        if taken[i] == -1:
            i -= 1
            continue
        allowed = count[i] + taken[i] <= terms.max_removed
        missing[i + 1] = missing[i]
        missing[i + 1, g] -= taken[i] * terms.weight[i]
        if terms.equality and missing[i + 1, g] < 0:
            allowed = False
        if np.any(left[i + 1] < missing[i + 1]):
            allowed = False
        if taken[i] == 1:
            toggle(bits, i)
        if not allowed:
            continue
        count[i + 1] = count[i] + taken[i]
        energy[i + 1] = energy[i] + taken[i] * field[i, i]
        field[i + 1, i + 1 :] = field[i, i + 1 :] + 2.0 * taken[i] * terms.quadratic[i, i + 1 :]
        i += 1
