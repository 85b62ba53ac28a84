"""The lower bound of a node of branch and bound, and what it fixes.

Because q is convex, q(z) + min over allowed y of grad q(z)^T (y - z) bounds the energy of everything below a node, from
any z; the minimum is had by filling up the smallest gradients.
"""

from __future__ import annotations

import numpy as np

from ..problem import Floats
from .compiled import compiled
from .node import FREE, Node, Relaxed, descend, propagate, refresh, repair, set_limits

ROUNDS = 12  # of descent and bounding, at most, per node
STEPS = 6  # descent steps per group and round
REPRICINGS = 3  # changes of a price that are tried, per budget and round
PROMISING = 0.05  # share of the way to the level that another round must be able to make


@compiled
def value(relaxed: Relaxed, node: Node) -> float:
    """q(z) with what the budgets cost, from the gradient."""
    total = 0.0
    for i in range(len(node.z)):
        total += node.z[i] * (node.gradient[i] + relaxed.b[i])
    for k in range(len(node.price)):
        total += node.price[k] * (2.0 * relaxed.least[k] - np.sum(relaxed.weight[k] * node.z))
    return relaxed.constant + 0.5 * total


@compiled
def sort_order(relaxed: Relaxed, node: Node) -> None:
    """Bring order into place by insertion: it is nearly sorted from the node before."""
    order, gradient = node.order, node.gradient
    for place in range(1, len(order)):
        i, at = order[place], place
        while at > 0 and relaxed.group[order[at - 1]] == relaxed.group[i] and gradient[order[at - 1]] > gradient[i]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@compiled
def bound(relaxed: Relaxed, node: Node, low: Floats, high: Floats, filled: Floats) -> float:
    """Lower bound on the energy below the node, by linearisation at z.

    Writes the minimising vertex to filled (v,), and to low and high (groups,) the ends of the multipliers for which it
    stays the minimum.
    """
    sort_order(relaxed, node)

    missing = relaxed.quota.copy()
    low[:] = -np.inf
    high[:] = np.inf
    change = 0.0
    for i in range(len(node.z)):
        if node.assignment[i] == 1:
            missing[relaxed.group[i]] -= 1.0

    # The vertex: in every group fill up the variables of the smallest gradients until its sum is reached.
    for i in node.order:
        if node.assignment[i] != FREE:
            continue
        g = relaxed.group[i]
        filled[i] = min(relaxed.top[i], max(missing[g], 0.0))
        missing[g] -= filled[i]
        change += node.gradient[i] * (filled[i] - node.z[i])

        if filled[i] > 0.0:
            low[g] = node.gradient[i]
        if filled[i] < relaxed.top[i]:
            high[g] = min(high[g], node.gradient[i])

    return value(relaxed, node) + change


@compiled
def reprice(relaxed: Relaxed, node: Node, at: float, low: Floats, high: Floats, filled: Floats) -> float:
    """Change each price as long as that lifts the bound, now `at`; returns the bound, with its vertex in `filled`.

    The bound is concave in the prices, and what its vertex lacks of a budget is its slope.
    """
    for k in range(len(node.price)):
        for _ in range(REPRICINGS):
            lacking = relaxed.least[k]
            for i in range(relaxed.num_binary):
                part = filled[i] if node.assignment[i] == FREE else float(node.assignment[i])
                lacking -= relaxed.weight[k, i] * part
            before = node.price[k]
            wanted = before + (node.stride[k] if lacking > 0.0 else -node.stride[k])
            change_price(relaxed, node, k, min(max(wanted, 0.0), relaxed.dearest[k]))
            if lacking == 0.0 or node.price[k] == before:
                break

            higher = bound(relaxed, node, low, high, filled)
            if higher > at:
                at = higher
                node.stride[k] *= 2.0
                continue
            change_price(relaxed, node, k, before)
            node.stride[k] *= 0.3
            at = bound(relaxed, node, low, high, filled)
    return at


@compiled
def change_price(relaxed: Relaxed, node: Node, budget: int, price: float) -> None:
    by = price - node.price[budget]
    for i in range(len(node.gradient)):
        node.gradient[i] -= by * relaxed.weight[budget, i]
    node.price[budget] = price
    node.steps[0] += 1


@compiled
def fix_by_cost(
    relaxed: Relaxed, node: Node, level: float, at: float, low: Floats, high: Floats, filled: Floats
) -> bool:
    """Fix every variable whose other value would lift the bound, now `at`, to `level`."""
    changed = False
    for i in range(relaxed.num_binary):
        if node.assignment[i] != FREE:
            continue
        g = relaxed.group[i]
        if filled[i] == 0.0 and at + (node.gradient[i] - low[g]) * relaxed.top[i] >= level:
            node.assignment[i], changed = 0, True
        elif filled[i] == relaxed.top[i] and at + (high[g] - node.gradient[i]) * relaxed.top[i] >= level:
            node.assignment[i], changed = 1, True
    return changed


@compiled
def propagate_all(relaxed: Relaxed, node: Node) -> int:
    """`propagate` for a node."""
    r = relaxed
    return propagate(node.assignment, r.group, r.quota, r.exactly, r.weight, r.least, r.heavy, r.num_binary)


@compiled
def tighten(relaxed: Relaxed, node: Node, level: float, lower: float) -> tuple[float, int]:
    """Bound a node and fix variables until it is cut off, decided, or not worth more work.

    Returns the bound (infinite when cut off) and the number of free binary variables.
    """
    groups = len(relaxed.quota)
    low, high, filled = np.empty(groups), np.empty(groups), np.zeros(len(node.z))
    ceiling, floor, gains = np.empty(len(node.z)), np.empty(len(node.z)), np.empty(len(node.z))

    free = propagate_all(relaxed, node)
    if free <= 0:
        return (np.inf if free < 0 else lower), free
    repair(relaxed, node)

    for attempt in range(ROUNDS):
        set_limits(relaxed, node, ceiling, floor)
        moved = False
        for _ in range(STEPS):
            for g in range(groups):
                moved |= descend(relaxed, node, ceiling, floor, gains, g)
        if node.steps[0] > relaxed.refresh:
            refresh(relaxed, node)

        at = bound(relaxed, node, low, high, filled)
        if len(node.price) and at - relaxed.guard < level:
            at = reprice(relaxed, node, at, low, high, filled)
        at -= relaxed.guard
        lower = max(lower, at)
        if lower >= level:
            return np.inf, free

        if fix_by_cost(relaxed, node, level, at, low, high, filled):
            free = propagate_all(relaxed, node)
            if free <= 0:
                return (np.inf if free < 0 else lower), free
            repair(relaxed, node)
            continue

        # Go on only while the bound may still rise to the level: it cannot pass the energy of the relaxed solution.
        now = value(relaxed, node)
        if not moved or now - at < PROMISING * (level - at) or (attempt >= 1 and now < level):
            break
    return lower, free
