"""The removal problem as solvers read it: reduced to what is open, for ours; QUBO, Ising, BQM, CQM, COO for others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .constraints import Constraints, Floats, Ints


@dataclass(frozen=True, eq=False)
class Reduced(Constraints):
    """What a solver sees: which removals y (n,) of the blocks whose fate is open are allowed, and their energy.

    It is constant + y^T quadratic y + linear^T y.
    """

    quadratic: Floats  # (n, n) symmetric
    linear: Floats  # (n,)
    constant: float


class Views:
    """The methods of a problem that state it for other solvers, over binary x (n,) for the blocks in reduced.block.

    All but `to_cqm` turn the counts into a penalty, and raise ValueError for budgets, which have no such view: they are
    inequalities.
    """

    reduced: Reduced

    def penalty(self) -> float:
        """A weight of the counts in the QUBO view under which its lowest states are allowed ones: twice a safe bound.

        With weight P, a removal that misses a count gains at least P - D by one change towards it, where D bounds what
        one change does to the energy. So for P > D the lowest state is allowed, and so is every state less than P - D
        above it.
        """
        r = self.reduced
        _refuse_budget(r)
        if not len(r.block):
            return 1.0

        own = np.diag(r.quadratic)  # (n,)
        others = np.abs(r.quadratic).sum(axis=1) - np.abs(own)  # (n,)
        change = np.abs(own + r.linear) + 2.0 * others  # (n,) D for each variable
        return 2.0 * float(change.max()) or 1.0

    def qubo(self, penalty: float | None = None) -> tuple[Floats, float]:
        """Symmetric Q (n, n) and an offset: x^T Q x + offset is E(x) plus penalty times the squared misses of counts.

        penalty is by default that of penalty().
        """
        r = self.reduced
        _refuse_budget(r)
        weight = self.penalty() if penalty is None else penalty

        # weight * (sum_g x - count_g)^2 for every group g, with x_i^2 = x_i.
        same_group = (r.group[:, None] == r.group[None, :]).astype(np.float64)  # (n, n)
        q = r.quadratic + weight * same_group
        q[np.diag_indices(len(q))] += r.linear - 2.0 * weight * r.quota[r.group]
        return q, r.constant + weight * float(r.quota @ r.quota)

    def ising(self, penalty: float | None = None) -> tuple[Floats, Floats, float]:
        """h (n,), J (n, n) upper triangular and an offset: the QUBO view in spins s = 2x - 1.

        Its energy is h^T s + s^T J s + offset.
        """
        q, offset = self.qubo(penalty)
        fields, couplings = q.sum(axis=1) / 2.0, np.triu(q, 1) / 2.0
        return fields, couplings, offset + float(q.sum() + np.trace(q)) / 4.0

    def to_bqm(self, penalty: float | None = None) -> Any:
        """The QUBO view as a dimod.BinaryQuadraticModel whose variables are block indices; needs dimod."""
        q, offset = self.qubo(penalty)
        return _binary_model(self.reduced.block, q, np.diag(q), offset)

    def to_cqm(self) -> Any:
        """A dimod.ConstrainedQuadraticModel with counts and budgets as constraints; needs dimod."""
        import dimod

        r, names = self.reduced, self.reduced.block.tolist()
        model = dimod.ConstrainedQuadraticModel()
        model.set_objective(_binary_model(r.block, r.quadratic, np.diag(r.quadratic) + r.linear, r.constant))
        for g, count in enumerate(r.quota):
            members = [(names[i], 1.0) for i in np.flatnonzero(r.group == g)]
            model.add_constraint(members, "==" if r.exactly else "<=", count)
        for weight, least in zip(r.weight, r.least, strict=True):
            model.add_constraint(list(zip(names, weight.tolist(), strict=True)), ">=", least)
        return model

    def write_coo(self, path: str | Path, penalty: float | None = None) -> None:
        """The QUBO view as text: comments with the offset, then a line "i j value" per pair i <= j of block indices.

        The energy is the sum of value * x_i * x_j plus the offset.
        """
        q, offset = self.qubo(penalty)
        names = self.reduced.block.tolist()
        lines = ["# vartype=BINARY", f"# offset={offset!r}"]
        for i, j in zip(*np.triu_indices(len(q)), strict=True):
            value = float(q[i, j] if i == j else 2.0 * q[i, j])
            lines.append(f"{names[i]} {names[j]} {value!r}")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _refuse_budget(reduced: Reduced) -> None:
    if not reduced.exactly or len(reduced.least):
        raise ValueError("a budget has no QUBO view; use to_cqm(), or a count of removals")


def _binary_model(block: Ints, quadratic: Floats, diagonal: Floats, offset: float) -> Any:
    """A dimod.BinaryQuadraticModel of x^T quadratic x + offset, with this diagonal (n,) in place of its own."""
    import dimod

    names = block.tolist()
    linear = dict(zip(names, diagonal, strict=True))
    couplings = {}
    for i, j in zip(*np.triu_indices(len(names), 1), strict=True):
        couplings[names[i], names[j]] = 2.0 * quadratic[i, j]
    return dimod.BinaryQuadraticModel(linear, couplings, offset, dimod.BINARY)
