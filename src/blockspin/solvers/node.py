"""The compiled part of branch and bound for one node: its relaxation, and what follows from what is decided.

On binary x the energy is q(x) = x^T A x + b^T x with A = Q - Diag(d) convex where the group sums are constant. Every
budget w^T x >= least has a price p >= 0: the energy plus p (least - w^T x) is no higher where the budget is met, so a
bound on it is a bound on the energy, whatever the price. The variables z of the relaxation have fixed sums in every
group; without exact counts a slack variable takes up what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Floats, Ints
from .compiled import compiled, compiled_for_scans

Assignment = NDArray[np.int8]  # per variable: 0 stays, 1 is removed, FREE
FREE = -1


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
