"""What may go and how much must: goals, and the constraints that they put on a removal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .constraints import Budget, Constraints, Removal, completion, fullest, whole
from .units import Block

Goal = int | dict[str, int] | float  # what must go: so many blocks, so many of each kind, a share of the parameters


def check_goal(
    blocks: Sequence[Block], goal: Goal | None, protect: Iterable[int] = (), budgets: Sequence[Budget] = ()
) -> None:
    """Refuse goals that no removal meets.

    goal: a number of blocks, a number for each kind, (a float) a share of the parameters, or None: budgets only.
    protect: indices of blocks that must stay.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    remove: int | dict[str, int] | None
    if isinstance(goal, float):
        remove, budgets = None, [share_of_parameters(goal, blocks), *budgets]
    else:
        remove = goal
    constraints_of(remove, budgets, len(blocks), blocks, checked_protect(protect, len(blocks)))


def goal_name(goal: Goal | None, budgets: Sequence[Budget] = ()) -> str:
    """A goal and budgets in a few words, by which two are told apart: "8", "8, --target-size 5GB"; "" for neither."""
    numbers = [] if goal is None else [str(goal)]
    return ", ".join([*numbers, *(budget.goal for budget in budgets)])


def checked_protect(protect: Iterable[int], num_blocks: int) -> Removal:
    """The protected blocks, sorted. Raises ValueError where one is no index of a block."""
    indices = sorted({whole(i, "protect") for i in protect})
    if indices and not 0 <= indices[0] <= indices[-1] < num_blocks:
        wrong = next(index for index in indices if not 0 <= index < num_blocks)
        raise ValueError(f"protect: block indices are 0 to {num_blocks - 1}, not {wrong} (--protect)")
    return tuple(indices)


def share_of_parameters(share: float, blocks: Sequence[Block] | None) -> Budget:
    """At least this share of the parameters that all the blocks hold together, as a budget.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    if blocks is None:
        raise ValueError("remove_parameters needs blocks=, which says the number of parameters of every block")
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"remove_parameters={share}: must be a share between 0 and 1")
    sizes = tuple([whole(block.num_parameters, "num_parameters") for block in blocks])
    total = sum(sizes)
    return Budget(f"remove_parameters={share}", sizes, math.ceil(share * total), total)


def constraints_of(
    remove: int | Mapping[str, int] | None,
    budgets: Sequence[Budget],
    num_blocks: int,
    blocks: Sequence[Block] | None,
    protect: Removal,
) -> Constraints:
    """The constraints of a number of blocks, or of one for each kind (which needs blocks), and of budgets.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    for budget in budgets:
        if len(budget.weight) != num_blocks:
            raise ValueError(f"{budget.goal}: has {len(budget.weight)} weights for {num_blocks} blocks")
    open_to = [i for i in range(num_blocks) if i not in protect]
    wanted = [budget for budget in budgets if budget.least > 0]
    if remove is not None:
        constraints = _counted(remove, num_blocks, blocks, open_to)
    elif wanted:
        constraints = _constraints(open_to, [], [0] * len(open_to), [_most(open_to, num_blocks)], exactly=False)
    else:
        met = ", ".join(budget.goal for budget in budgets)
        raise ValueError(f"{met}: the model meets that already, with nothing removed")

    # One budget after the other, so that the first that is out of reach can be named.
    gone = list(constraints.always)
    for number, budget in enumerate(wanted):
        weight = np.array(budget.weight, dtype=np.float64)  # (num_blocks,)
        given = int(weight[gone].sum())
        own = weight[constraints.block]  # (n,)
        longer = replace(
            constraints,
            weight=np.vstack([constraints.weight, own]),
            least=np.append(constraints.least, budget.least - given),
        )
        if completion(longer, np.zeros(len(own), dtype=bool)) is None:
            nearest = fullest(constraints, own, np.zeros(len(own), dtype=bool))
            most = given + (0 if nearest is None else int(own[nearest].sum()))
            raise ValueError(budget.out_of_reach(most, wanted[:number]))
        constraints = longer
    return constraints if constraints.exactly else _without_forced(constraints, num_blocks)


def _counted(
    remove: int | Mapping[str, int], num_blocks: int, blocks: Sequence[Block] | None, open_to: list[int]
) -> Constraints:
    """The constraints of a number of blocks, or of one for each kind. open_to: blocks that are not protected."""
    if not isinstance(remove, Mapping):
        wanted, kind_of = {"": _checked_count(remove, num_blocks, len(open_to))}, [""] * num_blocks
    elif blocks is None:
        raise ValueError("remove by kind needs blocks=, which says the kind of every block")
    else:
        kind_of = [block.kind for block in blocks]
        wanted = _checked_counts(remove, kind_of, open_to)

    index: list[int] = []
    group: list[int] = []
    counts: list[int] = []
    always: list[int] = []
    for kind, count in wanted.items():
        members = [i for i in open_to if kind_of[i] == kind]
        if count == len(members):  # nothing is open: all of them go
            always += members
            continue
        index += members
        group += [len(counts)] * len(members)
        counts.append(count)
    return _constraints(index, always, group, counts, exactly=True)


def _checked_count(remove: int, num_blocks: int, num_open: int) -> int:
    count = whole(remove, "remove")
    if num_blocks == 1:
        raise ValueError(f"remove={count}: must be fewer than the 1 block of the model, so none can be removed")
    if not 1 <= count < num_blocks:
        raise ValueError(f"remove={count}: must be at least 1 and fewer than the {num_blocks} blocks")
    if count > num_open:
        raise ValueError(
            f"remove={count}: only {num_open} of {num_blocks} blocks are not protected; remove or protect fewer"
        )
    return count


def _checked_counts(remove: Mapping[str, int], kind_of: list[str], open_to: list[int]) -> dict[str, int]:
    """The number to remove of each kind. kind_of: the kind of every block; open_to: those that are not protected."""
    have = Counter(kind_of)
    free = Counter([kind_of[i] for i in open_to])
    wanted = {}
    for kind, number in remove.items():
        wanted[kind] = whole(number, f"remove[{kind!r}]")

    for kind, count in wanted.items():
        if kind not in have:
            raise ValueError(f"remove: no block is of kind {kind!r}; the kinds are {', '.join(sorted(have))}")
        if not 1 <= count <= free[kind]:
            raise ValueError(
                f"remove: {count} of kind {kind!r}: must be 1 to {free[kind]}, the unprotected blocks of it"
            )

    total, num_blocks = sum(wanted.values()), len(kind_of)
    if not 1 <= total < num_blocks:
        raise ValueError(f"remove: {total} in all: must be at least 1 and fewer than the {num_blocks} blocks")
    return wanted


def _without_forced(constraints: Constraints, num_blocks: int) -> Constraints:
    """The constraints of budgets alone, less the blocks without which one cannot be reached: they always go."""
    c = constraints
    spare = c.weight.sum(axis=1) - c.least  # (budgets,)
    forced = np.any(c.weight > spare[:, None], axis=0)  # (n,)
    always = c.block[forced].tolist()
    most = _most(c.block[~forced].tolist(), num_blocks - len(always))
    least = c.least - c.weight[:, forced].sum(axis=1)

    # Where nothing more may go, nothing is open.
    index = c.block[~forced].tolist() if most else []
    shorter = _constraints(index, always, [0] * len(index), [most], exactly=False)
    weight = c.weight[:, ~forced][:, : len(index)]
    return replace(shorter, weight=weight[least > 0], least=least[least > 0])


def _most(open_to: list[int], num_blocks: int) -> int:
    """How many of these blocks may go, of so many that are there: one stays."""
    return min(len(open_to), num_blocks - 1)


def _constraints(
    index: list[int], always: list[int], group: list[int], count: list[int], *, exactly: bool
) -> Constraints:
    """Constraints without budgets, as arrays. index, group: of each open block."""
    return Constraints(
        block=np.array(index, dtype=np.int64),
        always=tuple(sorted(always)),
        group=np.array(group, dtype=np.int64),
        quota=np.array(count, dtype=np.float64),
        exactly=exactly,
        weight=np.zeros((0, len(index))),
        least=np.zeros(0),
    )
