"""Which blocks of the original a shortened model still has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.blocks import check_removal, find_stack
from ..model.tracing import trace_model


def kept_blocks(shortened: nn.Module, original: nn.Module, removed: Sequence[int] | None = None) -> list[int]:
    """For each block of the shortened model its index in the original, proven by comparing all their weights.

    Blocks of the shortened model may lack tensors of the original's, as those that lost a sub-layer do.

    removed: the blocks that are gone; None: found by comparing weights.

    Raises:
        ValueError: the models do not belong together, no block is gone, or weights were changed already or are not
            finite.
    """
    ours, theirs = find_stack(shortened).layers, find_stack(original).layers
    if len(ours) > len(theirs) or ours.state_dict().keys() == theirs.state_dict().keys():
        raise ValueError(
            f"the shortened model has {len(ours)} blocks and the original {len(theirs)}: no block is gone; name the "
            "shortened model first and the original second"
        )
    for model, which in ((shortened, "shortened model"), (original, "original")):
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"the weights {name} of the {which} are not finite; check the checkpoint")
    if not _equal(_embedding(shortened), _embedding(original)):
        raise ValueError(
            "the two models have different token embeddings: the one was not made of the other (--original)"
        )

    if removed is None:
        kept = _matched(ours, theirs)
    else:
        removed = check_removal(removed, len(theirs))
        kept = [i for i in range(len(theirs)) if i not in removed]
        if len(kept) != len(ours):
            raise ValueError(
                f"without the blocks {list(removed)} the original has {len(kept)} blocks, but the shortened model "
                f"{len(ours)}; check what was removed"
            )
    for position, block in enumerate(kept):
        if not _same_weights(ours[position], theirs[block]):
            raise ValueError(_differs(position, f"block {block}"))
    return kept


@dataclass(frozen=True)
class Kept:
    """A block that the shortened model still has.

    index: in the original. branches: those of its residual branches that are left; empty: all.
    """

    index: int
    branches: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The first of its residual branches."""
        return self.branches[0] if self.branches else 0


def kept_branches(shortened: nn.Module, original: nn.Module, kept: Sequence[int]) -> list[Kept]:
    """The blocks of the shortened model with the branches that they still have: those whose modules hold weights.

    kept: from `kept_blocks`.
    """
    ours, theirs = find_stack(shortened).layers, find_stack(original).layers
    are_whole = [ours[k].state_dict().keys() == theirs[i].state_dict().keys() for k, i in enumerate(kept)]
    if all(are_whole):
        return [Kept(i) for i in kept]

    traces = trace_model(original, "sublayers").traces
    found = []
    for layer, i, is_whole in zip(ours, kept, are_whole, strict=True):
        names = list(layer.state_dict())
        branches: list[int] = []
        for branch, parts in enumerate(traces[i].parts):
            held = [any(name.startswith(f"{part.name}.") for name in names) for part in parts]
            if all(held):
                branches.append(branch)
        found.append(Kept(i) if is_whole else Kept(i, tuple(branches)))
    return found


def _matched(ours: nn.ModuleList, theirs: nn.ModuleList) -> list[int]:
    """The first blocks of the original, in order, that equal those of the shortened model."""
    kept: list[int] = []
    for position, layer in enumerate(ours):
        start = kept[-1] + 1 if kept else 0
        equal = [i for i in range(start, len(theirs)) if _same_weights(layer, theirs[i])]
        if not equal:
            raise ValueError(_differs(position, "any block"))
        kept.append(equal[0])
    return kept


def _differs(position: int, block: str) -> str:
    return (
        f"block {position} of the shortened model has other weights than {block} of the original: it is of another "
        "model, or was repaired or trained already; repair the checkpoint that `blockspin prune` wrote, with the model "
        "that it was made of (--original)"
    )


def _embedding(model: nn.Module) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors of one block are equal to those that the other has by the same names."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() <= second.keys() and all(_equal(tensor, second[name]) for name, tensor in first.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    shared = a.data_ptr() == b.data_ptr() and a.device == b.device and a.stride() == b.stride()
    return shared or torch.equal(a, b.to(a.device))
