"""What the searches share, compiled: the pool of lowest removals, the energy of moves, and the making of moves.

A move takes block i out of the removal, puts block j in, or both; -1 stands for "none". The field f (n,) holds what
setting a variable to 1 adds to the energy, whatever it is now: f_i = Q_ii + c_i + 2 sum over s != i of Q_si y_s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints, Reduced, completion
from ..problem.constraints import met
from .compiled import compiled

Bits = NDArray[np.uint64]
Chosen = NDArray[np.uint8]  # (n,) of a removal: 1 = removed


class Terms(NamedTuple):
    """The reduced problem as compiled code takes it; energies there leave out the constant."""

    quadratic: Floats  # (n, n)
    linear: Floats  # (n,)
    group: Ints  # (n,)
    quota: Floats  # (groups,)
    exactly: bool
    weight: Floats  # (budgets, n)
    least: Floats  # (budgets,)
    heavy: Ints  # (budgets, n) the variables by group, in each the heaviest first
    resolution: float


class Pool(NamedTuple):
    """The lowest distinct removals seen, ascending; the first size[0] places are taken."""

    energy: Floats  # (k,)
    bits: Bits  # (k, words): variable i is bit i % 64 of word i // 64
    size: Ints  # (1,)


def terms_of(reduced: Reduced, resolution: float) -> Terms:
    """The arrays of a reduced problem, for compiled code."""
    r = reduced
    return Terms(
        quadratic=r.quadratic,
        linear=r.linear,
        group=r.group,
        quota=r.quota,
        exactly=r.exactly,
        weight=np.ascontiguousarray(r.weight),
        least=r.least,
        heavy=heavy_first(r.group, r.weight),
        resolution=resolution,
    )


def heavy_first(group: Ints, weight: Floats) -> Ints:
    """The variables by group, in each the heaviest first, for every budget: (budgets, n)."""
    order: Ints = np.lexsort((-weight, np.broadcast_to(group, weight.shape)))
    return order


def empty_pool(places: int, num_variables: int) -> Pool:
    words = (num_variables + 63) // 64
    return Pool(np.full(places, np.inf), np.zeros((places, words), np.uint64), np.zeros(1, np.int64))


def copied(pool: Pool) -> Pool:
    return Pool(pool.energy.copy(), pool.bits.copy(), pool.size.copy())


def merge(pool: Pool, other: Pool, resolution: float) -> None:
    """Offer everything in another pool to this one."""
    for place in range(other.size[0]):
        insert(pool, other.energy[place], other.bits[place], resolution)


def pool_rows(pool: Pool, num_variables: int) -> NDArray[np.bool_]:
    """The pool's removals as rows (K, n), each once."""
    taken = pool.bits[: pool.size[0]]
    columns = np.arange(num_variables)
    rows = (taken[:, columns // 64] >> (columns % 64).astype(np.uint64)) & np.uint64(1)
    return np.unique(rows.astype(bool), axis=0)


def greedy_start(reduced: Reduced, score: Floats) -> Chosen:
    """An allowed removal (n,) of variables with high scores (n,).

    Where those miss a budget, the scores are mixed with what the variables give to the budgets, more and more of it.
    """
    n = len(score)
    shares = reduced.weight / np.maximum(reduced.weight.sum(axis=1, keepdims=True), 1.0)  # (budgets, n)
    lift = n * np.ptp(score) * shares.sum(axis=0)  # (n,) about as large as the scores
    for mixed in (0.0, 0.3, 1.0, 3.0, 10.0):
        chosen = _fill(reduced, np.argsort(-score - mixed * lift, kind="stable"))
        if met(reduced, chosen.astype(bool)):
            return chosen

    row = completion(reduced, np.zeros(n, dtype=bool))
    assert row is not None, "a problem has an allowed removal"
    return row.astype(np.uint8)


def _fill(reduced: Reduced, order: Ints) -> Chosen:
    """Take variables in this order as long as their group has room; without exact counts, until all budgets are met."""
    chosen, room = np.zeros(len(order), np.uint8), reduced.quota.copy()
    missing = reduced.least.copy()
    for i in order:
        if not reduced.exactly and np.all(missing <= 0):
            break
        if room[reduced.group[i]] > 0:
            chosen[i] = 1
            room[reduced.group[i]] -= 1
            missing -= reduced.weight[:, i]
    return chosen


@compiled
def worst(pool: Pool) -> float:
    """The energy to beat: the highest in the pool, infinite while there is room."""
    return float(pool.energy[-1]) if pool.size[0] == len(pool.energy) else np.inf


@compiled
def insert(pool: Pool, energy: float, bits: Bits, resolution: float) -> bool:
    """Keep this removal if it is low enough and new; energies of one removal may differ by the resolution."""
    places, size = len(pool.energy), pool.size[0]
    if size == places and energy >= pool.energy[places - 1]:
        return False

    # Known already? Then it is among those of nearly the same energy, on either side of its place.
    at = np.searchsorted(pool.energy[:size], energy, side="right")
    for step in (-1, 1):
        other = at - 1 if step < 0 else at
        while 0 <= other < size and abs(pool.energy[other] - energy) <= resolution:
            if np.all(pool.bits[other] == bits):
                return False
            other += step

    # Make room: the places from it on move up by one, the last falls out if all are taken.
    last = size if size < places else places - 1
    for place in range(last, at, -1):
        pool.energy[place] = pool.energy[place - 1]
        pool.bits[place] = pool.bits[place - 1]
    pool.energy[at] = energy
    pool.bits[at] = bits
    pool.size[0] = last + 1
    return True


@compiled
def offer_removal(terms: Terms, removed: Ints, pool: Pool) -> None:
    """Offer the removal of these variables to the pool if it meets the budgets, with its energy summed from scratch."""
    for k in range(len(terms.least)):
        total = 0.0
        for i in removed:
            total += terms.weight[k, i]
        if total < terms.least[k]:
            return

    bits = np.zeros(pool.bits.shape[1], np.uint64)
    energy = 0.0
    for i in removed:
        bits[i >> 6] ^= np.uint64(1) << np.uint64(i & 63)
        energy += terms.linear[i]
        for j in removed:
            energy += terms.quadratic[i, j]
    insert(pool, energy, bits, terms.resolution)


@compiled
def toggle(bits: Bits, variable: int) -> None:
    bits[variable >> 6] ^= np.uint64(1) << np.uint64(variable & 63)


@compiled
def energy_and_field(terms: Terms, chosen: Chosen, field: Floats, bits: Bits) -> float:
    """Energy of a removal from scratch; writes its field (n,) and its bits (words,)."""
    n = len(field)
    energy = 0.0
    bits[:] = 0
    for i in range(n):
        field[i] = terms.linear[i] + terms.quadratic[i, i]

    # Removed one after the other, each for what the field says at that moment.
    for s in range(n):
        if chosen[s]:
            energy += field[s]
            toggle(bits, s)
            shift_field(terms.quadratic, field, s, 2.0)
    return energy


@compiled
def shift_field(quadratic: Floats, field: Floats, variable: int, amount: float) -> None:
    """The field after a variable enters (amount 2) or leaves (amount -2); its own entry stays."""
    own = field[variable]
    for j in range(len(field)):
        field[j] += amount * quadratic[variable, j]
    field[variable] = own


@compiled
def move_energy(quadratic: Floats, field: Floats, out: int, into: int) -> float:
    """What a move adds to the energy."""
    if out < 0:
        return float(field[into])
    if into < 0:
        return -float(field[out])
    return float(field[into] - field[out] - 2.0 * quadratic[out, into])


@compiled
def move_allowed(terms: Terms, totals: Floats, number: int, out: int, into: int) -> bool:
    """Whether a move leads from an allowed removal, of these totals (budgets,) and this number, to another."""
    if terms.exactly:
        if out < 0 or into < 0 or terms.group[out] != terms.group[into]:
            return False
    elif number - (out >= 0) + (into >= 0) > terms.quota[0]:
        return False

    for k in range(len(totals)):
        total = totals[k]
        if out >= 0:
            total -= terms.weight[k, out]
        if into >= 0:
            total += terms.weight[k, into]
        if total < terms.least[k]:
            return False
    return True


@compiled
def totals_of(terms: Terms, chosen: Chosen) -> Floats:
    """What a removal (n,) has of every budget: (budgets,)."""
    totals = np.zeros(len(terms.least))
    for k in range(len(totals)):
        totals[k] = np.sum(terms.weight[k] * chosen)
    return totals


@compiled
def make_move(terms: Terms, chosen: Chosen, field: Floats, bits: Bits, out: int, into: int) -> None:
    if out >= 0:
        chosen[out] = 0
        toggle(bits, out)
        shift_field(terms.quadratic, field, out, -2.0)
    if into >= 0:
        chosen[into] = 1
        toggle(bits, into)
        shift_field(terms.quadratic, field, into, 2.0)


@compiled
def keep_neighbour(pool: Pool, energy: float, bits: Bits, out: int, into: int, resolution: float) -> None:
    """Offer the removal that a move leads to, of this energy, to the pool; bits are those before the move."""
    after = bits.copy()
    if out >= 0:
        toggle(after, out)
    if into >= 0:
        toggle(after, into)
    insert(pool, energy, after, resolution)
