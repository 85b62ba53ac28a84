"""Quantisation settings for the kept layers: what they call modules, by name or by pattern, is renumbered.

A pattern is rewritten by how it looks. Where it is marked as a regular expression, what it means is compared: it must
match after the removal what it matched before. If it does not, the modules that it means are listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from ..model.blocks import find_stack, other_lists
from .renaming import Renaming

# An index in a module name, or a pattern for indices: 12, (1|2), [0-3], 1[0-9], \d+.
_INDEX = r"(?:\d|\\d|\[[^\]]+\]|\((?:\?:)?[^()]*\)|\{[\d,]+\}|(?<=[\]\)d])(?:[+?]|\*(?=\\)))+"
_REGULAR = re.compile(r"(re:|[+-]:)(.*)", re.DOTALL)  # in compressed-tensors, and in GPTQModel's table `dynamic`
_TABLE_OF_PATTERNS = "dynamic"


@dataclass(frozen=True)
class ModuleSettings:
    """Rewrites settings that name modules.

    renaming: of the kept layers. stack_name: what the model calls its layers.
    others: lists of layers that stay as they are; a name belongs to the list that it shares most parts with.
    modules: the names of all modules of the whole model; without them the meaning of patterns is not compared.
    """

    renaming: Renaming
    stack_name: str
    others: Sequence[str] = ()
    modules: Sequence[str] = ()

    def rewritten(self, value: Any, patterns: bool = False) -> Any:
        """JSON values in which every module name, also in patterns and keys, is new; removed layers are dropped.

        E.g. with block 0 removed, ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"] becomes
        ["model.layers.0.mlp", "lm_head"]; a pattern for some of the layers, as in "re:.*layers.[0-2].mlp", becomes a
        pattern for each of them.

        patterns: the keys of the value are regular expressions, marked or not.

        Raises:
            ValueError: a pattern that is neither in a list nor a key means more or fewer than one of the kept layers.
        """
        if isinstance(value, dict):
            renamed: dict[str, Any] = {}
            for key, entry in value.items():
                new_entry = self.rewritten(entry, patterns=key == _TABLE_OF_PATTERNS)
                for name in self._new_names(str(key), regular=patterns):
                    renamed[name] = new_entry
            return renamed

        if isinstance(value, list):
            entries: list[Any] = []
            for entry in value:
                if isinstance(entry, str):
                    entries += self._new_names(entry)
                else:
                    entries.append(self.rewritten(entry))
            return entries

        if not isinstance(value, str):
            return value
        names = self._new_names(value)
        if len(names) != 1:
            raise ValueError(f"the quantisation setting {value!r} cannot be rewritten for the kept layers")
        return names[0]

    def _new_names(self, written: str, regular: bool = False) -> list[str]:
        """What a module name or a pattern for module names becomes: several where it means several layers.

        regular: it is a regular expression even if it is not marked as one.
        """
        parts_of_name = {*re.findall(r"\w+", written)}

        def shared_parts(list_name: str) -> int:
            return len(parts_of_name & {*list_name.split(".")})

        if any(shared_parts(other) > shared_parts(self.stack_name) for other in self.others):
            return [written]

        marked = _REGULAR.fullmatch(written)
        if marked is None and not regular:
            return self._renumbered(written)
        mark, pattern = marked.groups() if marked else ("", written)
        new_patterns = self._renumbered(pattern)
        if not self._mean_the_same(pattern, new_patterns):
            new_patterns = self._listed(pattern)
        return [mark + new for new in new_patterns]

    def _renumbered(self, pattern: str) -> list[str]:
        """The pattern with new indices behind the name of the stack, or behind ".*"; one for each layer it means."""
        leaf = re.escape(self.stack_name.rpartition(".")[2])
        start = rf"(?:(?<![A-Za-z_]){leaf}|\.\*)\\?\."

        # Split into text, "layers.index", text, "layers.index", ..., text.
        parts = re.split(f"({start}{_INDEX})", pattern)
        choices: list[list[str]] = []
        for number, part in enumerate(parts):
            if number % 2 == 0:
                choices.append([part])
                continue
            before = re.match(start, part)
            assert before is not None
            new_indices = self._new_indices(part[before.end() :])
            choices.append([before[0] + index for index in new_indices])
        return list(map("".join, product(*choices)))

    def _new_indices(self, written: str) -> list[str]:
        """The new indices of what a name or pattern says in the place of an index."""
        if written.isdecimal():
            index = self.renaming.index(int(written))
            return [] if index is None else [str(index)]

        meant = [i for i in range(self.renaming.depth) if re.fullmatch(written, str(i))]
        if len(meant) == self.renaming.depth:  # a pattern for every layer stays one
            return [written]
        return [str(self.renaming.kept.index(i)) for i in meant if i in self.renaming.kept]

    def _mean_the_same(self, pattern: str, new_patterns: Sequence[str]) -> bool:
        """Whether the new patterns match the new names of just those kept modules that the old one matched."""
        for old_name, new_name in self._kept_modules():
            matched = any(re.match(new, new_name) for new in new_patterns)
            if matched != bool(re.match(pattern, old_name)):
                return False
        return True

    def _listed(self, pattern: str) -> list[str]:
        """A pattern for exactly the kept modules that a pattern matches; none if it matches no kept module."""
        names = []
        for old_name, new_name in self._kept_modules():
            if re.match(pattern, old_name):
                names.append(re.escape(new_name))
        return [f"(?:{'|'.join(names)})$"] if names else []

    def _kept_modules(self) -> list[tuple[str, str]]:
        """The old and the new name of every module that stays."""
        kept = []
        for old_name in self.modules:
            new_name = self.renaming.name(old_name, self.stack_name)
            if new_name is not None:
                kept.append((old_name, new_name))
        return kept


def module_settings(model: nn.Module, renaming: Renaming) -> ModuleSettings:
    """For the settings of a model, which is whole."""
    modules = [name for name, _ in model.named_modules() if name]
    return ModuleSettings(renaming, find_stack(model).name, other_lists(model), modules)
