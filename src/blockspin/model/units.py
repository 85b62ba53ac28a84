"""The sub-layers of a model as units, from what its blocks were seen to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from ..problem import Block, Sublayer
from .blocks import count_parameters, kind_of
from .branches import Part


def sublayers_of(
    layers: nn.ModuleList,
    blocks: Sequence[Block],
    seen: Sequence[tuple[int, Sequence[Sequence[Part]]]],
    lacking: Collection[int] = (),
) -> list[Sublayer]:
    """The residual branches of all blocks; a block of one branch, or whose branches are not known, is one unit.

    seen: for each block its number of branches, 0 where they cannot be told apart, and the parts of each of several.
    lacking: blocks that have lost modules: their branches without any are no units.
    """
    found: list[Sublayer] = []
    for layer, block, (number, parts) in zip(layers, blocks, seen, strict=True):
        if number < 2:
            branch = 0 if number else None
            found.append(Sublayer(len(found), block.kind, block.num_parameters, block.index, branch))
        else:
            for branch, of_branch in enumerate(parts):
                names = [part.name for part in of_branch]
                if names or block.index not in lacking:
                    size = sum(count_parameters(layer.get_submodule(name)) for name in names)
                    found.append(Sublayer(len(found), kind_of(layer, names), size, block.index, branch))
    return found


def lacking_modules(model: nn.Module, stack: str) -> dict[int, list[str]]:
    """For each block that lost modules to a removal of sub-layers their names inside it, as the configuration says.

    stack: the name of the list of the blocks in the model.
    """
    lost: dict[int, list[str]] = {}
    for name in getattr(model.config, "absent_modules", None) or ():
        block, _, inside = name.removeprefix(f"{stack}.").partition(".")
        lost.setdefault(int(block), []).append(inside)
    return lost
