"""The semidefinite relaxation's dual: a diagonal d that makes x^T H x convex without changing it on binary x.

With s = 2x - 1 and s_0 = 1 the energy is s^T C s, and every allowed s lies in the span of an orthonormal basis W of
the null space of the constraints sum_g s = (2 m_g - n_g) s_0. The relaxation over S = W Z W^T is

    min <W^T C W, Z>  with  w_i^T Z w_i = 1,  Z >= 0      and its dual      max sum u  with  W^T (C - Diag u) W >= 0,

which is the relaxation X >= x x^T, diag X = x, sum x = m, X 1 = m x in other variables. Both are solved together by a
primal-dual interior-point method; because every constraint has rank one its linear system is an elementwise product
of two small matrices (Helmberg, Rendl, Vanderbei, Wolkowicz, SIAM J. Optim. 6, 1996).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..problem import Floats, Ints


class Shift(NamedTuple):
    """A diagonal d such that Q - Diag(d) is convex where counts hold; what the relaxation says besides."""

    d: Floats  # (n,)
    x: Floats  # (n,) the relaxed solution
    price: Floats  # (budgets,) what a unit of each budget costs, none negative


def convex_shift(
    quadratic: Floats, linear: Floats, group: Ints, quota: Floats, exactly: bool, weight: Floats, least: Floats
) -> Shift:
    """d (n,) such that Q - Diag(d) is positive semidefinite where the group sums are constant, or everywhere.

    Everywhere is for problems without exact counts. Any such d and prices give valid bounds; these nearly maximise the
    bound.
    """
    n, budgets = len(linear), len(least)
    scale = max(float(np.abs(quadratic).max()), float(np.abs(linear).max()) / n)
    if scale == 0.0:
        return Shift(np.zeros(n), np.full(n, 0.5), np.zeros(budgets))

    # A budget is scaled to shares of what all variables have of it.
    q, c = quadratic / scale, linear / scale
    w = _null_space(group, quota) if exactly else np.eye(n + 1)
    whole = np.maximum(weight.sum(axis=1), 1.0)  # (budgets,)
    shares = np.zeros((budgets, n + 1, n + 1))
    for k in range(budgets):
        shares[k] = _weighing(weight[k] / whole[k])
    u, s, price = _interior_point(_homogenised(q, c), w, shares, least / whole)
    x = np.clip((1.0 + s[0, 1:]) / 2.0, 0.0, 1.0)  # (n,)

    # C holds Q / 4, so Diag(u) in spins is d = 4 u in binaries. Of two safe shifts take that of the higher bound at x.
    same = group if exactly else None
    shifts = _made_safe(q, 4.0 * u[1:], same), _made_safe(q, np.zeros(n), same)
    best = max(shifts, key=lambda d: float(d @ (x - x * x)))
    return Shift(best * scale, x, price * scale / whole)


def even_shift(quadratic: Floats) -> Floats:
    """The simplest valid d: the lowest eigenvalue everywhere."""
    return _made_safe(quadratic, np.zeros(len(quadratic)), None)


def _weighing(share: Floats) -> Floats:
    """B (n+1, n+1) with s^T B s = share^T x."""
    return _homogenised(np.zeros((len(share), len(share))), share)


def _homogenised(q: Floats, c: Floats) -> Floats:
    """C (n+1, n+1) with x^T q x + c^T x = s^T C s for x = (1 + s) / 2, s_0 = 1."""
    n = len(c)
    cost = np.empty((n + 1, n + 1))
    cost[1:, 1:] = q / 4.0
    cost[0, 1:] = cost[1:, 0] = (q.sum(axis=1) + c) / 4.0
    cost[0, 0] = q.sum() / 4.0 + c.sum() / 2.0
    return cost


def _null_space(group: Ints, need: Floats) -> Floats:
    """Orthonormal basis (n+1, n+1-groups) of the s with sum_g s = (2 m_g - n_g) s_0 for every group g."""
    rows = np.zeros((len(need), len(group) + 1))
    for g in range(len(need)):
        rows[g, 1:] = group == g
        rows[g, 0] = rows[g, 1:].sum() - 2.0 * need[g]
    return np.ascontiguousarray(np.linalg.svd(rows)[2][len(need) :].T)


def _interior_point(
    full: Floats, w: Floats, weighing: Floats, least: Floats, accuracy: float = 1e-4, rounds: int = 50
) -> tuple[Floats, Floats, Floats]:
    """Solve the pair of programs above for C (n+1, n+1) and W (n+1, p): dual u (n+1,), always feasible, and primal S.

    Each budget (B, least) adds the constraint <B, S> - surplus = least, surplus >= 0, with multiplier price >= 0:
    weighing (budgets, n+1, n+1), least (budgets,). Also returns the prices (budgets,).
    """
    cost, p, budgets = w.T @ full @ w, w.shape[1], len(least)
    heavy = np.zeros((budgets, p, p))
    for k in range(budgets):
        heavy[k] = w.T @ weighing[k] @ w

    # A start well inside all cones: Z the identity, u so low that the slack is positive definite.
    price, surplus = np.ones(budgets), np.ones(budgets)
    priced = cost - heavy.sum(axis=0)
    u = np.full(len(w), np.linalg.eigvalsh(priced)[0] - 1.0)
    z, slack = np.eye(p), priced - (w.T * u) @ w
    mu = float(np.sum(z * slack)) / p / 2.0

    for _ in range(rounds):
        inverse = np.linalg.inv(slack)
        system, right = _newton_system(w, z, inverse, heavy, least, price, surplus, mu)
        try:
            solution = np.asarray(np.linalg.solve(system, right), dtype=np.float64)
        except np.linalg.LinAlgError:
            break

        # The directions of all unknowns; that of Z is made symmetric.
        du, dprice = solution[: len(u)], solution[len(u) :]
        ds = -(w.T * du) @ w - np.einsum("k,kij->ij", dprice, heavy)
        change = -z @ ds @ inverse
        dz = mu * inverse - z + (change + change.T) / 2.0
        dsurplus = mu / price - surplus - surplus * dprice / price

        # As far as everything stays inside its cone.
        step_z = min(_largest_step(z, dz), _largest_ratio(surplus, dsurplus))
        step_s = min(_largest_step(slack, ds), _largest_ratio(price, dprice))
        z, u, slack = z + step_z * dz, u + step_s * du, slack + step_s * ds
        surplus, price = surplus + step_z * dsurplus, price + step_s * dprice

        # After long steps aim far down, after short ones stay near the centre.
        gap = float(np.sum(z * slack) + surplus @ price)
        mu = gap / p * (0.1 if step_z + step_s > 1.6 else 0.5)
        if gap < accuracy * (1.0 + abs(float(u.sum() + least @ price))) and step_z > 0.9:
            break

    return u, w @ z @ w.T, price


def _newton_system(
    w: Floats, z: Floats, inverse: Floats, heavy: Floats, least: Floats, price: Floats, surplus: Floats, mu: float
) -> tuple[Floats, Floats]:
    """Newton's equations for Z slack = mu, reduced to the multipliers: a matrix and a right-hand side.

    (W Z W^T) o (W slack^-1 W^T), elementwise because every constraint has rank one; every budget adds a row
    and a column.
    """
    wz, wi = w @ z, w @ inverse
    system, right = (wz @ w.T) * (wi @ w.T), 1.0 - mu * np.einsum("ip,ip->i", wi, w)
    budgets = len(least)
    if not budgets:
        return system, right

    mixed, own = np.zeros((len(w), budgets)), np.diag(surplus / price)
    for k in range(budgets):
        moved = z @ heavy[k] @ inverse  # (p, p)
        mixed[:, k] = np.einsum("ip,ip->i", w @ moved, w)
        for j in range(budgets):
            own[j, k] += float(np.sum(heavy[j] * moved))
    given = np.einsum("kij,ij->k", heavy, inverse)  # (budgets,)
    system = np.block([[system, mixed], [mixed.T, (own + own.T) / 2.0]])
    return system, np.append(right, least - mu * given + mu / price)


def _largest_ratio(values: Floats, change: Floats) -> float:
    """Nearly the longest step, at most 1, after which positive values (budgets,) still are."""
    step = 1.0
    for value, by in zip(values.tolist(), change.tolist(), strict=True):
        if by < 0.0:
            step = min(step, 0.95 * value / -by)
    return step


def _largest_step(matrix: Floats, change: Floats) -> float:
    """Nearly the longest step, at most 1, after which a positive definite matrix still is one."""
    step = 1.0
    while step > 1e-8:
        try:
            np.linalg.cholesky(matrix + step * change)
        except np.linalg.LinAlgError:
            step *= 0.8
        else:
            return step if step == 1.0 else 0.95 * step
    return 0.0


def _made_safe(q: Floats, d: Floats, group: Ints | None) -> Floats:
    """Shift d evenly, until q - Diag(d) is certainly positive semidefinite where the group sums are constant."""
    shifted = q - np.diag(d)
    size = float(np.abs(shifted).sum(axis=1).max())

    # Project each group's direction of constant sums out, so that it does not count.
    for g in range(0 if group is None else int(group[-1]) + 1):
        inside = (group == g) / np.sqrt(np.sum(group == g))
        shifted = shifted - np.outer(inside, inside @ shifted)
        shifted = shifted - np.outer(shifted @ inside, inside)
        shifted += 2.0 * size * np.outer(inside, inside)  # out of the way of the lowest eigenvalue

    lowest = float(np.linalg.eigvalsh((shifted + shifted.T) / 2.0)[0])
    return d + lowest - 1e-14 * len(d) * size
