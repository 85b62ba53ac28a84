"""What the modules, tensors and settings of the kept layers are called in the shortened model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, product
from typing import Any

# An index in a module name, or a pattern for indices: 12, (1|2), [0-3], 1[0-9], \d+.
_INDEX = r"(?:\d|\\d|\[[^\]]+\]|\((?:\?:)?[^()]*\)|\{[\d,]+\}|(?<=[\]\)d])(?:[+?]|\*(?=\\)))+"


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
        for owner, entries in self.slots.items():
            match = re.fullmatch(rf"({re.escape(owner)}\.)(\d+)((?:\..+)?)", name)
            if match:
                new = entries[int(match[2])]
                return None if new is None else f"{match[1]}{new}{match[3]}"
        return name

    def name(self, name: str, stack_name: str) -> str | None:
        """The new name of a tensor or module of the model, where the stack is called so; None if it is dropped."""
        match = re.fullmatch(rf"({re.escape(stack_name)}\.)(\d+)\.(.+)", name)
        if match is None:
            return name
        index, inside = self.index(int(match[2])), self.inside(match[3])
        return None if index is None or inside is None else f"{match[1]}{index}.{inside}"

    def settings(self, value: Any, stack_name: str, others: Sequence[str] = ()) -> Any:
        """JSON values in which every module name, also in patterns and keys, is new; removed layers are dropped.

        E.g. with block 0 removed, ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"] becomes
        ["model.layers.0.mlp", "lm_head"]; a pattern for some of the layers, as in "re:.*layers.[0-2].mlp", becomes a
        pattern for each of them.

        others: lists of layers that stay as they are; a name belongs to the list that it shares most parts with.

        Raises:
            ValueError: a pattern that is neither in a list nor a key means more or fewer than one of the kept layers.
        """
        if isinstance(value, dict):
            new = {key: self.settings(entry, stack_name, others) for key, entry in value.items()}
            return {name: entry for key, entry in new.items() for name in self._names(str(key), stack_name, others)}
        if isinstance(value, list):
            entries = (
                self._names(entry, stack_name, others)
                if isinstance(entry, str)
                else [self.settings(entry, stack_name, others)]
                for entry in value
            )
            return list(chain.from_iterable(entries))
        if not isinstance(value, str):
            return value
        names = self._names(value, stack_name, others)
        if len(names) != 1:
            raise ValueError(f"the quantisation setting {value!r} cannot be rewritten for the kept layers")
        return names[0]

    def _names(self, pattern: str, stack_name: str, others: Sequence[str]) -> list[str]:
        """What a module name or a pattern for module names becomes."""
        common = {*re.findall(r"\w+", pattern)}
        if any(len(common & {*other.split(".")}) > len(common & {*stack_name.split(".")}) for other in others):
            return [pattern]
        leaf = re.escape(stack_name.rpartition(".")[2])
        parts = re.split(rf"(?<![A-Za-z_])({leaf}\\?\.{_INDEX})", pattern)  # text, layers.index, text, ...
        choices = []
        for part, is_index in zip(parts, cycle([False, True])):
            start = re.match(rf"{leaf}\\?\.", part) if is_index else None
            choices.append([f"{start[0]}{new}" for new in self._indices(part[start.end() :])] if start else [part])
        return ["".join(choice) for choice in product(*choices)]

    def _indices(self, written: str) -> list[str]:
        """The new indices of what a name or pattern says in the place of an index."""
        if written.isdecimal():
            index = self.index(int(written))
            return [] if index is None else [str(index)]
        meant = [i for i in range(self.depth) if re.fullmatch(written, str(i))]
        return [written] if len(meant) == self.depth else [str(self.index(i)) for i in meant if i in self.kept]
