"""The compiled part of branch and bound for many nodes: a depth-first walk below one, and the leaves that it finds."""

from __future__ import annotations

import numpy as np

from ..problem import Floats, Ints
from .bounds import tighten
from .compiled import compiled
from .moves import Pool, Terms, offer_removal, worst
from .node import FREE, Assignment, Node, Relaxed


@compiled
def branching_variable(relaxed: Relaxed, node: Node) -> int:
    """The free variable that matters most: far from both its limits, and with a steep curvature.

    Where counts hold, a convex form may have any curvature along a single variable, a steeply falling one too.
    """
    best, most = -1, -np.inf
    for i in range(relaxed.num_binary):
        if node.assignment[i] == FREE:
            gain = np.sqrt(min(node.z[i], 1.0 - node.z[i])) * relaxed.diagonal[i]
            if gain > most:
                best, most = i, gain
    return best


@compiled
def keep_leaf(terms: Terms, assignment: Assignment, pool: Pool) -> None:
    """Offer a removal, given by the assignment (n,) of all variables, to the pool."""
    offer_removal(terms, np.flatnonzero(assignment == 1), pool)


@compiled
def joined(relaxed: Relaxed, above: Assignment, below: Assignment) -> Assignment:
    """The assignment (n,) of all variables, given those decided above a subtree and those in it."""
    assignment = above.copy()
    for i in range(relaxed.num_binary):
        assignment[relaxed.block[i]] = below[i]
    return assignment


@compiled
def explore(
    terms: Terms,
    relaxed: Relaxed,
    above: Assignment,
    node: Node,
    stack: Node,
    lower: Floats,
    pool: Pool,
    cut: Floats,
    flag: Ints,
    limit: int,
) -> tuple[int, int]:
    """Walk depth-first below a node, until done, or limit nodes are seen, or flag is raised.

    above holds the assignment (n,) of the problem's variables decided before. stack has one row per waiting node, and
    lower its bound; the rows left at the end are still to do. cut (1,) is the lowest known energy to beat, shared with
    other threads. Returns how many nodes wait, and how many were seen.
    """
    height, seen = 1, 0
    while height > 0 and seen < limit and flag[0] == 0:
        height -= 1
        seen += 1
        cut[0] = min(cut[0], worst(pool))
        level = cut[0] - 2.0 * relaxed.guard
        if lower[height] >= level:
            continue

        copy_node(stack, height, node)
        at, free = tighten(relaxed, node, level, lower[height])
        if at == np.inf:
            continue
        if free == 0:
            keep_leaf(terms, joined(relaxed, above, node.assignment), pool)
            continue

        # The child that rounding would choose is pushed last, and so walked first: it leads to low removals soon.
        variable = branching_variable(relaxed, node)
        first = 1 if node.z[variable] > 0.5 else 0
        for side in (1 - first, first):
            node.assignment[variable] = side
            put_node(node, stack, height)
            lower[height] = at
            height += 1
    return height, seen


@compiled
def copy_node(stack: Node, row: int, node: Node) -> None:
    node.assignment[:] = stack.assignment[row]
    node.z[:] = stack.z[row]
    node.gradient[:] = stack.gradient[row]
    node.order[:] = stack.order[row]
    node.price[:] = stack.price[row]
    node.stride[:] = stack.stride[row]
    node.steps[:] = stack.steps[row]


@compiled
def put_node(node: Node, stack: Node, row: int) -> None:
    stack.assignment[row] = node.assignment
    stack.z[row] = node.z
    stack.gradient[row] = node.gradient
    stack.order[row] = node.order
    stack.price[row] = node.price
    stack.stride[row] = node.stride
    stack.steps[row] = node.steps
