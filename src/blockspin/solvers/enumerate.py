"""Every combination, one after the other: certain, and as fast as anything on small or featureless problems.

In colexicographic order the t-subsets of the first i variables are the first C(i, t) of all t-subsets. A removal is
written as a prefix of picks from the top down, then one variable i, then a t-subset s of the variables below i:

    E = E(prefix) + r_i + (R[s] + T_i[s]),   r = field of the prefix,   R[s] = energy of s in that field,
                                             T_i[s] = 2 sum over j in s of Q_ij, a table made once.

R serves every i of a prefix, and when a prefix grows by a pick p it becomes R[s] + T_p[s]: a removal costs about one
addition and one comparison, over long contiguous runs, in float32. What might be low enough is computed again in
float64.
"""

from __future__ import annotations

import numpy as np

from ..problem import Floats, Ints, RemovalProblem
from .compiled import compiled, compiled_for_scans
from .moves import Pool, Terms, empty_pool, insert, merge, offer_removal, pool_rows, terms_of, toggle, worst
from .relaxation import convex_shift
from .spectrum import SearchResult, Statistics
from .stopping import Stop
from .subsets import LANES, Plan, Singles, first_picks, make_plan
from .tabu import search
from .threads import in_threads

PER_SECOND, PER_SECOND_OF_BUDGET = 3e9, 1e7  # removals looked at, roughly
MOST_SECONDS = 600.0
SMALL = 10**6


def enumerate_all(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest of all allowed removals; nothing is proven if a time limit or Ctrl-C stops it.

    Raises ValueError, naming the count and the time, where that would take longer than the time limit or ten minutes.
    """
    count, every = problem.num_candidates, not problem.reduced.exactly
    seconds = count / (PER_SECOND if not every and not len(problem.reduced.least) else PER_SECOND_OF_BUDGET)
    if seconds > (MOST_SECONDS if time_limit is None else time_limit):
        raise ValueError(
            f"the solver 'enumerate' would look at {count:.3g} removals, for about {seconds:.3g} s; "
            "take the solver 'exact', or give it a longer time limit"
        )

    n = len(problem.reduced.block)
    pool, cut = empty_pool(states, n), np.array([np.inf])  # cut (1,): the energy to beat, shared between threads
    terms = terms_of(problem.reduced, problem.resolution)
    with Stop(time_limit) as stop:
        # A tabu search first: the lower the energy to beat, the fewer removals are computed again in float64.
        start, _ = search(problem, convex_shift(*terms[:7]).x, states, seed, 12 if count > SMALL else 1, stop)
        cut[0] = worst(start) + problem.resolution

        if every:
            in_threads(1, lambda task, own: every_subset(terms, own, stop.flag), pool, terms.resolution, stop)
        else:
            plan, spare = make_plan(terms), margin(terms)
            tasks = first_picks(plan)
            in_threads(
                len(tasks),
                lambda task, own: walk(terms, plan, tasks[task], own, cut, spare, stop.flag),
                pool,
                terms.resolution,
                stop,
            )

    statistics: Statistics = {"candidates": count}
    if stop.reason():
        merge(pool, start, problem.resolution)
        return SearchResult(pool_rows(pool, n), -np.inf, statistics | stop.reason())
    bound = pool.energy[-1] + problem.reduced.constant if pool.size[0] == states else np.inf
    return SearchResult(pool_rows(pool, n), bound, statistics)


def margin(terms: Terms) -> float:
    """A bound on the error of an energy summed in float32."""
    picks = float(terms.quota.sum())
    slopes = 2.0 * np.abs(terms.quadratic).sum(axis=1) + np.abs(terms.linear)
    return float(2.0**-23 * (picks + 4.0) * np.sort(slopes)[-int(picks) :].sum()) + terms.resolution


@compiled
def walk(terms: Terms, plan: Plan, first: Ints, pool: Pool, cut: Floats, spare: float, flag: Ints) -> None:
    """All removals that begin with these picks; offers the low ones to the pool. cut (1,) is shared between threads.

    The innermost functions get single arrays: to hand them whole tuples would cost more than what they do.
    """
    levels, n = len(plan.start), len(plan.variable)
    quadratic, table, place, after = plan.quadratic, plan.table, plan.place, plan.after
    run = plan.choose[:, plan.t].copy()  # (size + 1,) how many t-subsets lie below each variable

    # What each level of the prefix adds to: the state before its pick is in row `level`, that after it in the next.
    picks, energy = np.zeros(levels + 1, np.int64), np.zeros(levels + 1)
    field = np.zeros((levels + 1, n), np.float32)

    # No prefix that begins like this needs the sums beyond its first pick; whole rows would not stay in the cache.
    width = len(plan.sums)
    if levels:
        width = (run[min(first[0], plan.size) - after[0] - 1] + LANES - 1) // LANES * LANES
    sums = np.empty((levels + 1, width), np.float32)
    field[0], sums[0] = plan.field, plan.sums[:width]

    for level in range(len(first)):
        picks[level] = first[level]
        highest = min(first[level], plan.size) - after[level] - 1
        pick(quadratic, table, place, run, field, energy, sums, level, first[level], highest)

    # Depth first from there, every level counting its pick down to its start.
    level, fixed = len(first), len(first)
    if level < levels:
        picks[level] = picks[level - 1] if plan.follows[level] else plan.end[level]
    while level >= fixed and flag[0] == 0:
        if level == levels:
            top = picks[levels - 1] if plan.below else plan.size
            i = next_hit(table, place, run, field[levels], sums[levels], plan.t, top, cut[0] + spare - energy[levels])
            while i < top:
                offer_run(terms, plan, field[levels], energy[levels], sums[levels], picks, i, pool, cut, spare)
                limit = cut[0] + spare - energy[levels]
                i = next_hit(table, place, run, field[levels], sums[levels], i + 1, top, limit)
            level -= 1
            continue

        if picks[level] == plan.start[level]:
            level -= 1
            continue
        picks[level] -= 1

        # The later levels pick below this one, then comes i, and only then s.
        highest = min(picks[level], plan.size) - after[level] - 1
        pick(quadratic, table, place, run, field, energy, sums, level, picks[level], highest)
        level += 1
        if level < levels:
            picks[level] = picks[level - 1] if plan.follows[level] else plan.end[level]


@compiled
def pick(
    quadratic: Singles,
    table: Singles,
    place: Ints,
    run: Ints,
    field: Singles,
    energy: Floats,
    sums: Singles,
    level: int,
    i: int,
    highest: int,
) -> None:
    """Take variable i at this prefix level; the subsets s that follow lie below the variable `highest`."""
    energy[level + 1] = energy[level] + field[level, i]
    one, other, into = field[level], quadratic[i], field[level + 1]
    for j in range(len(into)):
        into[j] = one[j] + other[j]
    length = (run[highest] + LANES - 1) // LANES * LANES
    add(sums[level], table, np.uint64(place[i]), sums[level + 1], np.uint64(length))


@compiled
def add(one: Singles, table: Singles, begin: np.uint64, into: Singles, length: np.uint64) -> None:
    for s in range(length):
        into[s] = one[s] + table[begin + s]


@compiled_for_scans
def next_hit(
    table: Singles, place: Ints, run: Ints, field: Singles, sums: Singles, first: int, top: int, limit: float
) -> int:
    """The next variable i from first on, below top, that has a t-subset within the limit; top if there is none.

    Hits are counted in float32, which keeps the loop in vectors.
    """
    one, none = np.float32(1.0), np.float32(0.0)
    for i in range(first, top):
        most, begin, count = np.float32(limit - field[i]), np.uint64(place[i]), none
        for s in range(np.uint64((run[i] + LANES - 1) // LANES * LANES)):
            count += one if sums[s] + table[begin + s] <= most else none
        if count > 0:
            return i
    return top


@compiled
def offer_run(
    terms: Terms,
    plan: Plan,
    field: Singles,
    energy: float,
    sums: Singles,
    picks: Ints,
    i: int,
    pool: Pool,
    cut: Floats,
    spare: float,
) -> None:
    """Offer what is low enough among the removals of this prefix and i, and lower the cut."""
    limit = np.float32(cut[0] + spare - energy - field[i])
    table = plan.table[plan.place[i] :]
    for s in range(plan.choose[i, plan.t]):
        if sums[s] + table[s] <= limit:
            offer(terms, plan, picks, i, s, pool)
    cut[0] = min(cut[0], worst(pool))


@compiled
def offer(terms: Terms, plan: Plan, picks: Ints, i: int, s: int, pool: Pool) -> None:
    """Recompute one removal in float64 and offer it to the pool."""
    removed = np.empty(len(plan.start) + 1 + plan.t, np.int64)
    removed[: len(plan.start)] = picks[: len(plan.start)]
    removed[len(plan.start)] = i

    # The subset of rank s in colexicographic order: its largest variable is the largest j with C(j, t) <= s.
    j = plan.size
    for k in range(plan.t, 0, -1):
        while plan.choose[j, k] > s:
            j -= 1
        s -= plan.choose[j, k]
        removed[len(removed) - k] = j
    offer_removal(terms, plan.variable[removed], pool)


@compiled
def every_subset(terms: Terms, pool: Pool, flag: Ints) -> None:
    """All subsets that reach the budgets, depth first; the field of later variables follows those taken."""
    n, budgets = len(terms.linear), len(terms.least)
    field, energy, missing = np.zeros((n + 1, n)), np.zeros(n + 1), np.zeros((n + 1, budgets))
    field[0] = terms.linear + np.diag(terms.quadratic)
    missing[0] = terms.least

    # What the variables from i on have of every budget.
    left = np.zeros((n + 1, budgets))
    for i in range(n - 1, -1, -1):
        left[i] = left[i + 1] + terms.weight[:, i]

    bits, number = np.zeros(pool.bits.shape[1], np.uint64), 0
    tried = np.zeros(n + 1, np.int64)  # per depth: 0 nothing, 1 taken, 2 left out
    i = 0
    while i >= 0 and flag[0] == 0:
        if tried[i] == 1:
            toggle(bits, i)
            number -= 1

        # Back one variable: all are decided, both ways were tried, or a budget is out of reach.
        if i == n or tried[i] == 2 or np.any(missing[i] > left[i]):
            if i == n and number <= terms.quota[0] and np.all(missing[n] <= 0.0):
                insert(pool, energy[n], bits, terms.resolution)
            tried[i] = 0
            i -= 1
            continue

        # On with the next way: first with this variable taken, then without.
        taken = tried[i] == 0
        tried[i] += 1
        missing[i + 1], energy[i + 1] = missing[i], energy[i]
        field[i + 1, i + 1 :] = field[i, i + 1 :]
        if taken:
            toggle(bits, i)
            number += 1
            missing[i + 1] -= terms.weight[:, i]
            energy[i + 1] += field[i, i]
            field[i + 1, i + 1 :] += 2.0 * terms.quadratic[i, i + 1 :]
        i += 1
