"""Budgets of variables of few sorts, as numbers of each sort.

Attention and MLP sub-layers of one model have two sorts of costs. Then a budget is met by whole numbers of each sort
only, and its relaxation, which takes fractions, is far from it. The allowed numbers (m_1, m_2, ...) are all those that
reach one of a few least ones, the corners: (24, 14), (25, 13), ... Each corner is a problem of its own, "at least 24 of
the one and 14 of the other", whose relaxation is tight; a removal may belong to several.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..problem import Floats
from .moves import Terms, heavy_first

MOST_NUMBERS = 300_000  # combinations of numbers that are looked at
MOST_CORNERS = 200


class Corners(NamedTuple):
    """What the budgets of `terms` are there, and the `least` of each corner: (corners, budgets)."""

    terms: Terms
    least: Floats


def corners_of(terms: Terms) -> Corners:
    """The corners of budgets without exact counts, where there are few; else one, the budgets as they are."""
    as_it_is = Corners(terms, terms.least[None, :])
    if terms.exactly or not len(terms.least):
        return as_it_is
    columns, sort, size = np.unique(terms.weight, axis=1, return_inverse=True, return_counts=True)
    if np.prod(size + 1.0) > MOST_NUMBERS:
        return as_it_is

    # Whether each combination of numbers, an axis for each sort, reaches every budget.
    numbers = np.indices(tuple(size + 1)).reshape(len(size), -1)  # (sorts, combinations)
    enough = np.all(columns @ numbers >= terms.least[:, None], axis=0).reshape(tuple(size + 1))

    # A corner is one from which nothing can be left out.
    least = enough.copy()
    for axis in range(len(size)):
        one_less = np.zeros_like(enough)
        later = [slice(None)] * len(size)
        later[axis] = slice(1, None)
        one_less[tuple(later)] = np.delete(enough, -1, axis=axis)
        least &= ~one_less
    found = np.argwhere(least).astype(np.float64)  # (corners, sorts)
    if len(found) > MOST_CORNERS:
        return as_it_is

    # Every sort is a budget of its own; those that no corner needs are left out.
    weight = (sort.reshape(-1) == np.arange(len(size))[:, None]).astype(np.float64)  # (sorts, n)
    needed = found.max(axis=0) > 0
    weight, found = weight[needed], np.ascontiguousarray(found[:, needed])
    sorted_terms = terms._replace(weight=weight, least=found[0], heavy=heavy_first(terms.group, weight))
    return Corners(sorted_terms, found)
