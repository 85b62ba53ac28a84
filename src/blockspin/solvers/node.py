"""The compiled part of branch and bound for one node: its lower bound, and what the bound fixes.

On binary x the energy is q(x) = x^T A x + b^T x with A = Q - Diag(d) convex where the group sums are constant. Every
budget w^T x >= least has a price p >= 0: the energy plus p (least - w^T x) is no higher where the budget is met, so a
bound on it is a bound on the energy, whatever the price. The variables z of the relaxation have fixed sums in every
group; without exact counts a slack variable takes up what is left.

Because q is convex, q(z) + min over allowed y of grad q(z)^T (y - z) bounds the energy of everything below a node, from
any z; the minimum is had by filling up the smallest gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints
from .compiled import compiled, compiled_for_scans

Assignment = NDArray[np.int8]  # per variable: 0 stays, 1 is removed, FREE
FREE = -1
ROUNDS = 12  # of descent and bounding, at most, per node
STEPS = 6  # descent steps per group and round
REPRICINGS = 3  # changes of a price that are tried, per budget and round
PROMISING = 0.05  # share of the way to the level that another round must be able to make


class Relaxed(NamedTuple):
    """The convex form of a problem; without exact counts the last variable is the slack of the one group."""

    a: Floats  # (v, v)
    b: Floats  # (v,)
    top: Floats  # (v,) largest value of each variable: 1, of the slack the count
    group: Ints  # (v,) ascending
    quota: Floats  # (groups,)
    exactly: bool
    weight: Floats  # (budgets, v) whole numbers
    least: Floats  # (budgets,)
    heavy: Ints  # (budgets, num_binary) the variables by group, in each the heaviest first
    dearest: Floats  # (budgets,) prices stay below this, so that rounding stays below the guard
    first: Ints  # (groups + 1,) where each group starts
    diagonal: Floats  # (v,) of a
    num_binary: int  # v, or v - 1 with a slack
    block: Ints  # (v,) the problem's variable that each stands for
    constant: float  # what the variables decided before this subtree contribute
    guard: float  # more than the rounding error of a bound
    refresh: int  # steps after which the gradient is computed afresh, to keep rounding below the guard


class Node(NamedTuple):
    """The arrays that the work on one node needs; a stack of nodes has a row for each."""

    assignment: Assignment  # (v,)
    z: Floats  # (v,)
    gradient: Floats  # (v,) of the priced energy
    order: Ints  # (v,) variables by group, then about ascending in gradient
    price: Floats  # (budgets,)
    stride: Floats  # (budgets,) by how much a price changes next
    steps: Ints  # (1,) descent steps since the gradient was computed afresh


@compiled
def refresh(relaxed: Relaxed, node: Node) -> None:
    """The gradient 2 A z + b - W^T price, from scratch."""
    node.gradient[:] = relaxed.b
    for k in range(len(node.price)):
        node.gradient[:] -= node.price[k] * relaxed.weight[k]
    node.steps[0] = 0
    for i in range(len(node.z)):
        if node.z[i] != 0.0:
            add_to(relaxed, node.gradient, i, 2.0 * node.z[i])


@compiled
def add_to(relaxed: Relaxed, gradient: Floats, variable: int, amount: float) -> None:
    row = relaxed.a[variable]
    for j in range(len(gradient)):
        gradient[j] += amount * row[j]


@compiled
def shift(relaxed: Relaxed, node: Node, variable: int, amount: float) -> None:
    """Change one variable, within its limits, and the gradient with it."""
    before = node.z[variable]
    node.z[variable] = min(max(before + amount, 0.0), relaxed.top[variable])
    add_to(relaxed, node.gradient, variable, 2.0 * (node.z[variable] - before))
    node.steps[0] += 1


@compiled
def propagate(
    assignment: Assignment,
    group: Ints,
    quota: Floats,
    exactly: bool,
    weight: Floats,
    least: Floats,
    heavy: Ints,
    num_binary: int,
) -> int:
    """Fix what counts and budgets force. Returns how many binaries stay free, -1 if nothing is allowed."""
    while True:
        # By group: how many must, or may, still go, and how many are free.
        missing, free = quota.copy(), np.zeros(len(quota))
        for i in range(num_binary):
            if assignment[i] == 1:
                missing[group[i]] -= 1.0
            elif assignment[i] == FREE:
                free[group[i]] += 1.0
        if np.any(missing < 0.0) or (exactly and np.any(missing > free)):
            return -1

        changed = False
        for i in range(num_binary):
            g = group[i]
            if assignment[i] == FREE and (missing[g] == 0.0 or (exactly and missing[g] == free[g])):
                assignment[i], changed = 0 if missing[g] == 0.0 else 1, True

        # A budget counts on the heaviest that may go; the counts must be those of this assignment.
        for k in range(len(least)):
            if changed:
                break
            fixed = propagate_budget(assignment, group, missing, weight[k], least[k], heavy[k])
            if fixed < 0:
                return -1
            changed = fixed > 0

        if not changed:
            return int(free.sum())


@compiled
def propagate_budget(
    assignment: Assignment, group: Ints, missing: Floats, weight: Floats, least: float, heavy: Ints
) -> int:
    """Fix what one budget forces, where `missing` (groups,) more may go. Returns how many, -1 if it is out of reach."""
    lacking = least
    for i in range(len(heavy)):
        if assignment[i] == 1:
            lacking -= weight[i]
    if lacking <= 0.0:
        return 0

    # The most that can be had: the heaviest of every group, `lightest` of them the last, `spare` the first left out.
    room, taken = 0.0, np.zeros(len(missing))
    lightest, spare = np.zeros(len(missing)), np.zeros(len(missing))
    for i in heavy:
        g = group[i]
        if assignment[i] != FREE:
            continue
        if taken[g] < missing[g]:
            room += weight[i]
            lightest[g] = weight[i]
        elif taken[g] == missing[g]:
            spare[g] = weight[i]
        taken[g] += 1.0
    if room < lacking:
        return -1

    fixed, rank = 0, np.zeros(len(missing))
    for i in heavy:
        g = group[i]
        if assignment[i] != FREE:
            continue
        if rank[g] < missing[g]:
            if room - weight[i] + spare[g] < lacking:
                assignment[i] = 1
                fixed += 1
        elif room - lightest[g] + weight[i] < lacking:
            assignment[i] = 0
            fixed += 1
        rank[g] += 1.0
    return fixed


@compiled
def repair(relaxed: Relaxed, node: Node) -> None:
    """Move z to the fixed values, and restore the group sums at the least first-order cost."""
    lacking = relaxed.quota.copy()
    for i in range(len(node.z)):
        if node.assignment[i] != FREE:
            wanted = relaxed.top[i] * node.assignment[i]
            if node.z[i] != wanted:
                shift(relaxed, node, i, wanted - node.z[i])
        lacking[relaxed.group[i]] -= node.z[i]

    for g in range(len(lacking)):
        for _ in range(len(node.z)):
            if abs(lacking[g]) <= 1e-15 * relaxed.quota[g]:
                break

            # The free variable with room in that direction that costs least: the lowest slope up, the highest down.
            up = lacking[g] > 0.0
            best = -1
            for i in range(len(node.z)):
                if node.assignment[i] != FREE or relaxed.group[i] != g:
                    continue
                if node.z[i] >= relaxed.top[i] if up else node.z[i] <= 0.0:
                    continue
                if best < 0 or (node.gradient[i] < node.gradient[best]) == up:
                    best = i
            if best < 0:
                break

            before = node.z[best]
            shift(relaxed, node, best, lacking[g])
            lacking[g] -= node.z[best] - before


@compiled_for_scans
def descend(relaxed: Relaxed, node: Node, ceiling: Floats, floor: Floats, gains: Floats, g: int) -> bool:
    """One step of the convex minimisation: move z from one variable of a group to another, as far as it pays.

    Only variables below their ceiling (v,) may grow, only those above their floor (v,) may shrink. gains (v,) is
    working place.
    """
    start, end = relaxed.first[g], relaxed.first[g + 1]
    z, gradient = node.z[start:end], node.gradient[start:end]
    up, down = ceiling[start:end], floor[start:end]

    # The variable that should grow: the lowest slope among those below their ceiling. Two plain loops, the minimum
    # and then its place, use vectors where one with a branch would not.
    steepest = np.inf
    for i in range(len(z)):
        steepest = min(steepest, gradient[i] if z[i] < up[i] else np.inf)
    if steepest == np.inf:
        return False
    into = 0
    while gradient[into] != steepest or z[into] >= up[into]:
        into += 1

    # For every variable that could shrink in exchange: the exact minimum along the line, and what it gains.
    row, diagonal, gain = relaxed.a[start + into, start:end], relaxed.diagonal[start:end], gains[start:end]
    room, own, best = up[into] - z[into], diagonal[into], 0.0
    for j in range(len(z)):
        slope = max(gradient[j] - steepest, 0.0)
        curvature = max(own + diagonal[j] - 2.0 * row[j], 1e-300)
        step = min(min(slope / (2.0 * curvature), z[j]), room)
        gained = step * (slope - step * curvature)
        gain[j] = gained if z[j] > down[j] else 0.0
        best = max(best, gain[j])
    if best <= 0.0:
        return False

    out = 0
    while gain[out] != best:
        out += 1
    curvature = max(own + diagonal[out] - 2.0 * row[out], 1e-300)
    length = min((gradient[out] - steepest) / (2.0 * curvature), min(z[out], room))
    shift(relaxed, node, start + into, length)
    shift(relaxed, node, start + out, -length)
    return True


@compiled
def set_limits(relaxed: Relaxed, node: Node, ceiling: Floats, floor: Floats) -> None:
    """Ceilings and floors (v,) that let only free variables move."""
    for i in range(len(ceiling)):
        ceiling[i] = relaxed.top[i] if node.assignment[i] == FREE else -np.inf
        floor[i] = 0.0 if node.assignment[i] == FREE else np.inf


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
