"""The removal problem: which blocks may go, how many must, and what a removal costs.

A removal is a binary vector x over the N blocks, 1 = removed. Its energy is

    E(x) = x^T H x + 2 beta g^T x

with H the Hessian of the loss with respect to the block gates and g its gradient (the method uses beta = 0).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Removal = tuple[int, ...]  # the sorted indices of the blocks that go
Goal = int | dict[str, int] | float  # what must go: so many blocks, so many of each kind, a share of the parameters


@dataclass(frozen=True)
class Block:
    """A removable unit: one decoder layer with all its residual branches.

    index: position in the original model, from 0.
    kind: what the block holds, e.g. "attention+mlp", "attention+moe", "mamba".
    num_parameters: parameters inside the block.
    """

    index: int
    kind: str
    num_parameters: int


class Reduced(NamedTuple):
    """What a solver sees: only the n blocks whose fate is open, those of one group next to each other.

    The energy of a removal is constant + y^T quadratic y + linear^T y over binary y (n,). It is allowed when, for
    every group, the sum of weight * y equals need (equality) or reaches it (a parameter budget: one group), and at
    most max_removed entries are 1.
    """

    block: Ints  # (n,) the block each variable stands for
    always: tuple[int, ...]  # blocks that every allowed removal contains
    quadratic: Floats  # (n, n) symmetric
    linear: Floats  # (n,)
    constant: float
    group: Ints  # (n,) ascending from 0
    weight: Floats  # (n,) ones, or numbers of parameters; whole numbers
    need: Floats  # (number of groups,) whole numbers
    equality: bool
    max_removed: int


class RemovalProblem:
    """Minimise E(x) over the removals of an exact number of blocks, or of a share of the parameters.

    hessian: (N, N), symmetric to rounding, finite, in any scale; indefinite is allowed.
    remove: how many blocks to remove in all, or of each kind: {"moe": 2} removes two blocks of that kind and none of
        any other (needs blocks).
    blocks: the N blocks in order, with .kind and .num_parameters.
    protect: indices of blocks that must stay.
    beta: weight of the first-order term; needs gradient, (N,).
    remove_parameters: instead of remove: remove at least this share (between 0 and 1) of the parameters that all the
        blocks hold together (needs blocks). At least one block always stays.

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
    ) -> None:
        self.hessian = _checked_hessian(hessian)
        self.num_blocks = len(self.hessian)
        self.blocks = None if blocks is None else tuple(blocks)
        self.protect = _checked_protect(protect, self.num_blocks)
        self.beta, self.gradient = _checked_first_order(beta, gradient, self.num_blocks)
        self.linear: Floats = 2.0 * self.beta * self.gradient
        if self.blocks is not None and len(self.blocks) != self.num_blocks:
            raise ValueError(f"blocks has {len(self.blocks)} entries but the Hessian is for {self.num_blocks} blocks")
        if (remove is None) == (remove_parameters is None):
            raise ValueError("give exactly one of remove (a number of blocks) and remove_parameters (a share)")
        self.remove, self.remove_parameters = remove, remove_parameters
        self.reduced = self._reduce_to_budget() if remove is None else self._reduce_to_counts()

    def __repr__(self) -> str:
        goal = f"remove={self.remove}" if self.remove is not None else f"remove_parameters={self.remove_parameters}"
        extra = "".join(
            f", {name}={value}" for name, value in (("protect", self.protect), ("beta", self.beta)) if value
        )
        return f"RemovalProblem({self.num_blocks} blocks, {goal}{extra})"

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
        return np.array([self.energy(np.flatnonzero(row)) for row in rows])

    def allows(self, removed: Iterable[int]) -> bool:
        """Whether removing these blocks meets every constraint."""
        chosen = set(removed)
        r = self.reduced
        picked = np.array([int(i) in chosen for i in r.block], dtype=bool)
        if len(chosen) != picked.sum() + len(r.always) or not chosen.issuperset(r.always):
            return False
        total = np.bincount(r.group[picked], r.weight[picked], minlength=len(r.need))
        met = np.array_equal(total, r.need) if r.equality else bool(np.all(total >= r.need))
        return met and picked.sum() <= r.max_removed

    def with_energy(self, hessian: ArrayLike, gradient: ArrayLike | None = None) -> RemovalProblem:
        """The same removals with another energy; the gradient stays where none is given."""
        return self._with(hessian=hessian, gradient=self.gradient if gradient is None else gradient)

    def with_protected(self, protect: Iterable[int]) -> RemovalProblem:
        """The same energy and goal with other protected blocks. Raises ValueError where the goal is out of reach."""
        return self._with(protect=protect)

    def _with(self, **changes: Any) -> RemovalProblem:
        names = ("hessian", "remove", "blocks", "protect", "beta", "gradient", "remove_parameters")
        return RemovalProblem(**{name: getattr(self, name) for name in names} | changes)

    @property
    def num_candidates(self) -> int:
        """How many subsets an enumeration looks at: the allowed ones, or every subset if there is a budget."""
        r = self.reduced
        if not r.equality:
            return 1 << len(r.block)
        sizes = np.bincount(r.group, minlength=len(r.need))
        return math.prod(math.comb(n, int(m)) for n, m in zip(sizes.tolist(), r.need.tolist(), strict=True))

    @property
    def resolution(self) -> float:
        """Energies closer than this count as equal: the rounding of float64 searches stays below it."""
        r = self.reduced
        if not len(r.block):
            return 0.0
        slopes = np.abs(r.quadratic).sum(axis=1) + np.abs(r.linear)
        return 1e-12 * len(r.block) * float(slopes.max()) + 1e-15 * abs(r.constant)

    def blocks_of(self, rows: NDArray[np.bool_]) -> list[tuple[int, ...]]:
        """The removals, as sorted tuples of block indices, of rows (K, n) over the reduced problem's variables."""
        r = self.reduced
        return [tuple(sorted([*r.always, *r.block[row].tolist()])) for row in rows]

    def penalty(self) -> float:
        """A weight of the counts in the QUBO view under which its lowest states are allowed ones: twice a safe bound.

        With weight P, a removal that misses a count gains at least P - D by one change towards it, where D bounds what
        one change does to the energy. So for P > D the lowest state is allowed, and so is every state less than P - D
        above it. Raises ValueError for a parameter budget, which needs an inequality.
        """
        r = self.reduced
        if not r.equality:
            raise ValueError("a parameter budget has no QUBO view; use to_cqm(), or a count of removals")
        if not len(r.block):
            return 1.0
        off = np.abs(r.quadratic).sum(axis=1) - np.abs(np.diag(r.quadratic))
        return 2.0 * float((np.abs(np.diag(r.quadratic) + r.linear) + 2.0 * off).max()) or 1.0

    def qubo(self, penalty: float | None = None) -> tuple[Floats, float]:
        """Symmetric Q (n, n) and an offset: x^T Q x + offset is E(x) plus penalty times the squared misses of counts.

        Over binary x (n,) for the blocks in reduced.block. penalty is by default that of penalty(). Raises ValueError
        for a parameter budget.
        """
        r, weight = self.reduced, self.penalty() if penalty is None else penalty
        if not r.equality:
            raise ValueError("a parameter budget has no QUBO view; use to_cqm(), or a count of removals")
        same_group = (r.group[:, None] == r.group[None, :]).astype(np.float64)
        q = r.quadratic + weight * same_group
        q[np.diag_indices(len(q))] += r.linear - 2.0 * weight * r.need[r.group]
        return q, r.constant + weight * float(r.need @ r.need)

    def ising(self, penalty: float | None = None) -> tuple[Floats, Floats, float]:
        """h (n,), J (n, n) upper triangular and an offset: the QUBO view in spins s = 2x - 1.

        Its energy is h^T s + s^T J s + offset. Raises ValueError for a parameter budget.
        """
        q, offset = self.qubo(penalty)
        return q.sum(axis=1) / 2.0, np.triu(q, 1) / 2.0, offset + float(q.sum() + np.trace(q)) / 4.0

    def to_bqm(self, penalty: float | None = None) -> Any:
        """The QUBO view as a dimod.BinaryQuadraticModel whose variables are block indices; needs dimod.

        Raises ValueError for a parameter budget.
        """
        import dimod

        q, offset = self.qubo(penalty)
        names = self.reduced.block.tolist()
        pairs = zip(*np.triu_indices(len(q), 1), strict=True)
        return dimod.BinaryQuadraticModel(
            {name: q[i, i] for i, name in enumerate(names)},
            {(names[i], names[j]): 2.0 * q[i, j] for i, j in pairs},
            offset,
            dimod.BINARY,
        )

    def to_cqm(self) -> Any:
        """A dimod.ConstrainedQuadraticModel with the counts, or the budget, as constraints; needs dimod."""
        import dimod

        r, names = self.reduced, self.reduced.block.tolist()
        model = dimod.ConstrainedQuadraticModel()
        pairs = zip(*np.triu_indices(len(names), 1), strict=True)
        model.set_objective(
            dimod.BinaryQuadraticModel(
                {name: r.quadratic[i, i] + r.linear[i] for i, name in enumerate(names)},
                {(names[i], names[j]): 2.0 * r.quadratic[i, j] for i, j in pairs},
                r.constant,
                dimod.BINARY,
            )
        )
        for g, need in enumerate(r.need):
            terms = [(names[i], r.weight[i]) for i in np.flatnonzero(r.group == g)]
            model.add_constraint(terms, "==" if r.equality else ">=", need)
        model.add_constraint([(name, 1.0) for name in names], "<=", r.max_removed)
        return model

    def write_coo(self, path: str | Path, penalty: float | None = None) -> None:
        """The QUBO view as text: comments with the offset, then a line "i j value" per pair i <= j of block indices.

        The energy is the sum of value * x_i * x_j plus the offset. Raises ValueError for a parameter budget.
        """
        q, offset = self.qubo(penalty)
        names = self.reduced.block.tolist()
        lines = ["# vartype=BINARY", f"# offset={offset!r}"]
        for i, j in zip(*np.triu_indices(len(q)), strict=True):
            lines.append(f"{names[i]} {names[j]} {float(q[i, j] if i == j else 2.0 * q[i, j])!r}")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _reduce_to_counts(self) -> Reduced:
        open_to = [i for i in range(self.num_blocks) if i not in self.protect]
        wanted, kind_of = self._checked_counts(open_to)
        index: list[int] = []
        group: list[int] = []
        need: list[int] = []
        always: list[int] = []
        for kind, count in wanted.items():
            members = [i for i in open_to if kind_of[i] == kind]
            if count == len(members):
                always += members
            else:
                index += members
                group += [len(need)] * len(members)
                need.append(count)
        return self._reduced(index, always, group, np.ones(len(index)), need, equality=True)

    def _checked_counts(self, open_to: list[int]) -> tuple[dict[str, int], list[str]]:
        """The number to remove of each kind, and the kind of every block; one kind, "", if the count is for all."""
        n, remove = self.num_blocks, self.remove
        if not isinstance(remove, Mapping):
            count = _whole(remove, "remove")
            if not 1 <= count < n:
                raise ValueError(f"remove={count}: must be at least 1 and fewer than the {n} blocks")
            if count > len(open_to):
                raise ValueError(f"remove={count}: only {len(open_to)} of {n} blocks are not protected")
            return {"": count}, [""] * n
        if self.blocks is None:
            raise ValueError("remove by kind needs blocks=, which says the kind of every block")
        kind_of = [block.kind for block in self.blocks]
        have, free = Counter(kind_of), Counter(kind_of[i] for i in open_to)
        wanted = {kind: _whole(count, f"remove[{kind!r}]") for kind, count in remove.items()}
        for kind, count in wanted.items():
            if kind not in have:
                raise ValueError(f"remove: no block is of kind {kind!r}; the kinds are {', '.join(sorted(have))}")
            if not 1 <= count <= free[kind]:
                raise ValueError(
                    f"remove: {count} of kind {kind!r}: must be 1 to {free[kind]}, the unprotected blocks of it"
                )
        if not 1 <= sum(wanted.values()) < n:
            raise ValueError(f"remove: {sum(wanted.values())} in all: must be at least 1 and fewer than the {n} blocks")
        return wanted, kind_of

    def _reduce_to_budget(self) -> Reduced:
        share = self.remove_parameters
        if self.blocks is None:
            raise ValueError("remove_parameters needs blocks=, which says the number of parameters of every block")
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ValueError(f"remove_parameters={share}: must be a share between 0 and 1")
        sizes = [_whole(block.num_parameters, "num_parameters") for block in self.blocks]
        if min(sizes) < 1:
            raise ValueError("remove_parameters needs blocks that each hold at least one parameter")
        index = [i for i in range(self.num_blocks) if i not in self.protect]
        most = sum(sizes[i] for i in index) - (min(sizes) if len(index) == self.num_blocks else 0)
        need = math.ceil(share * sum(sizes))
        if need > most:
            at_most = f"at most {most / sum(sizes):.6g} can go"
            raise ValueError(f"remove_parameters={share}: {at_most}: protected blocks, or the smallest one, stay")
        if need == sum(sizes[i] for i in index):
            return self._reduced([], index, [], np.zeros(0), [], equality=True)
        weight = np.array([sizes[i] for i in index], dtype=np.float64)
        return self._reduced(index, [], [0] * len(index), weight, [need], equality=False)

    def _reduced(
        self, index: list[int], always: list[int], group: list[int], weight: Floats, need: list[int], equality: bool
    ) -> Reduced:
        fate, fixed = np.array(index, dtype=np.int64), np.array(always, dtype=np.int64)
        return Reduced(
            block=fate,
            always=tuple(sorted(always)),
            quadratic=np.ascontiguousarray(self.hessian[np.ix_(fate, fate)]),
            linear=self.linear[fate] + 2.0 * self.hessian[np.ix_(fate, fixed)].sum(axis=1),
            constant=self.energy(always),
            group=np.array(group, dtype=np.int64),
            weight=weight,
            need=np.array(need, dtype=np.float64),
            equality=equality,
            max_removed=min(len(index), self.num_blocks - 1 - len(always)),
        )


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be a whole number")
    return int(value)


def _checked_hessian(hessian: ArrayLike) -> Floats:
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


def _checked_protect(protect: Iterable[int], num_blocks: int) -> tuple[int, ...]:
    indices = sorted({_whole(i, "protect") for i in protect})
    if indices and not 0 <= indices[0] <= indices[-1] < num_blocks:
        raise ValueError(f"protect={indices}: block indices are 0 to {num_blocks - 1}")
    return tuple(indices)


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
