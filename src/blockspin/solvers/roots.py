"""Where branch and bound begins: a root for each cell of the constraints that bounds leave open."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..problem import Floats
from .bounds import tighten, value
from .moves import Terms
from .node import FREE, Assignment, Node, Relaxed, repair
from .relaxation import Shift
from .sorts import cells_of
from .stopping import Stop
from .subproblem import Form, relaxed_below, shift_below
from .tree import joined

SHIFTS = 4  # made for one cell each, and tried on all, at most
TURNS = 30  # of tightening a cell in one form, at most
WORTH = 0.02  # share of the way to the level that a turn must make
MANY = 0.2  # share of the variables; where more are fixed, a fresh form pays


class OpenNode(NamedTuple):
    """What is to be searched.

    bound: a lower bound of everything below. assignment (n,): what is decided. quota (groups,): how many of each group
    go. form: where the walk starts, in a convex form made before; None asks for a fresh one. stale: whether that was
    made for another node.
    """

    bound: float
    assignment: Assignment
    quota: Floats
    form: Form | None = None
    stale: bool = False


def open_roots(terms: Terms, shift: Shift, cut: float, stop: Stop) -> tuple[Terms, list[OpenNode]]:
    """The cells that may hold removals below `cut`, with what is decided in them; and the terms that suit cells.

    shift: of the whole problem.
    """
    split, numbers = cells_of(terms)
    nothing = np.full(len(terms.linear), FREE, np.int8)
    shift = shift._replace(price=shift.price[: len(split.least)])  # no budgets are left where the cells replace them
    whole = relaxed_below(split, nothing, shift)

    if len(numbers) == 1:
        root = OpenNode(-np.inf, nothing, numbers[0])
        return split, _left_by_form_of(root.quota, whole, [root], cut, stop)

    lower = _bounds_of_cells(whole, numbers, cut, stop)
    roots = [OpenNode(float(lower[cell]), nothing, numbers[cell]) for cell in np.flatnonzero(lower < cut)]

    # The most promising cells get a shift of their own. Where none or all of a group go, it would suit too few others.
    size = np.bincount(split.group)
    inside = [root for root in roots if np.all((root.quota > 0) & (root.quota < size))]
    for owner in [root.quota for root in sorted(inside, key=lambda root: root.bound)[:SHIFTS]]:
        if not stop.expired() and any(root.quota is owner for root in roots):
            own = shift_below(split._replace(quota=owner), nothing)
            roots = _left_by_form_of(owner, relaxed_below(split, nothing, own), roots, cut, stop)
    return split, roots


def _bounds_of_cells(whole: Form, numbers: Floats, cut: float, stop: Stop) -> Floats:
    """Lower bounds (cells,) on the energy in every cell, from the form of the whole problem.

    That form is convex across cells: its linearisation at any point bounds all of them at once.
    """
    lower, seen = np.full(len(numbers), -np.inf), np.zeros(len(numbers), dtype=bool)
    while not stop.expired():
        waiting = np.flatnonzero(~seen & (lower < cut))
        if not len(waiting):
            break
        lowest = waiting[np.argmin(lower[waiting])]
        bound, node = _settle(whole, OpenNode(-np.inf, whole.node.assignment, numbers[lowest]), cut)
        lower = np.maximum(lower, _linearised(whole.relaxed, node, numbers))
        lower[lowest], seen[lowest] = max(lower[lowest], bound), True
    return lower


def _linearised(relaxed: Relaxed, node: Node, numbers: Floats) -> Floats:
    """Lower bounds (cells,) from the gradient at the node's z: in every group the numbers' smallest slopes."""
    bounds = np.full(len(numbers), value(relaxed, node) - node.gradient @ node.z - relaxed.guard)
    for g, number in enumerate(numbers.T.astype(np.int64)):
        slopes = np.sort(node.gradient[relaxed.first[g] : relaxed.first[g + 1]])
        bounds += np.append(0.0, np.cumsum(slopes))[number]
    return bounds


def _left_by_form_of(owner: Floats, form: Form, roots: list[OpenNode], cut: float, stop: Stop) -> list[OpenNode]:
    """The roots that a form leaves open, with what it fixes in them; they keep it, unless it fixes many.

    owner: the quota of the root that the form was made for.
    """
    left: list[OpenNode] = []
    for root in roots:
        has_its_own = root.form is not None and not root.stale
        if has_its_own or stop.expired():
            left.append(root)
            continue

        bound, node = _settle(form, root, cut)
        if bound == np.inf:
            continue
        assignment = joined(form.relaxed, root.assignment, node.assignment)
        left.append(OpenNode(bound, assignment, root.quota))
        if np.mean(assignment != FREE) < MANY:
            kept = Form(form.relaxed._replace(quota=root.quota), node)
            left[-1] = left[-1]._replace(form=kept, stale=root.quota is not owner)
    return left


def _settle(form: Form, root: OpenNode, cut: float) -> tuple[float, Node]:
    """Tighten a root in a form until it is not worth more; its bound, infinite where nothing is below `cut`."""
    relaxed, node = form.relaxed._replace(quota=root.quota), Node._make(values.copy() for values in form.node)
    node.assignment[: relaxed.num_binary] = root.assignment[relaxed.block]
    bound, level = root.bound, cut - 2.0 * relaxed.guard

    # The sums come first: at others the form need not be convex.
    repair(relaxed, node)
    for _ in range(TURNS):
        before = bound
        bound, free = tighten(relaxed, node, level, bound)
        if free <= 0 or bound == np.inf or bound - before < WORTH * (level - bound):
            break
    return bound, node
