"""What the residual stream of a shortened model should be after each addition of a kept block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .walk import Walk


@dataclass(frozen=True)
class Aim:
    """The original at one kept block, for one batch of text; tensors are (batch, length, width).

    streams: its residual stream where it enters the block, and after each of the block's additions.
    wanted: what enters the next kept block there, or leaves the last block.
    """

    streams: tuple[Tensor, ...]
    wanted: Tensor

    def after(self, addition: int) -> Tensor:
        """What the shortened model's stream should be after an addition of the block.

        What the removed blocks add is shared out evenly over the additions: of two, the first should bring half of it.
        """
        additions = len(self.streams) - 1
        if addition == additions - 1:
            return self.wanted
        share = (addition + 1) / additions
        here, wanted = self.streams[-1].float(), self.wanted.float()
        return self.streams[addition + 1].float() + share * (wanted - here)


def aims_at(theirs: Walk, block: int, end: int) -> list[Aim]:
    """The aims of a block for each batch; takes the original's walk to `end`, where the block's successor begins."""
    while theirs.block < block:
        theirs.step()
    entering = list(theirs.streams)
    between = theirs.step()  # [batch][addition but the last], (batch, length, width)
    after = list(theirs.streams)
    while theirs.block < end:
        theirs.step()

    aims = []
    for first, middle, last, wanted in zip(entering, between, after, theirs.streams, strict=True):
        aims.append(Aim((first, *middle, last), wanted))
    return aims
