"""What the modules, tensors and settings of the kept layers are called in the shortened model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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
            renamed: dict[str, Any] = {}
            for key, entry in value.items():
                new_entry = self.settings(entry, stack_name, others)
                for name in self._new_patterns(str(key), stack_name, others):
                    renamed[name] = new_entry
            return renamed

        if isinstance(value, list):
            entries: list[Any] = []
            for entry in value:
                if isinstance(entry, str):
                    entries += self._new_patterns(entry, stack_name, others)
                else:
                    entries.append(self.settings(entry, stack_name, others))
            return entries

        if not isinstance(value, str):
            return value
        names = self._new_patterns(value, stack_name, others)
        if len(names) != 1:
            raise ValueError(f"the quantisation setting {value!r} cannot be rewritten for the kept layers")
        return names[0]

    def _new_patterns(self, pattern: str, stack_name: str, others: Sequence[str]) -> list[str]:
        """What a module name or a pattern for module names becomes: several where it means several layers."""
        parts_of_name = {*re.findall(r"\w+", pattern)}

        def shared_parts(list_name: str) -> int:
            return len(parts_of_name & {*list_name.split(".")})

        if any(shared_parts(other) > shared_parts(stack_name) for other in others):
            return [pattern]

        # Split into text, "layers.index", text, "layers.index", ..., text.
        leaf = re.escape(stack_name.rpartition(".")[2])
        parts = re.split(rf"(?<![A-Za-z_])({leaf}\\?\.{_INDEX})", pattern)
        choices: list[list[str]] = []
        for number, part in enumerate(parts):
            start = re.match(rf"{leaf}\\?\.", part) if number % 2 else None
            if start is None:
                choices.append([part])
            else:
                new_indices = self._new_indices(part[start.end() :])
                choices.append([start[0] + index for index in new_indices])
        return list(map("".join, product(*choices)))

    def _new_indices(self, written: str) -> list[str]:
        """The new indices of what a name or pattern says in the place of an index."""
        if written.isdecimal():
            index = self.index(int(written))
            return [] if index is None else [str(index)]

        meant = [i for i in range(self.depth) if re.fullmatch(written, str(i))]
        if len(meant) == self.depth:  # a pattern for every layer stays one
            return [written]
        return [str(self.kept.index(i)) for i in meant if i in self.kept]
