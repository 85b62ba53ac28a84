"""Which blocks of the original a shortened model still has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..model.blocks import check_removal, find_stack
from ..model.offload import offloaded_by_name
from ..model.tracing import trace_model


def kept_blocks(shortened: nn.Module, original: nn.Module, removed: Sequence[int] | None = None) -> list[int]:
    """For each block of the shortened model its index in the original, proven by comparing all their weights.

    Blocks of the shortened model may lack tensors of the original's, as those that lost a sub-layer do.

    removed: the blocks that are gone; None: found by comparing weights.

    Raises:
        ValueError: the models do not belong together, no block is gone, or weights were changed already or are not
            finite.
    """
    ours, theirs = _Weights(shortened, "shortened model"), _Weights(original, "original")
    if len(ours.layers) > len(theirs.layers) or ours.layers.state_dict().keys() == theirs.layers.state_dict().keys():
        raise ValueError(
            f"the shortened model has {len(ours.layers)} blocks and the original {len(theirs.layers)}: no block is "
            "gone; name the shortened model first and the original second"
        )
    ours.check_finite()
    theirs.check_finite()
    if not _equal(_embedding(shortened), _embedding(original)):
        raise ValueError(
            "the two models have different token embeddings: the one was not made of the other (--original)"
        )

    if removed is None:
        kept = _matched(ours, theirs)
    else:
        removed = check_removal(removed, len(theirs.layers))
        kept = [i for i in range(len(theirs.layers)) if i not in removed]
        if len(kept) != len(ours.layers):
            raise ValueError(
                f"without the blocks {list(removed)} the original has {len(kept)} blocks, but the shortened model "
                f"{len(ours.layers)}; check what was removed"
            )
        for position, block in enumerate(kept):
            if not _same_weights(ours.of_block(position), theirs.of_block(block)):
                raise ValueError(_differs(position, f"block {block}"))
    return kept


@dataclass(frozen=True)
class _Weights:
    """The weights of a model, of which offloaded ones are read block by block. which: the model, for messages."""

    model: nn.Module
    which: str

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return find_stack(self.model).layers

    def check_finite(self) -> None:
        """Refuse weights that are not finite; offloaded ones of blocks are refused when they are read.

        Raises:
            ValueError: names them.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.device.type != "meta":
                self._check(name, parameter)

    def of_block(self, block: int) -> dict[str, Tensor]:
        """All tensors of a block, by their names in it.

        Raises:
            ValueError: an offloaded one is not finite.
        """
        layer: nn.Module = self.layers[block]
        found: dict[str, Tensor] = dict(layer.state_dict())
        for name, tensor in offloaded_by_name(layer).items():
            found[name] = tensor.load()
            self._check(f"{find_stack(self.model).name}.{block}.{name}", found[name])
        return found

    def _check(self, name: str, tensor: Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the weights {name} of the {self.which} are not finite; check the checkpoint")


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


def _matched(ours: _Weights, theirs: _Weights) -> list[int]:
    """The first blocks of the original, in order, that equal those of the shortened model."""
    kept: list[int] = []
    for position in range(len(ours.layers)):
        weights = ours.of_block(position)
        start = kept[-1] + 1 if kept else 0
        equal = (i for i in range(start, len(theirs.layers)) if _same_weights(weights, theirs.of_block(i)))
        first = next(equal, None)
        if first is None:
            raise ValueError(_differs(position, "any block"))
        kept.append(first)
    return kept


def _differs(position: int, block: str) -> str:
    return (
        f"block {position} of the shortened model has other weights than {block} of the original: it is of another "
        "model, or was repaired or trained already; repair the checkpoint that `blockspin prune` wrote, with the model "
        "that it was made of (--original)"
    )


def _embedding(model: nn.Module) -> Tensor:
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    loaded = offloaded_by_name(embedding)
    return loaded["weight"].load() if "weight" in loaded else embedding.get_parameter("weight")


def _same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of one block are equal to those that the other has by the same names."""
    return ours.keys() <= theirs.keys() and all(_equal(tensor, theirs[name]) for name, tensor in ours.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    shared = a.data_ptr() == b.data_ptr() and a.device == b.device and a.stride() == b.stride()
    return shared or torch.equal(a, b.to(a.device))
