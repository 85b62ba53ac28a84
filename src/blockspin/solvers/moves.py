"""What the searches share, compiled: the pool of lowest removals, the energy of moves, and the making of moves.

A move takes block i out of the removal, puts block j in, or both; -1 stands for "none". The field f (n,) holds what
setting a variable to 1 adds to the energy, whatever it is now: f_i = Q_ii + c_i + 2 sum over s != i of Q_si y_s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints, Reduced
from .compiled import compiled

Bits = NDArray[np.uint64]


class Terms(NamedTuple):
    """The reduced problem as compiled code takes it; energies there leave out the constant."""

    quadratic: Floats  # (n, n)
    linear: Floats  # (n,)
    group: Ints  # (n,)
    weight: Floats  # (n,)
    need: Floats  # (number of groups,)
    equality: bool
    max_removed: int
    resolution: float


class Pool(NamedTuple):
    """The lowest distinct removals seen, ascending; the first size[0] places are taken."""

    energy: Floats  # (k,)
    bits: Bits  # (k, words): variable i is bit i % 64 of word i // 64
    size: Ints  # (1,)


def terms_of(reduced: Reduced, resolution: float) -> Terms:
    """The arrays of a reduced problem, for compiled code."""
    r = reduced
    return Terms(r.quadratic, r.linear, r.group, r.weight, r.need, r.equality, r.max_removed, resolution)


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


def greedy_start(reduced: Reduced, score: Floats) -> NDArray[np.uint8]:
    """An allowed removal (n,) of variables with high scores (n,)."""
    chosen = _fill(reduced, np.argsort(-score, kind="stable"))

    # Under a budget the wanted variables may be too light before the removal is full: the heaviest reach it.
    if np.any(np.bincount(reduced.group, reduced.weight * chosen, len(reduced.need)) < reduced.need):
        chosen = _fill(reduced, np.argsort(-reduced.weight, kind="stable"))
    return chosen


def _fill(reduced: Reduced, order: Ints) -> NDArray[np.uint8]:
    """Take variables in this order as long as their group lacks weight and the removal may grow."""
    chosen, missing = np.zeros(len(order), np.uint8), reduced.need.copy()
    for i in order:
        if missing[reduced.group[i]] > 0 and chosen.sum() < reduced.max_removed:
            chosen[i] = 1
            missing[reduced.group[i]] -= reduced.weight[i]
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
    """Offer the removal of these variables to the pool, with its energy summed from scratch."""
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
def energy_and_field(terms: Terms, chosen: NDArray[np.uint8], field: Floats, bits: Bits) -> float:
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
def move_allowed(terms: Terms, total: float, count: int, out: int, into: int) -> bool:
    """Whether a move leads from an allowed removal, of this weight and count, to another."""
    if terms.equality:
        return out >= 0 and into >= 0 and terms.group[out] == terms.group[into]

    if out >= 0:
        total -= terms.weight[out]
        count -= 1
    if into >= 0:
        total += terms.weight[into]
        count += 1

    return total >= terms.need[0] and count <= terms.max_removed


@compiled
def make_move(terms: Terms, chosen: NDArray[np.uint8], field: Floats, bits: Bits, out: int, into: int) -> None:
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
