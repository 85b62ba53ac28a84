"""Makes a configuration describe the kept layers only, and proves that it does.

What a configuration says about layers takes few forms: their number, a list or a string with an entry a layer, a list
of layer indices, a table by index, a count of the first or last layers, a period. Each form is rewritten by what it
looks like. Only a configuration that passes the proof is used.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from ..model.blocks import DEPTH, find_stack
from .patterns import module_settings
from .proof import differences, find_slices, find_slots, obstacle
from .renaming import Renaming

Build = Callable[[PretrainedConfig], PreTrainedModel]

_LISTS_INDICES = re.compile(r"layer|block|idx|indices", re.IGNORECASE)
_NAMES_LAYERS = re.compile(r"layer|block|pattern|types|attn|attention|window", re.IGNORECASE)
_NOT_BY_LAYER = re.compile(r"token_id|multiplier|_section$", re.IGNORECASE)
_COUNTS_LAYERS = re.compile(r"layer|blocks|dense|period|interval|offset|step|freq|every|shared", re.IGNORECASE)
_LONGEST_PERIOD = 16
_MOST_TRIALS = 200  # models built in search of a configuration; a deep one takes half a second
_UNUSABLE = 10**6  # counts as so many differences
_PATIENCE = 15.0  # seconds to look for other removals when one is refused


@dataclass(frozen=True)
class Shortened:
    """A configuration proven to describe the kept layers.

    config: the configuration. values: what to write to config.json for it.
    model: the model of this configuration, without weights.
    renaming: the new names of modules and tensors.
    slices: tensors outside the layers with a slice for each layer: name in the model -> dimension of the slices.
    """

    config: PretrainedConfig
    values: dict[str, Any]
    model: PreTrainedModel
    renaming: Renaming
    slices: dict[str, int]


@dataclass(frozen=True)
class Shortening:
    """A removal that a configuration is to express.

    config: of the whole model. original: that model, without weights. kept: the layers that stay, in order.
    build: makes the model of a configuration, without weights.
    """

    config: PretrainedConfig
    original: PreTrainedModel
    kept: Sequence[int]
    build: Build

    @cached_property
    def depth(self) -> int:
        """The number of layers of the whole model."""
        return len(find_stack(self.original).layers)


def shorten_config(
    config: PretrainedConfig, kept: Sequence[int], build: Build, written: dict[str, Any] | None = None
) -> Shortened:
    """The configuration of the kept layers, each proven to be of the same make as the layer it came from.

    build: makes the model of a configuration, without weights.
    written: the values as config.json has them; used where they can express the removal, so that nothing else in the
        file changes. Otherwise the complete values are used, with the lists that the class derives written out.

    Raises:
        ValueError: no configuration of this class expresses the removal; says which single blocks can be removed.
    """
    wanted = Shortening(config, build(config), kept, build)
    shortened, problem = first_proven(wanted, written)
    if shortened is None:
        hint = _possible_removals(wanted)
        raise ValueError(f"{problem}; the configuration cannot express this removal. {hint}")
    return shortened


def first_proven(
    wanted: Shortening, written: dict[str, Any] | None = None, thorough: bool = True
) -> tuple[Shortened | None, str]:
    """The first proven configuration, or None and what is wrong with the first one tried.

    written: the values as config.json has them. thorough: where rewriting alone does not do, try every period too.
    """
    code = _own_code(type(wanted.config), type(wanted.original))
    problem, start, fewest = "", {}, _UNUSABLE
    for values in (written, wanted.config.to_dict()):
        if values is None:
            continue
        # First every list that may be by layer is cut; where that does not do, those whose name says so. Lists of
        # indices count from 0, or else from 1.
        trials: list[dict[str, Any]] = []
        for first in (0, 1):
            for read_by in (code, ""):
                rewritten = _rewritten(wanted, values, _Rewriting(wanted.kept, wanted.depth, read_by, first))
                if rewritten not in trials:
                    trials.append(rewritten)

        for trial in trials:
            shortened, found = _prove(wanted, trial)
            if shortened is not None:
                # What was written is kept as it was, but for what had to change.
                return replace(shortened, values=trial) if values is written else shortened, ""
            problem = problem or found[0]
            if trial is trials[0]:
                start, fewest = trial, len(found)

    return _search(wanted, start, thorough, fewest), problem


def _own_code(config_class: type[PretrainedConfig], model_class: type[PreTrainedModel]) -> str:
    """The source of the files that define a model type and its configuration, without transformers' base classes."""
    of_all_types = {*PretrainedConfig.__mro__, *PreTrainedModel.__mro__, *GenerationMixin.__mro__}
    sources = {}
    for base in (*config_class.__mro__, *model_class.__mro__):
        module = inspect.getmodule(base)
        if base not in of_all_types and module is not None:
            sources[base.__module__] = inspect.getsource(module)
    return "\n".join(sources.values())


def _rewritten(wanted: Shortening, values: dict[str, Any], rewriting: _Rewriting) -> dict[str, Any]:
    """A copy of `values` in which everything that describes layers describes the kept ones."""
    config, result = wanted.config, copy.deepcopy(values)
    text = _text_values(result)

    # The number of layers; some classes know it under more than one name.
    depth_names = [name for name, value in text.items() if DEPTH.search(name) and value == wanted.depth]
    if not depth_names:  # not written: the class has it by default
        text_config = config.get_text_config(decoder=True)
        depth_names = [text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")]

    for name in text:
        if name != "quantization_config" and name not in config.sub_configs:
            text[name] = rewriting.of(name, text[name])
    for name in depth_names:
        text[name] = len(wanted.kept)

    # What the quantisation says of modules, for the whole model or for the decoder.
    for part in [result] if text is result else [result, text]:
        if "quantization_config" in part:
            modules = module_settings(wanted.original, Renaming(wanted.kept, wanted.depth))
            part["quantization_config"] = modules.rewritten(part["quantization_config"])
    return result


def _text_values(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration's values that describes the decoder."""
    for name in ("decoder", "generator", "text_config"):
        if isinstance(values.get(name), dict):
            nested: dict[str, Any] = values[name]
            return nested
    return values


@dataclass(frozen=True)
class _Rewriting:
    """How settings that describe layers become those of the kept ones.

    depth: number of layers there were.
    code: of the model. A list that happens to be as long as there are layers (id2label, ...) is theirs if its name says
        so or the code reads it.
    first: what lists of indices that may count from 0 or from 1 call the first layer.
    """

    kept: Sequence[int]
    depth: int
    code: str
    first: int

    def of(self, name: str, value: Any) -> Any:
        """One setting for the kept layers, by its form; as it was where it does not speak of layers.

        name: with those of the tables that it is in, as in "rope_parameters.short_factor".
        """
        if isinstance(value, dict):
            return self._table(name, value)
        if isinstance(value, str):
            letter_a_layer = len(value) == self.depth and "pattern" in name
            return "".join(_of_kept(value, self.kept)) if letter_a_layer else value
        if not isinstance(value, list | tuple) or _NOT_BY_LAYER.search(name):
            return value

        if _LISTS_INDICES.search(name):
            for start in range(self.first, -1, -1):
                if _are_indices(value, self.depth, start):
                    return _new_indices(value, self.kept, start)
        if _are_runs(value):  # in GPT-Neo: [[["global", "local"], 12]]
            entries: list[Any] = []
            for pattern, times in value:
                entries += pattern * times
            if len(entries) == self.depth:
                return [[_of_kept(entries, self.kept), 1]]
        return _of_kept(value, self.kept) if len(value) == self.depth and self._is_by_layer(name) else value

    def _table(self, name: str, table: dict[Any, Any]) -> dict[Any, Any]:
        """A table with an entry a layer, with lists of layers that count from 1, or with settings."""
        has_indices = bool(table) and all(re.fullmatch(r"\d+", str(key)) and int(key) < self.depth for key in table)
        if has_indices and self._is_by_layer(name):
            shortened = {}
            for key in table:
                if int(key) in self.kept:
                    shortened[type(key)(self.kept.index(int(key)))] = table[key]
            return shortened

        # Lists of indices that count from 1 (Kimi Linear); one of them has the last layer.
        from_one = []
        for key, value in table.items():
            if _are_indices(value, self.depth, first=1) and self._is_by_layer(f"{name}.{key}"):
                from_one.append(key)
        if any(self.first == 1 or self.depth in table[key] for key in from_one):
            return table | {key: _new_indices(table[key], self.kept, first=1) for key in from_one}
        return {key: self.of(f"{name}.{key}", entry) for key, entry in table.items()}

    def _is_by_layer(self, name: str) -> bool:
        """Whether entries that are as many as the layers may be theirs: the name says so, or the code reads it."""
        if _NAMES_LAYERS.search(name):
            return True
        own_name = re.escape(name.rpartition(".")[2])
        read = rf"\.{own_name}\b|[\"']{own_name}[\"']|^ +{own_name} *:"  # config.name, get("name"), a field
        return re.search(read, self.code, re.MULTILINE) is not None


def _of_kept(entries: Sequence[Any], kept: Sequence[int]) -> list[Any]:
    """The entries of the kept layers; a list that is shorter than the depth is repeated."""
    return [entries[i % len(entries)] for i in kept]


def _are_indices(value: Any, depth: int, first: int) -> bool:
    """Whether a value lists distinct layer indices in order, where the first layer is called `first`."""
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        return False
    return sorted(set(value)) == list(value) and all(first <= i < depth + first for i in value)


def _new_indices(value: Sequence[int], kept: Sequence[int], first: int) -> list[int]:
    return [position + first for position, i in enumerate(kept) if i + first in value]


def _are_runs(value: Sequence[Any]) -> bool:
    """Whether a list has the form [[[a, b], times], ...]."""
    for run in value:
        if not isinstance(run, list | tuple) or len(run) != 2:
            return False
        if not isinstance(run[0], list) or not isinstance(run[1], int):
            return False
    return True


def _search(wanted: Shortening, values: dict[str, Any], thorough: bool, fewest: int) -> Shortened | None:
    """Change the numbers of first or last layers, periods and offsets, each time the one that leaves the fewest
    differences, until none is left; None if no change helps any more or too many were tried.

    values, fewest: where it starts, and how many differences there are. thorough: try every period.
    """
    trials = 0
    while True:
        best = None
        for name, old in _text_values(values).items():
            for new in _other_values(name, old, wanted.kept, wanted.depth, thorough):
                trials += 1
                if trials > _MOST_TRIALS:
                    return None
                trial = copy.deepcopy(values)
                _text_values(trial)[name] = new

                shortened, found = _prove(wanted, trial, most=fewest)
                if shortened is not None:
                    return shortened
                if len(found) < fewest:
                    best, fewest = trial, len(found)

        if best is None:
            return None
        values = best


def _other_values(name: str, value: Any, kept: Sequence[int], depth: int, thorough: bool) -> list[Any]:
    """What a whole number that speaks of layers might become; also a repeated pattern or a depth-dependent scale."""
    if isinstance(value, list | tuple) and 0 < len(value) < depth and _LISTS_INDICES.search(name):
        return [_of_kept(value, kept)]  # a pattern that is repeated over the layers, written out
    if isinstance(value, float) and "depth" in name:
        return [value * math.sqrt(len(kept) / depth), value * len(kept) / depth]

    if not isinstance(value, int) or isinstance(value, bool) or DEPTH.search(name) or not _COUNTS_LAYERS.search(name):
        return []
    if not 0 <= value <= depth:
        return []
    # A count of first or last layers; whatever it is, a period may have to change too.
    among_first = len([i for i in kept if i < value])
    among_last = len([i for i in kept if i >= depth - value])
    periods = range(min(_LONGEST_PERIOD, depth) + 1) if thorough else ()
    new_values = dict.fromkeys([among_first, among_last, *periods])
    new_values.pop(value, None)
    return list(new_values)


def _possible_removals(wanted: Shortening) -> str:
    """Which single blocks could be removed instead: a hint, found in limited time."""
    depth = wanted.depth
    deadline = time.monotonic() + _PATIENCE
    tried = 0
    possible = []
    for i in range(depth):
        kept = [*range(i), *range(i + 1, depth)]
        if obstacle(wanted.original, [i], kept) is None:
            shortened, _ = first_proven(replace(wanted, kept=kept), thorough=False)
            if shortened is not None:
                possible.append(i)
        tried += 1
        if time.monotonic() > deadline:
            break

    among = "" if tried == depth else f" (of the blocks 0 to {tried - 1}; the others were not tried)"
    if not possible:
        return f"No single block can be removed alone{among}"
    return f"On its own each of the blocks {possible} can be removed{among}"


def _prove(wanted: Shortening, values: dict[str, Any], most: int = _UNUSABLE) -> tuple[Shortened | None, list[str]]:
    """Build the model of `values` and compare it with the original; the differences in words where there are any, at
    most `most` of them."""
    config, original, kept = wanted.config, wanted.original, wanted.kept
    try:
        shortened = type(config).from_dict(_decoded(values))
        _copy_attention(config, shortened)
        model = wanted.build(shortened)
        stack = find_stack(model).layers
    except Exception as error:  # a configuration class raises errors of many kinds on values that do not fit together
        reason = str(error).strip().split("\n")[-1].strip()  # of transformers' checks the last line says what is wrong
        return None, [reason] * _UNUSABLE
    if len(stack) != len(kept):
        return None, [f"the shortened configuration has {len(stack)} layers, not {len(kept)}"] * _UNUSABLE

    renaming = Renaming(kept, wanted.depth, find_slots(original, model, kept))
    found = list(islice(differences(config, shortened, original, model, renaming), most))
    if found:
        return None, found
    slices = find_slices(original, model, kept)
    return Shortened(model.config, json.loads(shortened.to_json_string()), model, renaming, slices), []


def _copy_attention(config: PretrainedConfig, shortened: PretrainedConfig) -> None:
    """Compute attention in the same way ("sdpa", "eager", ...) as the original, in all parts of the model."""
    implementations = {"": config._attn_implementation}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part:
            implementations[name] = part._attn_implementation
    shortened._attn_implementation = implementations


def _decoded(value: Any) -> Any:
    """A copy of JSON values with the numbers that JSON lacks, which are written {"__float__": "Infinity"} there."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(_decoded, value))
    return copy.deepcopy(value)
