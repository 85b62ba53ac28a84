"""Tabu search: always the best swap that was not just undone, from many starts.

The starts are random, or the solution of the semidefinite relaxation rounded after adding noise.

Every removal it evaluates, not only those it visits, is offered to the pool of the lowest, and at the end so are all
neighbours of those in the pool, which makes it a good finder of whole spectra. It proves nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, RemovalProblem
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
from .relaxation import convex_shift
from .spectrum import SearchResult, Statistics
from .stopping import Stop

RESTARTS = 60
STEPS_PER_VARIABLE = 8
SPARE = 8  # so many times the states asked for are kept, since the way from one low removal to another leads over these
NOISE = (0.0, 0.15, 0.3, 1.0)  # added to the relaxed solution in turn; the last is almost a random start


def tabu(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest removals seen in a fixed number of seeded restarts, or until the time limit."""
    n = len(problem.reduced.block)
    with Stop(time_limit) as stop:
        terms = terms_of(problem.reduced, problem.resolution)
        relaxed = convex_shift(*terms[:7]).x
        pool, restarts = search(problem, relaxed, SPARE * states, seed, RESTARTS, stop)
        add_neighbours(terms, pool, n, stop)

    statistics: Statistics = {"restarts": restarts, "steps": restarts * STEPS_PER_VARIABLE * n}
    return SearchResult(pool_rows(pool, n), -np.inf, statistics | stop.reason())


def search(
    problem: RemovalProblem, relaxed: Floats, states: int, seed: int, restarts: int, stop: Stop
) -> tuple[Pool, int]:
    """Tabu searches from many starts; returns the pool of the lowest removals and the number of starts made.

    relaxed (n,): the solution of the relaxation, to round.
    """
    n = len(problem.reduced.block)
    terms = terms_of(problem.reduced, problem.resolution)
    pool = empty_pool(states, n)
    rng = np.random.default_rng(seed)

    for done in range(restarts):
        if done and stop.expired():
            return pool, done
        score = relaxed + NOISE[done % len(NOISE)] * rng.normal(size=n)
        walk(terms, greedy_start(problem.reduced, score), STEPS_PER_VARIABLE * n, int(rng.integers(2**31)), pool)

    return pool, restarts


def add_neighbours(terms: Terms, pool: Pool, num_variables: int, stop: Stop) -> None:
    """Offer the neighbours of every removal in the pool, those that enter it included, until none is left to do."""
    looked_at: set[bytes] = set()
    while True:
        entered = [row for row in pool_rows(pool, num_variables) if row.tobytes() not in looked_at]
        if not entered:
            return
        for row in entered:
            if stop.expired():
                return
            looked_at.add(row.tobytes())
            walk(terms, row.astype(np.uint8), 1, 0, pool)


@compiled
def walk(terms: Terms, chosen: Chosen, steps: int, seed: int, pool: Pool) -> None:
    """One tabu search from a removal (n,), which it changes; offers every evaluated removal to the pool."""
    n = len(chosen)
    np.random.seed(seed)  # noqa: NPY002 (compiled code has only this generator)

    field, bits = np.empty(n), np.empty(pool.bits.shape[1], np.uint64)
    energy = energy_and_field(terms, chosen, field, bits)
    keep_neighbour(pool, energy, bits, -1, -1, terms.resolution)
    free_again = np.zeros(n + 1, np.int64)  # the step from which a variable may change; the last is that of "none"
    lowest = energy

    for step in range(steps):
        change, out, into = best_move(terms, chosen, field, bits, energy, free_again, step, lowest, pool)
        if out < 0 and into < 0:
            continue

        make_move(terms, chosen, field, bits, out, into)
        energy += change
        lowest = min(lowest, energy)

        # What just left stays out longer than what just entered stays in; at random, so as not to run in circles.
        tenure = 3 + n // 16
        if out >= 0:
            free_again[out] = step + tenure + np.random.randint(0, tenure)  # noqa: NPY002
        if into >= 0:
            free_again[into] = step + tenure // 2 + np.random.randint(0, tenure)  # noqa: NPY002


@compiled
def best_move(
    terms: Terms,
    chosen: Chosen,
    field: NDArray[np.float64],
    bits: NDArray[np.uint64],
    energy: float,
    free_again: NDArray[np.int64],
    step: int,
    lowest: float,
    pool: Pool,
) -> tuple[float, int, int]:
    """The best allowed move that is not tabu, or leads below the lowest energy; offers all to the pool."""
    ins, outs = members(chosen, 1, terms.exactly), members(chosen, 0, terms.exactly)
    totals, number = totals_of(terms, chosen), int(np.sum(chosen))
    best, best_out, best_into = np.inf, -1, -1
    cut = worst(pool)

    for out in ins:
        for into in outs:
            change = move_energy(terms.quadratic, field, out, into) if out >= 0 or into >= 0 else np.inf
            if change >= best and energy + change >= cut:
                continue
            if not move_allowed(terms, totals, number, out, into):
                continue

            if energy + change < cut:
                keep_neighbour(pool, energy + change, bits, out, into, terms.resolution)
                cut = worst(pool)

            # A tabu move is made all the same where it leads below everything seen in this search.
            free = free_again[out] <= step and free_again[into] <= step
            if change < best and (free or energy + change < lowest - terms.resolution):
                best, best_out, best_into = change, out, into

    return best, best_out, best_into


@compiled
def members(chosen: Chosen, value: int, exactly: bool) -> NDArray[np.int64]:
    """The variables of this value; where a move may be one-sided, also -1."""
    listed = np.flatnonzero(chosen == value)
    return listed if exactly else np.append(listed, -1)
