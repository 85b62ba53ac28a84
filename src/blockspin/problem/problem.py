"""The removal problem: which blocks may go, how many must, and what a removal costs.

A removal is a binary vector x over the N blocks, 1 = removed. Its energy is

    E(x) = x^T H x + 2 beta g^T x

with H the Hessian of the loss with respect to the block gates and g its gradient (the method uses beta = 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .constraints import Budget, Floats, Removal, met
from .goals import Goal, checked_protect, constraints_of, share_of_parameters
from .units import Block, Units, units_of
from .views import Reduced, Views


class RemovalProblem(Views):
    """Minimise E(x) over the removals of an exact number of blocks, of a share of the parameters, or under budgets.

    hessian: (N, N), symmetric to rounding, finite, in any scale; indefinite is allowed.
    remove: how many blocks to remove in all, or of each kind: {"moe": 2} removes two blocks of that kind and none of
        any other (needs blocks).
    blocks: the N blocks in order, with .kind and .num_parameters.
    protect: indices of blocks that must stay.
    beta: weight of the first-order term; needs gradient, (N,).
    remove_parameters: instead of remove: remove at least this share (between 0 and 1) of the parameters that all the
        blocks hold together (needs blocks). At least one block always stays.
    budgets: linear goals that all hold, besides remove or remove_parameters or without them.

    Raises ValueError saying what is wrong and what is allowed.
    """

    def __init__(
        self,
        hessian: ArrayLike,
        remove: int | Mapping[str, int] | None = None,
        *,
        blocks: Sequence[Block] | None = None,
        protect: Iterable[int] = (),
        beta: float = 0.0,
        gradient: ArrayLike | None = None,
        remove_parameters: float | None = None,
        budgets: Sequence[Budget] = (),
    ) -> None:
        self.hessian = _checked_hessian(hessian)
        self.num_blocks = len(self.hessian)
        self.blocks = None if blocks is None else tuple(blocks)
        self.protect = checked_protect(protect, self.num_blocks)
        self.beta, self.gradient = _checked_first_order(beta, gradient, self.num_blocks)
        self.linear: Floats = 2.0 * self.beta * self.gradient  # (N,)
        if self.blocks is not None and len(self.blocks) != self.num_blocks:
            raise ValueError(f"blocks has {len(self.blocks)} entries but the Hessian is for {self.num_blocks} blocks")

        given = (remove is not None) + (remove_parameters is not None)
        if given > 1 or (given == 0 and not budgets):
            raise ValueError("give exactly one of remove (a number of blocks) and remove_parameters (a share)")
        self.remove, self.remove_parameters, self.budgets = remove, remove_parameters, tuple(budgets)
        self.reduced = self._reduced()

    @classmethod
    def for_goal(
        cls,
        hessian: ArrayLike,
        goal: Goal | None,
        *,
        blocks: Sequence[Block],
        protect: Iterable[int] = (),
        beta: float = 0.0,
        gradient: ArrayLike | None = None,
        budgets: Sequence[Budget] = (),
    ) -> RemovalProblem:
        """The problem of a goal as users state it: a number of blocks, one for each kind, or (a float) a share of the
        parameters; None where budgets decide alone."""
        number, share = (None, goal) if isinstance(goal, float) else (goal, None)
        return cls(
            hessian,
            number,
            blocks=blocks,
            protect=protect,
            beta=beta,
            gradient=gradient,
            remove_parameters=share,
            budgets=budgets,
        )

    def __repr__(self) -> str:
        goals = [f"remove={self.remove}"] if self.remove is not None else []
        if self.remove_parameters is not None:
            goals.append(f"remove_parameters={self.remove_parameters}")
        goal = ", ".join([*goals, *(budget.goal for budget in self.budgets)])
        protect = f", protect={self.protect}" if self.protect else ""
        beta = f", beta={self.beta}" if self.beta else ""
        return f"RemovalProblem({self.num_blocks} blocks, {goal}{protect}{beta})"

    def energy(self, removed: Iterable[int]) -> float:
        """E of the removal of these blocks, correctly rounded, so that it depends on no order of summation."""
        chosen = np.fromiter(removed, dtype=np.int64)
        terms = self.hessian[np.ix_(chosen, chosen)].ravel().tolist()
        return math.fsum(terms + self.linear[chosen].tolist())

    def energies(self, removals: ArrayLike) -> Floats:
        """E of many removals given as a (K, N) array of zeros and ones, or True and False; returns (K,)."""
        rows = np.asarray(removals, dtype=bool)
        if rows.ndim != 2 or rows.shape[1] != self.num_blocks:
            raise ValueError(f"removals must be (K, {self.num_blocks}), not {rows.shape}")

        energies = np.zeros(len(rows))  # (K,)
        for k, row in enumerate(rows):
            energies[k] = self.energy(np.flatnonzero(row))
        return energies

    def allows(self, removed: Iterable[int]) -> bool:
        """Whether removing these blocks meets every constraint."""
        r, chosen = self.reduced, set(removed)
        picked = np.isin(r.block, list(chosen))  # (n,)
        if len(chosen) != picked.sum() + len(r.always) or not chosen.issuperset(r.always):
            return False
        return met(r, picked)

    def with_energy(self, hessian: ArrayLike, gradient: ArrayLike | None = None) -> RemovalProblem:
        """The same removals with another energy; the gradient stays where none is given."""
        return self._with(hessian, self.gradient if gradient is None else gradient, self.protect)

    def with_protected(self, protect: Iterable[int]) -> RemovalProblem:
        """The same energy and goal with other protected blocks. Raises ValueError where the goal is out of reach."""
        return self._with(self.hessian, self.gradient, protect)

    def _with(self, hessian: ArrayLike, gradient: ArrayLike, protect: Iterable[int]) -> RemovalProblem:
        return RemovalProblem(
            hessian,
            self.remove,
            blocks=self.blocks,
            protect=protect,
            beta=self.beta,
            gradient=gradient,
            remove_parameters=self.remove_parameters,
            budgets=self.budgets,
        )

    @property
    def units(self) -> Units:
        """What the numbers of a removal stand for: blocks, or sub-layers where `blocks` lists those."""
        return units_of(self.blocks)

    @property
    def num_candidates(self) -> int:
        """How many subsets an enumeration looks at: those of the right numbers of blocks, or every subset."""
        r = self.reduced
        if not r.exactly:
            return 1 << len(r.block)
        number = 1
        sizes = np.bincount(r.group, minlength=len(r.quota))  # (groups,)
        for n, m in zip(sizes.tolist(), r.quota.tolist(), strict=True):
            number *= math.comb(n, int(m))
        return number

    @property
    def resolution(self) -> float:
        """Energies closer than this count as equal: the rounding of float64 searches stays below it."""
        r = self.reduced
        if not len(r.block):
            return 0.0
        slopes = np.abs(r.quadratic).sum(axis=1) + np.abs(r.linear)
        return 1e-12 * len(r.block) * float(slopes.max()) + 1e-15 * abs(r.constant)

    def blocks_of(self, rows: NDArray[np.bool_]) -> list[Removal]:
        """The removals, as sorted tuples of block indices, of rows (K, n) over the reduced problem's variables."""
        r = self.reduced
        removals: list[Removal] = []
        for row in rows:
            removals.append(tuple(sorted([*r.always, *r.block[row].tolist()])))
        return removals

    def _reduced(self) -> Reduced:
        """The problem over the blocks whose fate is open; what always goes is in the linear term and the constant."""
        budgets = list(self.budgets)
        if self.remove_parameters is not None:
            budgets.insert(0, share_of_parameters(self.remove_parameters, self.blocks))
        constraints = constraints_of(self.remove, budgets, self.num_blocks, self.blocks, self.protect)

        open_, gone = constraints.block, np.array(constraints.always, dtype=np.int64)  # (n,), (N - n - kept,)
        coupling = self.hessian[np.ix_(open_, gone)].sum(axis=1)  # (n,) with the blocks that always go
        return Reduced(
            quadratic=np.ascontiguousarray(self.hessian[np.ix_(open_, open_)]),
            linear=self.linear[open_] + 2.0 * coupling,
            constant=self.energy(constraints.always),
            **vars(constraints),
        )


def _checked_hessian(hessian: ArrayLike) -> Floats:
    """The mean of the matrix and its mirror, read-only."""
    h = np.array(hessian, dtype=np.float64)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not len(h):
        raise ValueError(f"hessian must be a square matrix (N, N), not of shape {h.shape}")
    if not np.isfinite(h).all():
        row, column = np.argwhere(~np.isfinite(h))[0]
        raise ValueError(f"hessian must be finite: entry ({row}, {column}) is {h[row, column]}")

    apart = np.abs(h - h.T)
    if apart.max() > 1e-6 * np.abs(h).max():
        row, column = np.unravel_index(apart.argmax(), h.shape)
        raise ValueError(
            f"hessian must be symmetric: entries ({row}, {column}) and its mirror differ by {apart.max():.3g}; "
            "for the energy x^T H x, (H + H.T) / 2 is the same problem"
        )

    h = (h + h.T) / 2
    h.flags.writeable = False
    return h


def _checked_first_order(beta: float, gradient: ArrayLike | None, num_blocks: int) -> tuple[float, Floats]:
    if not math.isfinite(beta):
        raise ValueError(f"beta={beta}: must be a finite number")
    if gradient is None:
        if beta != 0:
            raise ValueError(f"beta={beta} needs gradient=, the mean gradient of the loss with respect to every gate")
        return 0.0, np.zeros(num_blocks)
    g = np.array(gradient, dtype=np.float64)
    if g.shape != (num_blocks,) or not np.isfinite(g).all():
        raise ValueError(f"gradient must be {num_blocks} finite numbers; its shape is {g.shape}")
    return float(beta), g
