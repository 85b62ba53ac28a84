"""How all combinations are walked through, and the tables of the energies of small subsets; see `enumerate`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Ints
from .moves import Terms

LANES = 32  # runs are filled up to a multiple of this with infinities
PER_PREFIX = 250  # wanted number of removals per prefix
TABLE = 5_000_000  # at most so many entries in the table
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
