"""What the residual stream of a shortened model should be after each addition of a kept block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .shelf import Held
from .walk import Walk


@dataclass(frozen=True)
class Aim:
    """The original at one kept block, for one batch of text; hidden states are (batch, length, width).

    streams: its residual stream where it enters the block, and after each of the block's additions.
    wanted: what enters the next sub-layer that is kept after the block, or leaves the last block.
    branches: which of the block's additions the shortened model still makes; empty: all.
    """

    streams: tuple[Held, ...]
    wanted: Held
    branches: tuple[int, ...] = ()

    def after(self, addition: int) -> Tensor:
        """What the shortened model's stream should be after an addition of the block that it still makes.

        What is added behind the block by what is gone is shared out evenly over the additions: of two, the first should
        bring half of it.
        """
        branches = self.branches or tuple(range(len(self.streams) - 1))
        later = [branch for branch in branches if branch > addition]
        if not later:
            return self.wanted.get()
        share = 1 - len(later) / len(branches)
        here, wanted = self.streams[branches[-1] + 1].get().float(), self.wanted.get().float()
        return self.streams[later[0]].get().float() + share * (wanted - here)


def aims_at(theirs: Walk, block: int, end: int, branches: tuple[int, ...] = (), first: int = 0) -> list[Aim]:
    """The aims of a block for each batch; takes the original's walk to `end`, where the block's successor begins.

    branches: of the block, that are kept; empty: all. first: the first branch that the successor keeps.
    """
    while theirs.block < block:
        theirs.step()
    entering = list(theirs.streams)
    between = theirs.step()  # [batch][addition but the last], (batch, length, width)
    after = list(theirs.streams)
    while theirs.block < end:
        theirs.step()

    # The successor may have lost its first branches too.
    goals = list(theirs.streams)
    if first > 0:
        with theirs.resident():
            goals = [theirs.shelf.keep(theirs.look(number).additions[first - 1]) for number in range(len(goals))]

    aims = []
    for enters, middle, last, wanted in zip(entering, between, after, goals, strict=True):
        aims.append(Aim((enters, *middle, last), wanted, branches))
    return aims
