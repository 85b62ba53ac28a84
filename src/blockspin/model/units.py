"""The sub-layers of a model as units, from what its blocks were seen to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..problem import Block, Sublayer
from .blocks import count_parameters, kind_of
from .branches import Part


def sublayers_of(
    layers: nn.ModuleList, blocks: Sequence[Block], seen: Sequence[tuple[int, Sequence[Sequence[Part]]]]
) -> list[Sublayer]:
    """The residual branches of all blocks; a block of one branch, or whose branches are not known, is one unit.

    seen: for each block its number of branches, 0 where they cannot be told apart, and the parts of each of several.
    """
    found: list[Sublayer] = []
    for layer, block, (number, parts) in zip(layers, blocks, seen, strict=True):
        if number < 2:
            branch = 0 if number else None
            found.append(Sublayer(len(found), block.kind, block.num_parameters, block.index, branch))
        else:
            for branch, (kind, size) in enumerate(_kinds_and_sizes(layer, parts)):
                found.append(Sublayer(len(found), kind, size, block.index, branch))
    return found


def _kinds_and_sizes(layer: nn.Module, parts: Sequence[Sequence[Part]]) -> Iterator[tuple[str, int]]:
    """The kind and the number of parameters of each branch of a block."""
    for of_branch in parts:
        names = [part.name for part in of_branch]
        yield kind_of(layer, names), sum(count_parameters(layer.get_submodule(name)) for name in names)
