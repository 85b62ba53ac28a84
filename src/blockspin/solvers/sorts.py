"""Budgets as exact numbers of each sort of units, for which the bounds are strong.

Attention and MLP sub-layers of one model have two sorts of costs. Which removals meet a budget depends only on how many
of each sort go, so the allowed ones fall into cells: (24 attention, 14 MLP), (25, 13), (25, 14), ... In a cell
the numbers are exact, and its relaxation is much tighter than that of the budget.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..problem import Floats
from .moves import Terms, heavy_first

MOST_CELLS = 50_000
FEWEST = 4  # units that a sort must have in the mean


class Cells(NamedTuple):
    """The problem with exact numbers of each group, and the numbers in every cell: (cells, groups)."""

    terms: Terms
    numbers: Floats


def cells_of(terms: Terms) -> Cells:
    """The cells that allowed removals fall into, where there are few sorts; else one, the problem as it is."""
    as_it_is = Cells(terms, terms.quota[None, :])
    if not len(terms.least):
        return as_it_is

    # Units of one sort belong to one group, and have the same weight in every budget.
    columns = np.vstack([terms.group, terms.weight])  # (1 + budgets, n)
    sorts, sort, size = np.unique(columns, axis=1, return_inverse=True, return_counts=True)
    if len(size) * FEWEST > len(terms.group) or np.prod(size + 1.0) > MOST_CELLS:
        return as_it_is

    # Every combination of numbers of each sort, and how many that makes of each group.
    numbers = np.indices(tuple(size + 1)).reshape(len(size), -1)  # (sorts, combinations)
    in_group = (sorts[0] == np.arange(len(terms.quota))[:, None]) @ numbers  # (groups, combinations)
    quota = terms.quota[:, None]
    allowed = np.all(in_group == quota if terms.exactly else in_group <= quota, axis=0)
    allowed &= np.all(sorts[1:] @ numbers >= terms.least[:, None], axis=0)
    cells = np.ascontiguousarray(numbers[:, allowed].T, dtype=np.float64)

    # The numbers say it all: no budget is left.
    group, weight = sort.reshape(-1).astype(np.int64), terms.weight[:0]
    heavy = heavy_first(group, weight)
    split = terms._replace(group=group, quota=cells[0], exactly=True, weight=weight, least=terms.least[:0], heavy=heavy)
    return Cells(split, cells)
