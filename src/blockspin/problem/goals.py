"""What may go and how much must: goals, and the constraints that a goal puts on a removal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .units import Block

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Removal = tuple[int, ...]  # the sorted indices of the blocks that go
Goal = int | dict[str, int] | float  # what must go: so many blocks, so many of each kind, a share of the parameters


class Constraints(NamedTuple):
    """Which removals meet a goal, for the n blocks whose fate is open; those of one group are next to each other.

    A removal y (n,) is allowed when, for every group, the sum of weight * y equals need (equality) or reaches it (a
    parameter budget: one group), and at most max_removed entries are 1.
    """

    block: Ints  # (n,) the block each variable stands for
    always: Removal  # blocks that every allowed removal contains
    group: Ints  # (n,) ascending from 0
    weight: Floats  # (n,) ones, or numbers of parameters; whole numbers
    need: Floats  # (number of groups,) whole numbers
    equality: bool
    max_removed: int


def check_goal(blocks: Sequence[Block], goal: Goal, protect: Iterable[int] = ()) -> None:
    """Refuse a goal that no removal meets.

    goal: a number of blocks, a number for each kind, or (a float) a share of the parameters.
    protect: indices of blocks that must stay.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    protected = checked_protect(protect, len(blocks))
    if isinstance(goal, float):
        constraints_on_parameters(goal, blocks, protected)
    else:
        constraints_on_counts(goal, len(blocks), blocks, protected)


def checked_protect(protect: Iterable[int], num_blocks: int) -> Removal:
    """The protected blocks, sorted. Raises ValueError where one is no index of a block."""
    indices = sorted({whole(i, "protect") for i in protect})
    if indices and not 0 <= indices[0] <= indices[-1] < num_blocks:
        raise ValueError(f"protect={indices}: block indices are 0 to {num_blocks - 1}")
    return tuple(indices)


def constraints_on_counts(
    remove: int | Mapping[str, int], num_blocks: int, blocks: Sequence[Block] | None, protect: Removal
) -> Constraints:
    """The constraints of a number of blocks, or of one for each kind, which needs blocks.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    open_to = [i for i in range(num_blocks) if i not in protect]
    if not isinstance(remove, Mapping):
        wanted, kind_of = {"": _checked_count(remove, num_blocks, len(open_to))}, [""] * num_blocks
    elif blocks is None:
        raise ValueError("remove by kind needs blocks=, which says the kind of every block")
    else:
        kind_of = [block.kind for block in blocks]
        wanted = _checked_counts(remove, kind_of, open_to)

    index: list[int] = []
    group: list[int] = []
    need: list[int] = []
    always: list[int] = []
    for kind, count in wanted.items():
        members = [i for i in open_to if kind_of[i] == kind]
        if count == len(members):  # nothing is open: all of them go
            always += members
            continue
        index += members
        group += [len(need)] * len(members)
        need.append(count)

    weight = np.ones(len(index))
    return _constraints(num_blocks, index, always, group, weight, need, equality=True)


def constraints_on_parameters(share: float, blocks: Sequence[Block] | None, protect: Removal) -> Constraints:
    """The constraints of a share of the parameters that all the blocks hold together.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    if blocks is None:
        raise ValueError("remove_parameters needs blocks=, which says the number of parameters of every block")
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"remove_parameters={share}: must be a share between 0 and 1")
    sizes = [whole(block.num_parameters, "num_parameters") for block in blocks]
    if min(sizes) < 1:
        raise ValueError("remove_parameters needs blocks that each hold at least one parameter")

    # At least one block stays: the smallest, where none is protected.
    index = [i for i in range(len(blocks)) if i not in protect]
    open_parameters = 0
    for i in index:
        open_parameters += sizes[i]
    most = open_parameters - (0 if protect else min(sizes))
    need = math.ceil(share * sum(sizes))
    if need > most:
        at_most = f"at most {most / sum(sizes):.6g} can go"
        raise ValueError(f"remove_parameters={share}: {at_most}: protected blocks, or the smallest one, stay")

    if need == open_parameters:
        return _constraints(len(blocks), [], index, [], np.zeros(0), [], equality=True)
    weight = np.array(sizes, dtype=np.float64)[index]
    return _constraints(len(blocks), index, [], [0] * len(index), weight, [need], equality=False)


def whole(value: object, name: str) -> int:
    """A whole number, of whatever type. Raises ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be a whole number")
    return int(value)


def _checked_count(remove: int, num_blocks: int, num_open: int) -> int:
    count = whole(remove, "remove")
    if not 1 <= count < num_blocks:
        raise ValueError(f"remove={count}: must be at least 1 and fewer than the {num_blocks} blocks")
    if count > num_open:
        raise ValueError(f"remove={count}: only {num_open} of {num_blocks} blocks are not protected")
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


def _constraints(
    num_blocks: int,
    index: list[int],
    always: list[int],
    group: list[int],
    weight: Floats,
    need: list[int],
    equality: bool,
) -> Constraints:
    """The constraints as arrays. index, group, weight: of each open block. One block of the model always stays."""
    return Constraints(
        block=np.array(index, dtype=np.int64),
        always=tuple(sorted(always)),
        group=np.array(group, dtype=np.int64),
        weight=weight,
        need=np.array(need, dtype=np.float64),
        equality=equality,
        max_removed=min(len(index), num_blocks - 1 - len(always)),
    )
