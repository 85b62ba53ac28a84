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

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints, RemovalProblem
from .compiled import compiled, compiled_for_scans
from .moves import Pool, Terms, empty_pool, insert, merge, offer_removal, pool_rows, terms_of, toggle, worst
from .spectrum import SearchResult, Statistics
from .stopping import Stop
from .tabu import search
from .threads import in_threads

PER_SECOND, PER_SECOND_OF_BUDGET = 3e9, 1e7  # removals looked at, roughly
MOST_SECONDS = 600.0
LANES = 32  # runs are filled up to a multiple of this with infinities
PER_PREFIX = 250  # wanted number of removals per prefix
TABLE = 5_000_000  # at most so many entries in the table
SMALL = 10**6
Singles = NDArray[np.float32]


class Plan(NamedTuple):
    """How the combinations are walked through; variables are renumbered so that the last group comes first."""

    variable: Ints  # (n,) of the reduced problem
    quadratic: Singles  # (n, n) twice Q
    start: Ints  # (levels,) lowest variable that a prefix level may pick, leaving enough for the levels below
    end: Ints  # (levels,) one more than the highest
    follows: NDArray[np.bool_]  # (levels,) whether it must pick below the level before
    after: Ints  # (levels,) how many levels that pick from the last group come after it
    below: bool  # whether i must lie below the last prefix level
    size: int  # number of variables in the last group
    t: int
    field: Singles  # (n,) of the empty prefix
    sums: Singles  # R of the empty prefix
    choose: Ints  # (size + 1, t + 1) binomials
    table: Singles  # T_i[s] of every i and every t-subset s of the last group's variables below i
    place: Ints  # (n,) where in table the run of each i begins


def enumerate_all(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest of all allowed removals; nothing is proven if a time limit or Ctrl-C stops it.

    Raises ValueError, naming the count and the time, where that would take longer than the time limit or ten minutes.
    """
    count, every = problem.num_candidates, not problem.reduced.exactly
    seconds = count / (PER_SECOND if not every and not len(problem.reduced.least) else PER_SECOND_OF_BUDGET)
    if seconds > (MOST_SECONDS if time_limit is None else time_limit):
        raise ValueError(
            f"solver='enumerate' would look at {count:.3g} removals, for about {seconds:.3g} s; "
            "use solver='exact', or give it a longer time_limit"
        )

    n = len(problem.reduced.block)
    pool, cut = empty_pool(states, n), np.array([np.inf])  # cut (1,): the energy to beat, shared between threads
    terms = terms_of(problem.reduced, problem.resolution)
    with Stop(time_limit) as stop:
        # A tabu search first: the lower the energy to beat, the fewer removals are computed again in float64.
        start, _ = search(problem, states, seed, 12 if count > SMALL else 1, stop)
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


def make_plan(terms: Terms) -> Plan:
    """Renumber the variables, choose t, and make the tables."""
    # The group with the most combinations comes last in the removal, where a step costs least.
    counts = np.bincount(terms.group)
    combinations = list(map(math.comb, counts.tolist(), terms.quota.astype(int).tolist()))
    last = combinations.index(max(combinations))
    groups = [last, *range(last), *range(last + 1, len(counts))]
    variable = np.concatenate([np.flatnonzero(terms.group == g) for g in groups])
    quadratic = (2.0 * terms.quadratic[np.ix_(variable, variable)]).astype(np.float32)
    size, picks = int(counts[last]), int(terms.quota[last])
    t = _subset_size(size, picks)

    # The levels of the prefix: first the other groups, then what the last one needs besides i and its t-subset.
    levels: list[tuple[int, int, bool]] = []
    offset = size
    for g in groups[1:]:
        levels += _levels(offset, int(counts[g]), int(terms.quota[g]), 0)
        offset += int(counts[g])
    own = picks - t - 1
    levels += _levels(0, size, own, t + 1)

    choose = _binomials(size, t)
    field = (terms.linear + np.diag(terms.quadratic))[variable].astype(np.float32)
    table, place = _table(quadratic, size, t)
    start, end, follows = np.array(levels, dtype=np.int64).reshape(-1, 3).T.copy()  # (levels,) each
    return Plan(
        variable=variable,
        quadratic=quadratic,
        start=start,
        end=end,
        follows=follows.astype(np.bool_),
        after=np.minimum(own, np.arange(len(levels))[::-1]),
        below=own > 0,
        size=size,
        t=t,
        field=field,
        sums=_subset_energies(quadratic[:size, :size], field[:size], t),
        choose=choose,
        table=table,
        place=place,
    )


def _levels(offset: int, size: int, picks: int, after: int) -> list[tuple[int, int, bool]]:
    """(start, end, follows) of the prefix levels that pick from one group, with so many picks of it after them."""
    return [(offset + picks - 1 - k + after, offset + size - k, k > 0) for k in range(picks)]


def _subset_size(size: int, picks: int) -> int:
    """The least t that leaves few enough prefixes, within the table's limit."""
    t = 0
    while t < picks - 1 and math.comb(size + 1, t + 2) <= TABLE:
        if math.comb(size, picks) >= PER_PREFIX * math.comb(size - t - 1, picks - t - 1):
            break
        t += 1
    return t


def _table(quadratic: Singles, size: int, t: int) -> tuple[Singles, Ints]:
    """T_i[s] for every i, each run filled up to whole lanes, and where each begins."""
    padded: list[Singles] = []
    place = np.zeros(len(quadratic), np.int64)
    length = 0
    for i in range(len(quadratic)):
        run = _subset_sums(quadratic[i, : min(i, size)], t)  # (C(i, t),)
        run = np.append(run, np.full(-len(run) % LANES, np.inf, np.float32))
        padded.append(run)
        place[i] = length
        length += len(run)
    return np.concatenate(padded), place


def _binomials(size: int, t: int) -> Ints:
    """C(n, k) for every n up to size and k up to t: (size + 1, t + 1)."""
    choose = np.zeros((size + 1, t + 1), np.int64)
    choose[:, 0] = 1
    for n in range(1, size + 1):
        choose[n, 1:] = choose[n - 1, 1:] + choose[n - 1, :-1]
    return choose


def _subset_sums(values: Singles, t: int) -> Singles:
    """The sum over every t-subset of values (m,), in colexicographic order: (C(m, t),)."""
    sums = np.zeros(1, np.float32)
    for k in range(1, t + 1):
        # A k-subset is its largest value j and a (k - 1)-subset of those below j, which come first.
        parts = [sums[:0]]
        for j in range(k - 1, len(values)):
            parts.append(sums[: math.comb(j, k - 1)] + values[j])
        sums = np.concatenate(parts)
    return sums


def _subset_energies(quadratic: Singles, field: Singles, t: int) -> Singles:
    """R[s] for the empty prefix, followed by a lane of zeros."""
    sums = np.zeros(1, np.float32)
    for k in range(1, t + 1):
        # As above, with the pairs that j makes with the smaller subset.
        parts = [sums[:0]]
        for j in range(k - 1, len(quadratic)):
            smaller = sums[: math.comb(j, k - 1)]
            parts.append(smaller + field[j] + _subset_sums(quadratic[j, :j], k - 1))
        sums = np.concatenate(parts)
    return np.concatenate([sums, np.zeros(LANES, np.float32)])


def first_picks(plan: Plan) -> list[Ints]:
    """The tasks: all choices for the first two prefix levels, or as many as there are."""
    found = [np.zeros(0, np.int64)]
    for level in range(min(2, len(plan.start))):
        longer = []
        for picks in found:
            end = picks[-1] if plan.follows[level] else plan.end[level]
            longer += [np.append(picks, i) for i in range(plan.start[level], end)]
        found = longer
    return found


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
