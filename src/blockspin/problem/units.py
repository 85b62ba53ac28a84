"""What one spin stands for: a block, or one residual branch of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Units = Literal["blocks", "sublayers"]
NOUNS: dict[Units, str] = {"blocks": "blocks", "sublayers": "sub-layers"}  # what several are called


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


@dataclass(frozen=True)
class Sublayer(Block):
    """A removable unit that is one residual branch of a block, with the norms that serve it alone.

    index: position among the sub-layers of the original model, from 0, in the order of blocks and branches.
    kind: what the branch holds, e.g. "attention", "mlp".
    block: index of the block. branch: which of its branches, from 0; None: the whole block, where they cannot be told
        apart.
    """

    block: int
    branch: int | None


def block_of(unit: Block) -> int:
    """The index of the block that a unit is, or is in."""
    return unit.block if isinstance(unit, Sublayer) else unit.index


def units_of(units: Sequence[Block] | None) -> Units:
    """What the units of a problem are; blocks where nothing is said of them."""
    return "sublayers" if units and isinstance(units[0], Sublayer) else "blocks"
