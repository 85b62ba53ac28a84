"""What is left of a problem below a node of branch and bound, and its convex form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints
from .moves import Terms, heavy_first
from .node import FREE, Assignment, Node, Relaxed, propagate, refresh
from .relaxation import Shift, convex_shift, even_shift

FIRST_STRIDE = 0.05  # of a price, before it is known better
EPSILON = float(np.finfo(np.float64).eps)


class Form(NamedTuple):
    """The convex form of what is open below a node, and where the walk below it starts."""

    relaxed: Relaxed
    node: Node


def decide(terms: Terms, assignment: Assignment) -> int:
    """Fix what the constraints force in assignment (n,); returns how many stay free, -1 if nothing is allowed."""
    t = terms
    return propagate(assignment, t.group, t.quota, t.exactly, t.weight, t.least, t.heavy, len(assignment))


class OpenPart(NamedTuple):
    """The energy and the constraints of the free variables, n of them, below a node."""

    block: Ints  # (n,) the problem's variables
    q: Floats  # (n, n)
    c: Floats  # (n,)
    constant: float  # what the variables decided before contribute
    group: Ints  # (n,) ascending
    quota: Floats  # (groups,) how many still go
    weight: Floats  # (budgets, n) of the budgets that still need something
    least: Floats  # (budgets,) what they need
    lacking: NDArray[np.bool_]  # (all budgets,) which they are


def open_part(terms: Terms, assignment: Assignment) -> OpenPart:
    """What is left of a problem where some variables are decided."""
    # The energy of the free variables: those that are removed add to its linear term and its constant.
    free, ones = np.flatnonzero(assignment == FREE), np.flatnonzero(assignment == 1)
    free = free[np.argsort(terms.group[free], kind="stable")]
    q = terms.quadratic[np.ix_(free, free)]
    c = terms.linear[free] + 2.0 * terms.quadratic[np.ix_(free, ones)].sum(axis=1)
    constant = float(terms.quadratic[np.ix_(ones, ones)].sum() + terms.linear[ones].sum())

    # How many of the groups that still have free variables go, and what the budgets still need.
    taken = np.bincount(terms.group[ones], minlength=len(terms.quota))
    open_groups, group = np.unique(terms.group[free], return_inverse=True)
    quota = (terms.quota - taken)[open_groups]
    weight, least = terms.weight[:, free], terms.least - terms.weight[:, ones].sum(axis=1)
    lacking = least > 0.0
    return OpenPart(free, q, c, constant, group, quota, weight[lacking], least[lacking], lacking)


def shift_below(terms: Terms, assignment: Assignment) -> Shift:
    """The shift that suits what is open below a node, over all n variables and budgets; zero where nothing is open."""
    part = open_part(terms, assignment)
    own = convex_shift(part.q, part.c, part.group, part.quota, terms.exactly, part.weight, part.least)
    n = len(assignment)
    shift = Shift(np.zeros(n), np.zeros(n), np.zeros(len(terms.least)))
    shift.d[part.block], shift.x[part.block], shift.price[part.lacking] = own
    return shift


def relaxed_below(terms: Terms, assignment: Assignment, shift: Shift | None = None) -> Form:
    """The convex form of what is open below a node, and its relaxed solution.

    shift: over all variables, of a node at which all that is open here was open; by default that of this node.
    """
    guard, part = 0.5 * terms.resolution, open_part(terms, assignment)
    q, c, group, quota, weight, least = part.q, part.c, part.group, part.quota, part.weight, part.least

    # d makes the energy convex and leaves it as it is on binaries. Where the best d has numbers so large that rounding
    # would spoil the bounds, the plainest one does.
    shift = shift or shift_below(terms, assignment)
    d, x, price = shift.d[part.block], shift.x[part.block], shift.price[part.lacking]
    if safe_steps(q - np.diag(d), c + d, guard) < 10:
        d = even_shift(q)
    a, b = q - np.diag(d), c + d

    # No price may weigh more than all slopes together, (budgets,), so that what it adds is rounded no worse.
    slopes = float(np.sum(np.abs(b) + 2.0 * np.abs(a).sum(axis=1)))
    dearest = slopes / np.maximum(least, weight.max(axis=1))
    heavy = heavy_first(group, weight)

    # Without exact counts a slack takes up what is left of the one group.
    top = np.ones(len(c))
    if not terms.exactly:
        a, b, group = np.pad(a, (0, 1)), np.append(b, 0.0), np.append(group, 0)
        weight = np.pad(weight, ((0, 0), (0, 1)))
        top, x = np.append(top, quota), np.append(x, max(0.0, quota[0] - x.sum()))

    relaxed = Relaxed(
        a=a,
        b=b,
        top=top,
        group=group,
        quota=quota,
        exactly=terms.exactly,
        weight=np.ascontiguousarray(weight),
        least=least,
        heavy=heavy,
        dearest=dearest,
        first=np.searchsorted(group, np.arange(len(quota) + 1)),
        diagonal=np.diag(a).copy(),
        num_binary=len(c),
        block=part.block,
        constant=part.constant,
        guard=guard,
        refresh=safe_steps(a, b, guard),
    )

    return Form(relaxed, _first_node(relaxed, x, np.minimum(price, dearest)))


def _first_node(relaxed: Relaxed, x: Floats, price: Floats) -> Node:
    """Nothing decided, at the relaxed solution x (v,) and its prices (budgets,)."""
    v = len(relaxed.b)
    node = Node(
        assignment=np.full(v, FREE, np.int8),
        z=x,
        gradient=np.zeros(v),
        order=np.argsort(relaxed.group, kind="stable"),
        price=price,
        stride=np.maximum(FIRST_STRIDE * price, 1e-6 * relaxed.dearest),
        steps=np.zeros(1, np.int64),
    )
    refresh(relaxed, node)
    return node


def safe_steps(a: Floats, b: Floats, guard: float) -> int:
    """After how many updates the rounding error of a gradient could still not lift a bound by more than the guard."""
    slope = float((np.abs(b) + 2.0 * np.abs(a).sum(axis=1)).max())
    return 1000 if slope == 0.0 else int(min(1000.0, guard / (4.0 * EPSILON * len(b) * slope)))
