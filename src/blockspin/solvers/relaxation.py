"""The semidefinite relaxation's dual: a diagonal d that makes x^T H x convex without changing it on binary x.

With s = 2x - 1 and s_0 = 1 the energy is s^T C s, and every allowed s lies in the span of an orthonormal basis W of
the null space of the constraints sum_g s = (2 m_g - n_g) s_0. The relaxation over S = W Z W^T is

    min <W^T C W, Z>  with  w_i^T Z w_i = 1,  Z >= 0      and its dual      max sum u  with  W^T (C - Diag u) W >= 0,

which is the relaxation X >= x x^T, diag X = x, sum x = m, X 1 = m x in other variables. Both are solved together by a
primal-dual interior-point method; because every constraint has rank one its linear system is an elementwise product
of two small matrices (Helmberg, Rendl, Vanderbei, Wolkowicz, SIAM J. Optim. 6, 1996).
"""

from __future__ import annotations

import numpy as np

from ..problem import Floats, Ints


def convex_shift(quadratic: Floats, linear: Floats, group: Ints, weight: Floats, need: Floats, equality: bool) -> Floats:
    """d (n,) such that Q - Diag(d) is positive semidefinite where the group sums are constant (everywhere for a budget).

    Any such d gives valid bounds; this one maximises the bound at the root. A budget enters as a price per weight.
    """
    n = len(linear)
    scale = max(float(np.abs(quadratic).max()), float(np.abs(linear).max()) / n)
    if scale == 0.0:
        return np.zeros(n)
    q, c = quadratic / scale, linear / scale
    if equality:
        basis = _null_space(group, need)
        d = 4.0 * _dual_interior_point(basis.T @ _homogenised(q, c) @ basis, basis)[0][1:]
    else:
        d = _budget_shift(q, c, weight, need[0])
    return _made_safe(q, d, group if equality else None) * scale


def _budget_shift(q: Floats, c: Floats, weight: Floats, need: float) -> Floats:
    """The shift at the price per weight whose relaxed solution just meets the budget, by bisection."""
    n = len(c)
    basis = np.eye(n + 1)
    share = weight / weight.sum()
    low, high = 0.0, 2.0 * float(np.max((np.abs(q).sum(axis=1) * 2 + np.abs(c)) / share))
    for _ in range(20):
        price = 0.5 * (low + high)
        dual, primal = _dual_interior_point(_homogenised(q, c - price * share), basis)
        removed = float(share @ (1.0 + primal[0, 1:])) / 2.0
        low, high = (price, high) if removed < need / weight.sum() else (low, price)
        if abs(removed - need / weight.sum()) < 1e-3:
            break
    return 4.0 * dual[1:]


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


def _dual_interior_point(cost: Floats, w: Floats, accuracy: float = 1e-5, rounds: int = 60) -> tuple[Floats, Floats]:
    """Solve the pair of programs above for cost (p, p) and w (n+1, p): dual u (n+1,), always feasible, and primal S."""
    u = np.full(len(w), np.linalg.eigvalsh(cost)[0] - 1.0)
    z, slack = np.eye(len(cost)), cost - (w.T * u) @ w
    mu = float(np.sum(z * slack)) / len(cost) / 2.0
    for _ in range(rounds):
        inverse = np.linalg.inv(slack)
        wz, wi = w @ z, w @ inverse
        a, b = wz @ w.T, wi @ w.T
        try:
            du = np.linalg.solve(a * b, 1.0 - mu * np.diag(b))
        except np.linalg.LinAlgError:
            break
        change = (wz.T * du) @ wi
        dz = mu * inverse - z + (change + change.T) / 2.0
        ds = -(w.T * du) @ w
        step_z, step_s = _largest_step(z, dz), _largest_step(slack, ds)
        z, u, slack = z + step_z * dz, u + step_s * du, slack + step_s * ds
        mu = float(np.sum(z * slack)) / len(cost) * (0.1 if step_z + step_s > 1.6 else 0.5)
        primal, dual = float(np.sum(cost * z)), float(u.sum())
        infeasible = float(np.abs(np.einsum("ip,pq,iq->i", w, z, w, optimize=True) - 1.0).max())
        if infeasible < accuracy and abs(primal - dual) < accuracy * (1.0 + abs(primal)):
            break
    return u, w @ z @ w.T


def _largest_step(matrix: Floats, change: Floats) -> float:
    """Nearly the longest step up to 1 that keeps a positive definite matrix so."""
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
    """Lower d evenly until q - Diag(d) is surely positive semidefinite on the subspace of constant group sums."""
    shifted = q - np.diag(d)
    if group is not None:
        for g in range(int(group[-1]) + 1):
            inside = (group == g).astype(np.float64)
            shifted -= np.outer(inside, inside @ shifted) / inside.sum()
            shifted -= np.outer(shifted @ inside, inside) / inside.sum()
    lowest = float(np.linalg.eigvalsh((shifted + shifted.T) / 2.0)[0])
    rounding = 1e-14 * len(d) * (1.0 + float(np.abs(d).max()))
    return d + min(lowest, 0.0) - rounding
