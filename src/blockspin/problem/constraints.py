"""What a removal must meet: numbers of blocks, and budgets; and the removals that come nearest to that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..tables import short

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Row = NDArray[np.bool_]

Removal = tuple[int, ...]  # the sorted indices of the blocks that go


@dataclass(frozen=True)
class Budget:
    """A linear goal: the blocks that go must have at least `least` of something that the user counts.

    goal: as the user said it, for messages: "--target-size 5GB".
    weight: (num_blocks,) what each block has of it; whole numbers, so that sums are exact.
    total: what the whole model has of it.
    unit, scale: for messages, the unit of `scale` times a number: "B", or "s" where nanoseconds are counted.
    """

    goal: str
    weight: tuple[int, ...]
    least: int
    total: int
    unit: str = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        for value in self.weight:
            if whole(value, self.goal) < 0:
                raise ValueError(f"{self.goal}: a block has {value} of it; costs are not negative")

    def out_of_reach(self, most: int, others: Sequence[Budget]) -> str:
        """What to say where at most so much can go, with the other budgets met."""
        together = f" together with {', '.join(other.goal for other in others)}" if others else ""
        return (
            f"{self.goal}: out of reach{together}: at most {self.text(most)} of {self.text(self.total)} can go, so "
            f"{self.text(self.total - most)} stay; protected blocks stay, and one block always does"
        )

    def text(self, amount: float) -> str:
        """So much of it, in its unit."""
        return short(amount * self.scale, self.unit)


@dataclass(frozen=True, eq=False)
class Constraints:
    """Which removals meet a goal, for the n blocks whose fate is open; those of one group are next to each other.

    A removal y (n,) is allowed when `quota` blocks of every group go, exactly or (one group) at most, and every budget
    is reached: weight @ y >= least.
    """

    block: Ints  # (n,) the block each variable stands for
    always: Removal  # blocks that every allowed removal contains
    group: Ints  # (n,) ascending from 0
    quota: Floats  # (groups,) whole numbers
    exactly: bool
    weight: Floats  # (budgets, n) whole numbers
    least: Floats  # (budgets,) whole numbers


def rows_of(removals: Sequence[Removal], num_blocks: int) -> NDArray[np.bool_]:
    """(number of removals, num_blocks) bool: True where a removal takes a block."""
    rows = np.zeros((len(removals), num_blocks), dtype=bool)
    for row, removed in zip(rows, removals, strict=True):
        row[list(removed)] = True
    return rows


def whole(value: object, name: str) -> int:
    """A whole number, of whatever type. Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be a whole number")
    return int(value)


def met(constraints: Constraints, chosen: Row) -> bool:
    """Whether the removal chosen (n,) is allowed."""
    number = np.bincount(constraints.group[chosen], minlength=len(constraints.quota))  # (groups,)
    counts = number == constraints.quota if constraints.exactly else number <= constraints.quota
    return bool(np.all(counts) and np.all(constraints.weight @ chosen >= constraints.least))


def completion(constraints: Constraints, taken: Row) -> Row | None:
    """An allowed removal (n,) that contains all that is taken (n,); None where there is none."""
    c = constraints
    if not len(taken):
        return taken if met(c, taken) else None
    if not len(c.least):
        return fullest(c, np.zeros(len(taken)), taken)

    # The removal with the most of one budget, or of all together, often meets the others too.
    shares = c.weight / np.maximum(c.weight.max(axis=1, keepdims=True), 1.0)  # (budgets, n)
    without_budgets = replace(c, weight=c.weight[:0], least=c.least[:0])
    for weight in (shares.sum(axis=0), *shares):
        row = fullest(without_budgets, weight, taken)
        if row is not None and met(c, row):
            return row
    return None if len(c.least) == 1 else fullest(c, shares.sum(axis=0), taken)


def fullest(constraints: Constraints, weight: Floats, taken: Row) -> Row | None:
    """The allowed removal (n,) that contains all that is taken (n,) and has the most weight (n,), none negative.

    None where there is none.
    """
    c = constraints
    if not c.exactly:
        return _all_but_few(c, weight, taken)
    if len(c.least):
        return _by_integer_programme(c, weight, taken)

    row = taken.copy()
    for g, count in enumerate(c.quota):
        members = np.flatnonzero((c.group == g) & ~taken)
        lacking = int(count) - int(np.sum(taken & (c.group == g)))
        if not 0 <= lacking <= len(members):
            return None
        heaviest = members[np.argsort(-weight[members], kind="stable")]
        row[heaviest[:lacking]] = True
    return row


def _all_but_few(c: Constraints, weight: Floats, taken: Row) -> Row | None:
    """`fullest` without exact counts: all go, or all but one that the budgets do without."""
    if c.quota[0] >= len(taken):
        row = np.ones(len(taken), dtype=bool)
        return row if met(c, row) else None
    assert c.quota[0] == len(taken) - 1, "only one block must stay"

    for stays in np.argsort(weight, kind="stable"):
        row = np.ones(len(taken), dtype=bool)
        row[stays] = False
        if not taken[stays] and met(c, row):
            return row
    return None


def _by_integer_programme(c: Constraints, weight: Floats, taken: Row) -> Row | None:
    """`fullest` with counts and budgets, by HiGHS; every row is scaled to about 1, and what it finds is checked."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    largest = np.maximum(c.weight.max(axis=1), 1.0)  # (budgets,)
    members = np.arange(len(c.quota))[:, None] == c.group  # (groups, n)
    least = c.least.copy()
    for _ in range(3):
        rows = [
            LinearConstraint(members.astype(float), c.quota, c.quota),
            LinearConstraint(c.weight / largest[:, None], least / largest, np.inf),
        ]
        everyone = np.ones(len(taken))
        result = milp(-weight, constraints=rows, integrality=everyone, bounds=Bounds(taken.astype(float), everyone))
        if result.x is None:
            return None
        row: Row = result.x > 0.5
        if met(c, row):
            return row

        # What its tolerance lets through is asked of it once more.
        least = least + np.maximum(c.least - c.weight @ row, 0.0)
    return None
