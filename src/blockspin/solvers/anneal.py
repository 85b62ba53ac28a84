"""Simulated annealing with the moves of the tabu search: swaps that keep every count. It proves nothing."""

from __future__ import annotations

import numpy as np

from ..problem import RemovalProblem
from .compiled import compiled
from .moves import (
    Chosen,
    Pool,
    Terms,
    empty_pool,
    energy_and_field,
    greedy_start,
    keep_neighbour,
    make_move,
    move_allowed,
    move_energy,
    pool_rows,
    terms_of,
    totals_of,
    worst,
)
from .spectrum import SearchResult, Statistics
from .stopping import Stop

RUNS = 40
PROPOSALS_PER_VARIABLE = 2000
COLDEST = 1e-3  # last temperature as a share of the first


def anneal(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest removals seen in a fixed number of seeded runs from random starts, or until the time limit."""
    n = len(problem.reduced.block)
    terms, pool = terms_of(problem.reduced, problem.resolution), empty_pool(states, n)
    rng = np.random.default_rng(seed)

    with Stop(time_limit) as stop:
        for run in range(RUNS):
            if run and stop.expired():
                break
            chosen = greedy_start(problem.reduced, rng.normal(size=n))
            cool(terms, chosen, PROPOSALS_PER_VARIABLE * n, int(rng.integers(2**31)), pool)

    statistics: Statistics = {"proposals": RUNS * PROPOSALS_PER_VARIABLE * n}
    return SearchResult(pool_rows(pool, n), -np.inf, statistics | stop.reason())


@compiled
def cool(terms: Terms, chosen: Chosen, proposals: int, seed: int, pool: Pool) -> None:
    """One run at geometrically falling temperature from a removal (n,), which it changes."""
    np.random.seed(seed)  # noqa: NPY002 (compiled code has only this generator)

    field, bits = np.empty(len(chosen)), np.empty(pool.bits.shape[1], np.uint64)
    energy = energy_and_field(terms, chosen, field, bits)
    keep_neighbour(pool, energy, bits, -1, -1, terms.resolution)
    totals, number = totals_of(terms, chosen), int(np.sum(chosen))

    # From the spread of what single variables add, down to a share of it.
    temperature = np.max(field) - np.min(field)
    factor = COLDEST ** (1.0 / proposals)

    for _ in range(proposals):
        temperature *= factor
        out, into = propose(chosen, terms.exactly)
        if (out < 0 and into < 0) or not move_allowed(terms, totals, number, out, into):
            continue

        # Every proposal is looked at for the pool, whether it is accepted or not.
        change = move_energy(terms.quadratic, field, out, into)
        if energy + change < worst(pool):
            keep_neighbour(pool, energy + change, bits, out, into, terms.resolution)

        if change > 0.0 and np.random.random() >= np.exp(-change / temperature):  # noqa: NPY002
            continue
        make_move(terms, chosen, field, bits, out, into)
        energy += change
        number += (1 if into >= 0 else 0) - (1 if out >= 0 else 0)
        for k in range(len(totals)):
            totals[k] += (terms.weight[k, into] if into >= 0 else 0.0) - (terms.weight[k, out] if out >= 0 else 0.0)


@compiled
def propose(chosen: Chosen, exactly: bool) -> tuple[int, int]:
    """A random move (out, into): a swap of two variables, or without exact counts also a change of one."""
    one, other = np.random.randint(0, len(chosen)), np.random.randint(0, len(chosen))  # noqa: NPY002
    if not exactly and np.random.random() < 0.5:  # noqa: NPY002
        return (one, -1) if chosen[one] else (-1, one)
    if chosen[one] == chosen[other]:
        return -1, -1
    return (one, other) if chosen[one] else (other, one)
