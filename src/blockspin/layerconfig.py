"""Makes a configuration describe the kept layers only, and proves that it does.

What a configuration says about layers takes few forms: their number, a list or a string with an entry a layer, a list
of layer indices, a table by index, a count of the first or last layers, a period. Each form is rewritten by what it
looks like; then both models are built without weights and compared layer by layer. Only a configuration that passes
is used.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from .blocks import DEPTH, find_stack, other_lists

Build = Callable[[PretrainedConfig], nn.Module]

_LISTS_INDICES = re.compile(r"layer|block|idx|indices", re.IGNORECASE)
_NOT_BY_LAYER = re.compile(r"token_id|multiplier|_section$", re.IGNORECASE)
_COUNTS_LAYERS = re.compile(r"layer|dense|period|interval|offset|step|freq|every|shared", re.IGNORECASE)
_POSITION = re.compile(r"layer_?(id|idx|index|number)$", re.IGNORECASE)
_PLAIN = bool | int | float | str | None
_LONGEST_PERIOD = 16
_MOST_TRIALS = 200  # models built in search of a configuration; a deep one takes half a second
_UNUSABLE = 10**6  # counts as so many differences
_PATIENCE = 15.0  # seconds to look for other removals when one is refused


@dataclass(frozen=True)
class Shortened:
    """A configuration proven to describe the kept layers.

    config: the configuration. values: what to write to config.json for it.
    model: the model of this configuration, without weights.
    slices: tensors outside the layers with a slice for each layer: name in the model -> dimension of the slices.
    tied: groups of names that are one and the same parameter in the original model.
    """

    config: PretrainedConfig
    values: dict[str, Any]
    model: nn.Module
    slices: dict[str, int]
    tied: list[list[str]]


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
    original = build(config)
    shortened, problem = _first_proven(config, original, kept, build, written)
    if shortened is not None:
        return shortened
    raise ValueError(f"{problem}; the configuration cannot express this removal. {_possible(config, original, build)}")


def _first_proven(
    config: PretrainedConfig,
    original: nn.Module,
    kept: Sequence[int],
    build: Build,
    written: dict[str, Any] | None = None,
    thorough: bool = True,
) -> tuple[Shortened | None, str]:
    """The first proven configuration, or None and what is wrong with the first one tried."""
    problems: list[str] = []
    for values in (written, config.to_dict()):
        if values is not None:
            trial = _rewritten(config, original, values, kept)
            shortened, differences = _prove(config, original, trial, kept, build)
            if shortened is not None:
                return replace(shortened, values=trial) if values is written else shortened, ""
            problems += differences[:1]
    return _search(config, original, trial, kept, build, thorough, len(differences)), problems[0]


def _rewritten(
    config: PretrainedConfig, original: nn.Module, values: dict[str, Any], kept: Sequence[int]
) -> dict[str, Any]:
    """A copy of `values` in which everything that describes layers describes the kept ones."""
    stack_name, stack = find_stack(original)
    result = copy.deepcopy(values)
    text = _text_values(result)
    depth_names = [name for name, value in text.items() if DEPTH.search(name) and value == len(stack)]
    usual = config.get_text_config(decoder=True).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name in text:
        if name != "quantization_config" and name not in config.sub_configs:
            text[name] = _shorten(name, text[name], kept, len(stack))
    for name in depth_names or [usual]:
        text[name] = len(kept)
    for part in (result, text):
        if "quantization_config" in part:
            part["quantization_config"] = renumber_names(
                values["quantization_config"], stack_name, kept, other_lists(original)
            )
    return result


def renumber_names(value: Any, stack_name: str, kept: Sequence[int], others: Sequence[str] = ()) -> Any:
    """Module names in JSON values (also patterns, also keys) with the layers' new indices; removed layers are dropped.

    E.g. with block 0 removed, ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"] becomes
    ["model.layers.0.mlp", "lm_head"].

    others: lists of layers that stay as they are; a name belongs to the list with which it has most parts in common.
    """
    leaf = re.compile(rf"(?<![A-Za-z_])({re.escape(stack_name.rpartition('.')[2])}\\?\.)(\d+)(?!\d)")

    def ours(name: Any) -> bool:
        if not isinstance(name, str):
            return False
        parts = set(re.findall(r"\w+", name))
        return all(len(parts & {*stack_name.split(".")}) >= len(parts & {*other.split(".")}) for other in others)

    def gone(name: Any) -> bool:
        return ours(name) and any(int(match[2]) not in kept for match in leaf.finditer(name))

    def new(name: Any) -> Any:
        return leaf.sub(lambda match: f"{match[1]}{kept.index(int(match[2]))}", name) if ours(name) else name

    if isinstance(value, dict):
        return {
            new(key): renumber_names(entry, stack_name, kept, others) for key, entry in value.items() if not gone(key)
        }
    if isinstance(value, list):
        return [renumber_names(entry, stack_name, kept, others) for entry in value if not gone(entry)]
    return new(value)


def _text_values(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration's values that describes the decoder."""
    nested = [values[name] for name in ("decoder", "generator", "text_config") if isinstance(values.get(name), dict)]
    return nested[0] if nested else values


def _shorten(name: str, value: Any, kept: Sequence[int], depth: int) -> Any:
    """One setting for the kept layers, by its form; as it was where it does not speak of layers."""
    if isinstance(value, dict):
        if value and all(re.fullmatch(r"\d+", str(key)) and int(key) < depth for key in value):
            return {type(key)(p): value[key] for p, i in enumerate(kept) for key in value if int(key) == i}
        first = int(any(_are_indices(v, depth, 1) and depth in v for v in value.values() if isinstance(v, list)))
        if first:  # a table of lists of layer indices that count from 1
            return {key: _new_indices(v, kept, 1) if _are_indices(v, depth, 1) else v for key, v in value.items()}
        return {key: _shorten(str(key), entry, kept, depth) for key, entry in value.items()}
    if isinstance(value, str):
        return "".join(value[i] for i in kept) if len(value) == depth and "pattern" in name else value
    if not isinstance(value, list | tuple) or _NOT_BY_LAYER.search(name):
        return value
    if _LISTS_INDICES.search(name) and _are_indices(value, depth, 0):
        return _new_indices(value, kept, 0)
    if _are_runs(value) and sum(len(pattern) * times for pattern, times in value) == depth:
        entries = [entry for pattern, times in value for entry in pattern * times]
        return [[[entries[i] for i in kept], 1]]
    return [value[i] for i in kept] if len(value) == depth else value


def _are_indices(value: Any, depth: int, first: int) -> bool:
    """Whether a value lists distinct layer indices in order, where the first layer is called `first`."""
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        return False
    return sorted(set(value)) == list(value) and all(first <= i < depth + first for i in value)


def _new_indices(value: Sequence[int], kept: Sequence[int], first: int) -> list[int]:
    return [p + first for p, i in enumerate(kept) if i + first in value]


def _are_runs(value: Sequence[Any]) -> bool:
    """Whether a list has the form [[[a, b], times], ...]."""
    return all(
        isinstance(v, list | tuple) and len(v) == 2 and isinstance(v[0], list) and isinstance(v[1], int) for v in value
    )


def _search(
    config: PretrainedConfig,
    original: nn.Module,
    values: dict[str, Any],
    kept: Sequence[int],
    build: Build,
    thorough: bool,
    fewest: int,
) -> Shortened | None:
    """Change the numbers of first or last layers, periods and offsets, each time the one that leaves the fewest
    differences, until none is left; None if no change helps any more or too many were tried.

    values, fewest: where it starts, and how many differences there are. thorough: try every period.
    """
    depth = len(find_stack(original)[1])
    trials = 0
    while True:
        best = None
        for name, old in _text_values(values).items():
            for new in _other_values(name, old, kept, depth, thorough):
                trials += 1
                if trials > _MOST_TRIALS:
                    return None
                trial = copy.deepcopy(values)
                _text_values(trial)[name] = new
                shortened, differences = _prove(config, original, trial, kept, build, fewest)
                if shortened is not None:
                    return shortened
                if len(differences) < fewest:
                    best, fewest = trial, len(differences)
        if best is None:
            return None
        values = best


def _other_values(name: str, value: Any, kept: Sequence[int], depth: int, thorough: bool) -> list[Any]:
    """What a whole number that speaks of layers might become; also a repeated pattern or a depth-dependent scale."""
    if isinstance(value, list | tuple) and 0 < len(value) < depth and _LISTS_INDICES.search(name):
        return [[value[i % len(value)] for i in kept]]  # a pattern that is repeated over the layers, written out
    if isinstance(value, float) and "depth" in name:
        return [value * math.sqrt(len(kept) / depth), value * len(kept) / depth]
    if not isinstance(value, int) or isinstance(value, bool) or DEPTH.search(name) or not _COUNTS_LAYERS.search(name):
        return []
    if not 0 <= value <= depth:
        return []
    first, last = sum(i < value for i in kept), sum(i >= depth - value for i in kept)
    others = range(min(_LONGEST_PERIOD, depth) + 1) if thorough else ()
    return [new for new in dict.fromkeys([first, last, *others]) if new != value]


def _prove(
    config: PretrainedConfig,
    original: nn.Module,
    values: dict[str, Any],
    kept: Sequence[int],
    build: Build,
    most: int = _UNUSABLE,
) -> tuple[Shortened | None, list[str]]:
    """Build the model of `values` and compare it with the original; the differences in words where there are any, at
    most `most` of them."""
    try:
        shortened = type(config).from_dict(_decoded(values))
        shortened._attn_implementation = config._attn_implementation
        model = build(shortened)
        stack = find_stack(model)[1]
    except Exception as error:  # a configuration class raises errors of many kinds on values that do not fit together
        return None, [str(error).strip().split("\n")[-1].strip()] * _UNUSABLE
    if len(stack) != len(kept):
        return None, [f"the shortened configuration has {len(stack)} layers, not {len(kept)}"] * _UNUSABLE
    slices: dict[str, int] = {}
    checks = (
        _layer_differences(original, model, kept),
        _broken_sharing(config, original, kept),
        _tie_differences(original, model, kept),
        _outside_differences(original, model, kept, slices),
        _part_differences(config, shortened),
    )
    differences = list(islice(chain(*checks), most))
    if differences:
        return None, differences
    return Shortened(model.config, json.loads(shortened.to_json_string()), model, slices, _tied(original)), []


def _decoded(value: Any) -> Any:
    """A copy of JSON values with the numbers that JSON lacks, which are written {"__float__": "Infinity"} there."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else copy.deepcopy(value)


def _broken_sharing(config: PretrainedConfig, original: nn.Module, kept: Sequence[int]) -> Iterator[str]:
    """Which kept blocks use more of a removed block than the residual stream.

    Where a list calls layers "shared", each uses what the last layer before it that is not shared has computed.
    Otherwise a forward argument that starts with "prev" is something that the block before has computed.
    """
    lists = [value for value in vars(config.get_text_config(decoder=True)).values() if isinstance(value, list)]
    sharing = [v for v in lists if v and v[0] != "shared" and ("shared" in v or set(map(str, v)) == {"full"})]
    for value in sharing:
        for i in kept:
            source = max(j for j in range(min(i + 1, len(value))) if value[j] != "shared")
            if source not in kept:
                yield f"block {i} uses what block {source} computes"
    for i, layer in enumerate(find_stack(original)[1]):
        takes = [name for name in inspect.signature(layer.forward).parameters if name.startswith("prev")]
        if takes and not sharing and i in kept and i > 0 and i - 1 not in kept:
            yield f"block {i} takes {takes[0]} from block {i - 1}"


def _layer_differences(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> Iterator[str]:
    before, after = find_stack(original)[1], find_stack(model)[1]
    for position, i in enumerate(kept):
        for name in _make_differences(before[i], after[position], i, kept, len(before)):
            yield f"block {i} would become a different layer {position} ({name})"


def _make_differences(before: nn.Module, after: nn.Module, i: int, kept: Sequence[int], depth: int) -> Iterator[str]:
    """Names of what differs between two layers: module types, shapes, plain attributes (sliding window, ...)."""
    shapes = [{n: tuple(t.shape) for n, t in _tensors(layer)} for layer in (before, after)]
    yield from (n for n in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(n) != shapes[1].get(n))
    modules = [dict(layer.named_modules(remove_duplicate=False)) for layer in (before, after)]
    for name in modules[0].keys() | modules[1].keys():
        one, other = modules[0].get(name), modules[1].get(name)
        if type(one) is not type(other):
            yield name or "its type"
            continue
        assert one is not None
        assert other is not None
        for key in _plain(one).keys() | _plain(other).keys():
            a, b = _plain(one).get(key), _plain(other).get(key)
            if not _same_attribute(one, key, a, b, i, kept, depth):
                yield f"{name}.{key}".lstrip(".")


def _same_attribute(module: nn.Module, key: str, a: Any, b: Any, i: int, kept: Sequence[int], depth: int) -> bool:
    """Whether attribute `a` of block `i` is `b` in the shortened model, where indices of layers are new."""
    if _POSITION.search(key) and type(a) is type(b) is int and a >= 0:
        position = kept.index(i)
        own = any(a // each == i and b // each == position and a % each == b % each for each in (1, 2, 3, 4))
        return own or (a in kept and kept.index(a) == b)
    if DEPTH.search(key) and (a, b) == (depth, len(kept)):
        return f"self.{key}" not in inspect.getsource(type(module).forward)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _tie_differences(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> Iterator[str]:
    """Which tensors the kept layers would no longer share, or share anew."""
    inside = re.compile(rf"({re.escape(find_stack(original)[0])}\.)(\d+)(\..+)")

    def new_names(group: list[str]) -> frozenset[str]:
        matches = [(name, inside.fullmatch(name)) for name in group]
        left = [(name, match) for name, match in matches if match is None or int(match[2]) in kept]
        return frozenset(
            match.expand(rf"\g<1>{kept.index(int(match[2]))}\g<3>") if match else name for name, match in left
        )

    before, after = {new_names(group) for group in _tied(original)}, {frozenset(group) for group in _tied(model)}
    for group in before ^ after:
        if len(group) > 1:
            yield f"{min(group)} would no longer share its weights as before"


def _outside_differences(
    original: nn.Module, model: nn.Module, kept: Sequence[int], slices: dict[str, int]
) -> Iterator[str]:
    """What differs outside the layers. Tensors with a slice a layer are no difference; they are noted in `slices`."""
    stack_name, stack = find_stack(original)
    before, after = (
        {n: t for n, t in m.state_dict(keep_vars=True).items() if not n.startswith(f"{stack_name}.")}
        for m in (original, model)
    )
    for name in before.keys() | after.keys():
        if name not in before or name not in after:
            yield f"{name} would be lost or added"
        elif before[name].shape != after[name].shape:
            dimension = _sliced_dimension(before[name].shape, after[name].shape, len(stack), len(kept))
            if dimension is None:
                yield f"{name} would change its shape"
            else:
                slices[name] = dimension
    modules = dict(model.named_modules())
    for name, module in original.named_modules():
        if not f"{name}.".startswith(f"{stack_name}."):
            for key, value in _plain(module).items():
                if isinstance(value, float) and value != _plain(modules.get(name, module)).get(key, value):
                    yield f"{name}.{key} would change"


def _part_differences(config: PretrainedConfig, shortened: PretrainedConfig) -> Iterator[str]:
    """Which other parts of the model (an image encoder, ...) would be configured otherwise."""
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        before, after = getattr(config, name, None), getattr(shortened, name)
        whole = before is text or (
            isinstance(before, PretrainedConfig) and before.get_text_config(decoder=True) is text
        )
        if isinstance(before, PretrainedConfig) and not whole and before.to_diff_dict() != after.to_diff_dict():
            yield f"{name} would change"


def _sliced_dimension(before: Sequence[int], after: Sequence[int], depth: int, left: int) -> int | None:
    """The only dimension that shrinks from `depth` slices to `left` slices; None if the shapes differ otherwise."""
    differing = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if len(before) != len(after) or len(differing) != 1:
        return None
    a, b = before[differing[0]], after[differing[0]]
    return differing[0] if a % depth == 0 and a // depth * left == b else None


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _possible(config: PretrainedConfig, original: nn.Module, build: Build) -> str:
    """Which single blocks could be removed: a hint, found in limited time."""
    depth = len(find_stack(original)[1])
    deadline = time.monotonic() + _PATIENCE
    tried, single = 0, []
    for i in range(depth):
        kept = [*range(i), *range(i + 1, depth)]
        single += [i] if _first_proven(config, original, kept, build, thorough=False)[0] else []
        tried += 1
        if time.monotonic() > deadline:
            break
    among = "" if tried == depth else f" (of the blocks 0 to {tried - 1}; the others were not tried)"
    found = (
        f"On its own each of the blocks {single} can be removed" if single else "No single block can be removed alone"
    )
    return found + among


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN) and k != "training"}
