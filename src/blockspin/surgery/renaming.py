"""What the modules and tensors of the kept layers are called in the shortened model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Renaming:
    """Old names to new ones.

    kept: old indices of the kept layers, in order. depth: number of layers there were.
    slots: lists inside the layers with an entry for each layer that has the list: name inside the layer -> for each
        entry its new index, None where it is dropped. (In Zamba2 several layers share an attention block, which holds
        an adapter for each of them.)
    """

    kept: Sequence[int]
    depth: int
    slots: Mapping[str, list[int | None]] = field(default_factory=dict)

    def index(self, i: int) -> int | None:
        """The new index of a layer; those beyond the stack, for multi-token prediction, stay behind its last."""
        if i >= self.depth:
            return len(self.kept) + i - self.depth
        return self.kept.index(i) if i in self.kept else None

    def inside(self, name: str) -> str | None:
        """The new name of a tensor or module inside a kept layer, relative to the layer; None if it is dropped."""
        for owner, new_entries in self.slots.items():
            match = re.fullmatch(rf"({re.escape(owner)}\.)(\d+)((?:\..+)?)", name)
            if match is None:
                continue
            before, entry, after = match.groups()
            new = new_entries[int(entry)]
            return None if new is None else f"{before}{new}{after}"
        return name

    def name(self, name: str, stack_name: str) -> str | None:
        """The new name of a tensor or module of the model, where the stack is called so; None if it is dropped."""
        match = re.fullmatch(rf"({re.escape(stack_name)}\.)(\d+)\.(.+)", name)
        if match is None:
            return name

        before, old_index, rest = match.groups()
        index, inside = self.index(int(old_index)), self.inside(rest)
        if index is None or inside is None:
            return None
        return f"{before}{index}.{inside}"
