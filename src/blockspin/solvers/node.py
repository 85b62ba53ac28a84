"""The compiled part of branch and bound for one node: its lower bound, and what the bound fixes.

On binary x the energy is q(x) = x^T A x + b^T x with A = Q - Diag(d) convex where the group sums are constant. In the
scaled variables z = weight * x every group's constraint reads sum z = need, with 0 <= z <= top, so that moving z
between two variables of a group keeps it. Because q is convex, q(z) + min over allowed y of grad q(z)^T (y - z) bounds
the energy of everything below a node, from any z; the minimum is had by filling up the smallest gradients.
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
PROMISING = 0.05  # share of the way to the level that another round must be able to make


class Relaxed(NamedTuple):
    """The convex form of a problem, in scaled variables; with a budget the last variable is its continuous slack."""

    a: Floats  # (v, v)
    b: Floats  # (v,)
    top: Floats  # (v,) largest value of each variable
    need: Floats  # (groups,)
    weight: Floats  # (v,) top and need before scaling: whole numbers
    whole_need: Floats  # (groups,)
    group: Ints  # (v,) ascending
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
    gradient: Floats  # (v,)
    order: Ints  # (v,) variables by group, then about ascending in gradient
    steps: Ints  # (1,) descent steps since the gradient was computed afresh


@compiled
def refresh(relaxed: Relaxed, node: Node) -> None:
    """The gradient 2 A z + b, from scratch."""
    node.gradient[:] = relaxed.b
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
def propagate(assignment: Assignment, weight: Floats, need: Floats, group: Ints, num_binary: int) -> int:
    """Fix what the constraints sum weight * x = need force. Returns how many binaries stay free, -1 if none fits."""
    while True:
        # By group: the weight that must still be removed, and the weight of what is free.
        missing, room = need.copy(), np.zeros(len(need))
        for i in range(len(assignment)):
            if assignment[i] == 1:
                missing[group[i]] -= weight[i]
            elif assignment[i] == FREE:
                room[group[i]] += weight[i]
        if np.any(missing < 0.0) or np.any(missing > room):
            return -1

        free, changed = 0, False
        for i in range(num_binary):
            if assignment[i] != FREE:
                continue
            g = group[i]
            if weight[i] > missing[g]:
                assignment[i], changed = 0, True
            elif weight[i] > room[g] - missing[g]:
                assignment[i], changed = 1, True
            else:
                free += 1

        if not changed:
            return free


@compiled
def repair(relaxed: Relaxed, node: Node) -> None:
    """Move z to the fixed values, and restore the group sums at the least first-order cost."""
    lacking = relaxed.need.copy()
    for i in range(len(node.z)):
        if node.assignment[i] != FREE:
            wanted = relaxed.top[i] * node.assignment[i]
            if node.z[i] != wanted:
                shift(relaxed, node, i, wanted - node.z[i])
        lacking[relaxed.group[i]] -= node.z[i]

    for g in range(len(lacking)):
        for _ in range(len(node.z)):
            if abs(lacking[g]) <= 1e-15 * relaxed.need[g]:
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
    """q(z), from the gradient."""
    total = 0.0
    for i in range(len(node.z)):
        total += node.z[i] * (node.gradient[i] + relaxed.b[i])
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

    missing = relaxed.need.copy()
    low[:] = -np.inf
    high[:] = np.inf
    change = 0.0
    for i in range(len(node.z)):
        if node.assignment[i] == 1:
            missing[relaxed.group[i]] -= relaxed.top[i]

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
def tighten(relaxed: Relaxed, node: Node, level: float, lower: float) -> tuple[float, int]:
    """Bound a node and fix variables until it is cut off, decided, or not worth more work.

    Returns the bound (infinite when cut off) and the number of free binary variables.
    """
    groups = len(relaxed.need)
    low, high, filled = np.empty(groups), np.empty(groups), np.zeros(len(node.z))
    ceiling, floor, gains = np.empty(len(node.z)), np.empty(len(node.z)), np.empty(len(node.z))

    free = propagate(node.assignment, relaxed.weight, relaxed.whole_need, relaxed.group, relaxed.num_binary)
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

        at = bound(relaxed, node, low, high, filled) - relaxed.guard
        lower = max(lower, at)
        if lower >= level:
            return np.inf, free

        if fix_by_cost(relaxed, node, level, at, low, high, filled):
            free = propagate(node.assignment, relaxed.weight, relaxed.whole_need, relaxed.group, relaxed.num_binary)
            if free <= 0:
                return (np.inf if free < 0 else lower), free
            repair(relaxed, node)
            continue

        # Go on only while the bound may still rise to the level: it cannot pass the energy of the relaxed solution.
        now = value(relaxed, node)
        if not moved or now - at < PROMISING * (level - at) or (attempt >= 1 and now < level):
            break
    return lower, free
