"""Every combination, one after the other: certain, and as fast as anything on small or featureless problems.

In colexicographic order the t-subsets of the first i variables are the first C(i, t) of all t-subsets. A removal is
written as a prefix of picks from the top down, then one variable i, then a t-subset s of the variables below i:

    E = E(prefix) + r_i + (R[s] + T_i[s]),   r = field of the prefix,   R[s] = energy of s in that field,
                                             T_i[s] = 2 sum over j in s of Q_ij, a table made once.

R is filled once per prefix and serves every i, so that a removal costs one addition and one comparison, over long
contiguous runs, in float32. What might be low enough is computed again in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints, RemovalProblem
from .compiled import compiled, compiled_for_scans
from .moves import Pool, Terms, empty_pool, insert, offer_removal, pool_rows, terms_of, toggle, worst
from .spectrum import Found, Statistics
from .stopping import Stop
from .tabu import search
from .threads import in_threads

PER_SECOND = 1e9  # removals looked at, roughly; a budget's walk makes a hundredth of it
MOST_SECONDS = 600.0
LANES = 32  # runs are filled up to a multiple of this with infinities
RUN = 300  # wanted length of a typical run
TABLE = 4_000_000  # at most so many entries in the tables
SMALL = 10**6
Singles = NDArray[np.float32]


class Plan(NamedTuple):
    """How the combinations are walked through; variables are renumbered so that the last group comes first."""

    variable: Ints  # (n,) of the reduced problem
    quadratic: Singles  # (n, n) twice Q
    start: Ints  # (levels,) lowest variable that a prefix level may pick, leaving enough for the levels below
    end: Ints  # (levels,) one more than the highest
    follows: NDArray[np.bool_]  # (levels,) whether it must pick below the level before
    below: bool  # whether i must lie below the last prefix level
    size: int  # number of variables in the last group
    t: int
    choose: Ints  # (size + 2, t + 2) binomials
    table: Singles  # T_i for subsets of every size up to t
    place: Ints  # (t + 1, size) where in table the run of each subset size and i begins


def enumerate_all(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> Found:
    """The lowest of all allowed removals; nothing is proven if a time limit or Ctrl-C stops it.

    Raises ValueError, naming the count and the time, where that would take longer than the time limit or ten minutes.
    """
    count, budget = problem.num_candidates, not problem.reduced.equality
    seconds = count / (PER_SECOND / 100 if budget else PER_SECOND)
    if seconds > (MOST_SECONDS if time_limit is None else time_limit):
        raise ValueError(
            f"solver='enumerate' would look at {count:.3g} removals, for about {seconds:.3g} s; "
            "use solver='exact', or give it a longer time_limit"
        )
    n = len(problem.reduced.block)
    pool, cut = empty_pool(states, n), np.array([np.inf])
    terms = terms_of(problem.reduced, problem.resolution)
    with Stop(time_limit) as stop:
        if count > SMALL:
            cut[0] = worst(search(problem, states, seed, 12, stop)[0]) + problem.resolution
        if budget:
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
        return Found(pool_rows(pool, n), -np.inf, statistics | stop.reason())
    bound = pool.energy[-1] + problem.reduced.constant if pool.size[0] == states else np.inf
    return Found(pool_rows(pool, n), bound, statistics)


def make_plan(terms: Terms) -> Plan:
    """Renumber the variables, choose t, and make the tables."""
    counts = np.bincount(terms.group)
    combinations = [math.comb(int(n), int(m)) for n, m in zip(counts, terms.need, strict=True)]
    last = int(np.argmax(combinations))
    groups = [last, *(g for g in range(len(counts)) if g != last)]
    variable = np.concatenate([np.flatnonzero(terms.group == g) for g in groups])
    quadratic = (2.0 * terms.quadratic[np.ix_(variable, variable)]).astype(np.float32)
    size, picks = int(counts[last]), int(terms.need[last])
    t = _subset_size(size, picks)
    levels: list[tuple[int, int, bool]] = []
    offset = size
    for g in groups[1:]:
        levels += _levels(offset, int(counts[g]), int(terms.need[g]), 0)
        offset += int(counts[g])
    levels += _levels(0, size, picks - t - 1, t + 1)
    choose = np.array([[math.comb(n, k) for k in range(t + 2)] for n in range(size + 2)], dtype=np.int64)
    table, place = _tables(quadratic[:size, :size], choose, t)
    return Plan(
        variable=variable,
        quadratic=quadratic,
        start=np.array([level[0] for level in levels], dtype=np.int64),
        end=np.array([level[1] for level in levels], dtype=np.int64),
        follows=np.array([level[2] for level in levels], dtype=np.bool_),
        below=picks - t - 1 > 0,
        size=size,
        t=t,
        choose=choose,
        table=table,
        place=place,
    )


def _levels(offset: int, size: int, picks: int, after: int) -> list[tuple[int, int, bool]]:
    """(start, end, follows) of the prefix levels that pick from one group, with so many picks of it after them."""
    return [(offset + picks - 1 - k + after, offset + size - k, k > 0) for k in range(picks)]


def _subset_size(size: int, picks: int) -> int:
    """The least t whose typical runs are long enough, within the table's limit."""
    t = 0
    while t < picks - 1 and math.comb(size, t + 3) <= TABLE:
        typical = (t + 1) * (size + 1) // (picks + 1)
        if math.comb(typical, t) >= RUN:
            break
        t += 1
    return t


def _tables(quadratic: Singles, choose: Ints, t: int) -> tuple[Singles, Ints]:
    """T_i[s] for every i and every subset s below i of up to t variables, each run filled up to whole lanes."""
    size = len(quadratic)
    place, parts, total = np.zeros((t + 1, size), np.int64), [], 0
    sums = [np.zeros((size, 1), np.float32)]  # per subset size: (size, C(size, k)), what i adds to each subset
    for k in range(1, t + 1):
        sums.append(
            np.concatenate([sums[k - 1][:, : choose[j, k - 1]] + quadratic[:, [j]] for j in range(size)], axis=1)
        )
    for k in range(t + 1):
        for i in range(size):
            run = sums[k][i, : choose[i, k]]
            place[k, i] = total
            parts += [run, np.full(-len(run) % LANES, np.inf, np.float32)]
            total += len(run) + -len(run) % LANES
    return np.concatenate(parts).astype(np.float32), place


def first_picks(plan: Plan) -> list[Ints]:
    """The tasks: all choices for the first two prefix levels, or as many as there are."""
    depth, found = min(2, len(plan.start)), [np.zeros(0, np.int64)]
    for level in range(depth):
        found = [
            np.append(picks, i)
            for picks in found
            for i in range(plan.start[level], picks[-1] if plan.follows[level] else plan.end[level])
        ]
    return found


def margin(terms: Terms) -> float:
    """More than the error of an energy summed in float32."""
    picks = float(terms.need.sum())
    slopes = 2.0 * np.abs(terms.quadratic).sum(axis=1) + np.abs(terms.linear)
    return float(2.0**-23 * (picks + 4.0) * np.sort(slopes)[-int(picks) :].sum()) + terms.resolution


@compiled
def walk(terms: Terms, plan: Plan, first: Ints, pool: Pool, cut: Floats, spare: float, flag: Ints) -> None:
    """All removals that begin with these picks; offers the low ones to the pool. cut (1,) is shared between threads."""
    levels, n = len(plan.start), len(plan.variable)
    picks, energy = np.zeros(levels + 1, np.int64), np.zeros(levels + 1)
    field = np.zeros((levels + 1, n), np.float32)
    for i in range(n):
        field[0, i] = terms.linear[plan.variable[i]] + terms.quadratic[plan.variable[i], plan.variable[i]]
    widest = plan.choose[plan.size, plan.t]
    sums = np.zeros((plan.t + 1, widest + 2 * LANES), np.float32)
    for level in range(len(first)):
        pick(plan, field, energy, picks, level, first[level])
    level, fixed = len(first), len(first)
    if level < levels:
        picks[level] = picks[level - 1] if plan.follows[level] else plan.end[level]
    while level >= fixed and flag[0] == 0:
        if level == levels:
            top = picks[levels - 1] if plan.below else plan.size
            scan(terms, plan, field[levels], energy[levels], picks, top, sums, pool, cut, spare)
            level -= 1
            continue
        if picks[level] == plan.start[level]:
            level -= 1
            continue
        pick(plan, field, energy, picks, level, picks[level] - 1)
        level += 1
        if level < levels:
            picks[level] = picks[level - 1] if plan.follows[level] else plan.end[level]


@compiled
def pick(plan: Plan, field: Singles, energy: Floats, picks: Ints, level: int, i: int) -> None:
    """Take variable i at this prefix level."""
    picks[level] = i
    energy[level + 1] = energy[level] + field[level, i]
    before, after, row = field[level], field[level + 1], plan.quadratic[i]
    for j in range(len(row)):
        after[j] = before[j] + row[j]


@compiled
def scan(
    terms: Terms,
    plan: Plan,
    field: Singles,
    energy: float,
    picks: Ints,
    top: int,
    sums: Singles,
    pool: Pool,
    cut: Floats,
    spare: float,
) -> None:
    """All removals with this prefix: i below top, and every t-subset below i."""
    t = plan.t
    sums[0, 0] = 0.0
    for k in range(1, t + 1):
        for j in range(k - 1, top - 1):
            fill(
                sums[k],
                plan.choose[j, k],
                sums[k - 1],
                plan.table,
                plan.place[k - 1, j],
                plan.choose[j, k - 1],
                field[j],
            )
    for i in range(t, top):
        cut[0] = min(cut[0], worst(pool))
        limit = np.float32(cut[0] + spare - energy - field[i])
        run = plan.choose[i, t]
        if lowest(sums[t], plan.table, plan.place[t, i], run) <= limit:
            for s in range(run):
                if sums[t, s] + plan.table[plan.place[t, i] + s] <= limit:
                    offer(terms, plan, picks, i, s, pool)


@compiled
def fill(sums: Singles, at: int, smaller: Singles, table: Singles, place: int, run: int, own: np.float32) -> None:
    """R of the subsets whose largest variable is one and the same, from R of those with a variable less."""
    length = (run + LANES - 1) // LANES * LANES
    into, of, more = sums[at : at + length], smaller[:length], table[place : place + length]
    for s in range(len(into)):
        into[s] = own + of[s] + more[s]


@compiled_for_scans
def lowest(sums: Singles, table: Singles, place: int, run: int) -> np.float32:
    """min over a run of R[s] + T_i[s]."""
    length = (run + LANES - 1) // LANES * LANES
    of, more = sums[:length], table[place : place + length]
    least = np.float32(np.inf)
    for s in range(len(of)):
        least = min(least, of[s] + more[s])
    return least


@compiled
def offer(terms: Terms, plan: Plan, picks: Ints, i: int, s: int, pool: Pool) -> None:
    """Recompute one removal in float64 and offer it to the pool."""
    removed = np.empty(len(plan.start) + 1 + plan.t, np.int64)
    removed[: len(plan.start)] = picks[: len(plan.start)]
    removed[len(plan.start)] = i
    j = plan.size
    for k in range(plan.t, 0, -1):
        while plan.choose[j, k] > s:
            j -= 1
        s -= plan.choose[j, k]
        removed[len(removed) - k] = j
    offer_removal(terms, plan.variable[removed], pool)


@compiled
def every_subset(terms: Terms, pool: Pool, flag: Ints) -> None:
    """All subsets that reach a budget, depth first; the field of later variables follows those taken."""
    n = len(terms.linear)
    field, energy, missing = np.zeros((n + 1, n)), np.zeros(n + 1), np.zeros(n + 1)
    field[0] = terms.linear + np.diag(terms.quadratic)
    missing[0] = terms.need[0]
    left = np.append(np.cumsum(terms.weight[::-1])[::-1], 0.0)  # weight of the variables from i on
    bits, count = np.zeros(pool.bits.shape[1], np.uint64), 0
    tried = np.zeros(n + 1, np.int64)  # per depth: 0 nothing, 1 taken, 2 left out
    i = 0
    while i >= 0 and flag[0] == 0:
        if tried[i] == 1:
            toggle(bits, i)
            count -= 1
        if i == n or tried[i] == 2 or missing[i] > left[i]:
            if i == n and missing[n] <= 0.0 and count <= terms.max_removed:
                insert(pool, energy[n], bits, terms.resolution)
            tried[i] = 0
            i -= 1
            continue
        taken = tried[i] == 0
        tried[i] += 1
        missing[i + 1], energy[i + 1] = missing[i], energy[i]
        field[i + 1, i + 1 :] = field[i, i + 1 :]
        if taken:
            toggle(bits, i)
            count += 1
            missing[i + 1] -= terms.weight[i]
            energy[i + 1] += field[i, i]
            field[i + 1, i + 1 :] += 2.0 * terms.quadratic[i, i + 1 :]
        i += 1
