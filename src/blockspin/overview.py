"""What a model is made of and what removing blocks would save, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .costs.units import active_parameters, cache_of_layers
from .model.blocks import count_parameters, find_blocks, find_stack
from .model.loading import context_length, load_config, model_without_weights
from .problem import Block
from .surgery.feasible import Removable
from .tables import Column, Table, ranges, short


@dataclass(frozen=True)
class Overview:
    """A model before anything is removed.

    num_bytes: of all weights in `dtype`. context: tokens that the model holds; None where its configuration sets no
    limit. cache_bytes: (num_blocks,) what one more token of a text adds to the key-value cache of each block, as long
    as no attention window is full; None where it cannot be told without running the model.
    active: (num_blocks,) parameters of each block that a token uses, without the experts that are not chosen.
    removable: (num_blocks,) whether a configuration describes the model without this one block.
    """

    model: str
    architecture: str
    dtype: str
    num_parameters: int
    num_bytes: int
    context: int | None
    blocks: tuple[Block, ...]
    cache_bytes: tuple[int, ...] | None
    active: tuple[int, ...]
    removable: tuple[bool, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """What the model is, in one line."""
        inside = sum(block.num_parameters for block in self.blocks)
        context = "" if self.context is None else f"; a context of {self.context:,} tokens"
        size = f"{short(self.num_parameters)} parameters ({short(self.num_bytes, 'B')} in {self.dtype})"
        share = f"{inside / self.num_parameters:.0%} of them in {len(self.blocks)} blocks"
        return f"{self.architecture}: {size}, {share}{context}"

    def blocks_table(self) -> Table:
        """A row for all blocks that are alike."""
        alike: dict[tuple[str, ...], list[int]] = {}
        each = self.num_bytes / self.num_parameters
        for i, block in enumerate(self.blocks):
            parameters = short(block.num_parameters)
            if self.active[i] < block.num_parameters:
                parameters += f" ({short(self.active[i])} active)"
            size = short(block.num_parameters * each, "B")
            cache = "unknown" if self.cache_bytes is None else f"{self.cache_bytes[i]:,} B"
            can_go = "yes" if self.removable[i] else "not alone"
            alike.setdefault((block.kind, parameters, size, cache, can_go), []).append(i)

        rows = []
        for costs, indices in alike.items():
            rows.append([ranges(indices), str(len(indices)), *costs])

        numbers = [Column("parameters each"), Column("bytes each"), Column("cache each, a token")]
        columns = [Column("blocks", words=True), Column("number"), Column("kind", words=True), *numbers]
        return Table([*columns, Column("can go", words=True)], rows)

    def savings_table(self) -> Table:
        """What is left after the removal of 1, 2, ... up to half of the blocks; a range where blocks differ."""
        cache_bytes = self.cache_bytes or (0,) * len(self.blocks)
        parameters, cache = [], []  # of the blocks that can go
        for block, num_bytes, removable in zip(self.blocks, cache_bytes, self.removable, strict=True):
            if removable:
                parameters.append(block.num_parameters)
                cache.append(num_bytes)

        rows = []
        for removed in range(1, min(len(parameters), len(self.blocks) // 2) + 1):
            cache_left = _left(sum(cache_bytes), cache, removed) if any(cache_bytes) else ""
            rows.append([str(removed), _left(self.num_parameters, parameters, removed), cache_left])

        columns = [Column("removed"), Column("parameters left"), Column("cache left")]
        return Table(columns, rows)


def overview(source: str | Path, *, trust_remote_code: bool = False) -> Overview:
    """Look at a model by its configuration; no weights are read.

    Raises:
        ValueError: there is no such model, or it is none whose blocks can be removed.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None) or torch.float32
    model = model_without_weights(config, trust_remote_code=trust_remote_code)
    blocks = tuple(find_blocks(model))
    num_parameters = count_parameters(model)
    can_be_saved = Removable(config, trust_remote_code=trust_remote_code)
    layers = find_stack(model).layers
    removable, active = [], []
    for block in blocks:
        removable.append(can_be_saved([block.index]))
        active.append(active_parameters(layers[block.index], config))

    return Overview(
        model=str(source),
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        num_bytes=num_parameters * dtype.itemsize,
        context=context_length(config),
        blocks=blocks,
        cache_bytes=_cache_bytes(model, blocks, dtype),
        active=tuple(active),
        removable=tuple(removable),
    )


def _cache_bytes(model: PreTrainedModel, blocks: Sequence[Block], dtype: torch.dtype) -> tuple[int, ...] | None:
    """What a second token adds to the cache of each block; None where the model does not run without weights.

    States of constant size do not grow.
    """
    # Without attention there are only such states, and the model may keep them elsewhere.
    kinds = [block.kind for block in blocks]
    if "attention" not in " ".join(kinds):
        return (0,) * len(blocks)

    one, two = (cache_of_layers(model, len(blocks), dtype, length) for length in (1, 2))
    if one is None or two is None:
        return None
    return tuple([after - before for before, after in zip(one, two, strict=True)])


def _left(whole: int, parts: Sequence[int], number: int) -> str:
    """The share of the whole that is left without so many of its parts: the largest ones, and the smallest ones."""
    ordered = sorted(parts)
    least, most = 1 - sum(ordered[-number:]) / whole, 1 - sum(ordered[:number]) / whole
    return f"{least:.0%}" if f"{least:.0%}" == f"{most:.0%}" else f"{least:.0%} to {most:.0%}"
