"""Proves that a shortened configuration describes the kept layers: compares the models it and the original make.

Both are built without weights. Each of the shortened model's layers must be of the same make as the layer it came from:
module types, shapes of tensors, numbers and texts in the modules' attributes (attention type, sliding window, rope
settings, expert counts), buffers that are computed and not stored, sharing. So must what is outside the layers.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import DEPTH, find_stack
from .renaming import Renaming

_POSITION = re.compile(r"layer_?(id|idx|index|number)$", re.IGNORECASE)
_PLAIN = bool | int | float | str | None


def differences(
    config: PretrainedConfig,
    shortened: PretrainedConfig,
    original: PreTrainedModel,
    model: PreTrainedModel,
    renaming: Renaming,
) -> Iterator[str]:
    """What of the kept layers the shortened model has otherwise than the original, in words; nothing: it is proven.

    original, model: of the configurations `config` and `shortened`, both without weights.
    """
    found = chain(
        _layer_differences(original, model, renaming),
        broken_sharing(config, original, renaming.kept),
        _tie_differences(original, model, renaming),
        _outside_differences(original, model, renaming.kept),
        _part_differences(config, shortened),
    )
    first = next(found, None)
    if first is None:  # only layers of one make can be compared further
        return _buffer_differences(original, model, renaming)
    return chain([first], found)


def find_slices(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> dict[str, int]:
    """Tensors outside the layers that have a slice for each layer: name in the model -> dimension of the slices."""
    before, after = (_outside(m) for m in (original, model))
    depth = len(find_stack(original)[1])
    dimensions = {
        name: _sliced_dimension(before[name].shape, after[name].shape, depth, len(kept))
        for name in before.keys() & after.keys()
    }
    return {name: dimension for name, dimension in dimensions.items() if dimension is not None}


def find_slots(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> dict[str, list[int | None]]:
    """Lists inside the layers with an entry for each layer that has the list, as in `Renaming`.

    Such a list is as long as there are layers that have it, and in the shortened model as there are such layers left.
    """
    before, after = (
        [{n: len(m) for n, m in layer.named_modules() if isinstance(m, nn.ModuleList)} for layer in find_stack(m)[1]]
        for m in (original, model)
    )
    slots: dict[str, list[int | None]] = {}
    for name in dict.fromkeys(chain.from_iterable(before)):
        users = [i for i, lists in enumerate(before) if name in lists]
        left = [i for i in users if i in kept]
        lengths = {before[i][name] for i in users}, {after[kept.index(i)].get(name) for i in left}
        if lengths == ({len(users)}, {len(left)}) and len(left) < len(users):
            slots[name] = [left.index(i) if i in left else None for i in users]
    return slots


def alike(one: nn.Module, other: nn.Module, i: int, j: int, depth: int) -> bool:
    """Whether two layers of one model, i and j of `depth`, are of the same make, but for their indices."""
    moved = Renaming([-1] * j + [i], depth)  # as if layer i were kept as number j
    return not any(_make_differences(one, other, i, moved))


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names that are one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _layer_differences(original: nn.Module, model: nn.Module, renaming: Renaming) -> Iterator[str]:
    before, after = find_stack(original)[1], find_stack(model)[1]
    for position, i in enumerate(renaming.kept):
        for name in _make_differences(before[i], after[position], i, renaming):
            yield f"block {i} would become a different layer {position} ({name})"


def _make_differences(before: nn.Module, after: nn.Module, i: int, renaming: Renaming) -> Iterator[str]:
    """Names of what differs between two layers: module types, shapes, plain attributes (sliding window, ...)."""
    shapes = [{n: tuple(t.shape) for n, t in _tensors(layer)} for layer in (before, after)]
    shapes[0] = {new: shape for n, shape in shapes[0].items() if (new := renaming.inside(n)) is not None}
    yield from (n for n in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(n) != shapes[1].get(n))
    modules = [dict(layer.named_modules(remove_duplicate=False)) for layer in (before, after)]
    modules[0] = {new: module for n, module in modules[0].items() if (new := renaming.inside(n)) is not None}
    for name in sorted(modules[0].keys() | modules[1].keys()):
        one, other = modules[0].get(name), modules[1].get(name)
        if type(one) is not type(other):
            yield name or "its type"
            continue
        assert one is not None
        assert other is not None
        for key in sorted(_plain(one).keys() | _plain(other).keys()):
            a, b = _plain(one).get(key), _plain(other).get(key)
            if not _same_attribute(one, key, a, b, i, renaming):
                yield f"{name}.{key}".lstrip(".")


def _same_attribute(module: nn.Module, key: str, a: Any, b: Any, i: int, renaming: Renaming) -> bool:
    """Whether attribute `a` of block `i` is `b` in the shortened model, where indices of layers are new."""
    kept, depth = renaming.kept, renaming.depth
    if _POSITION.search(key) and type(a) is type(b) is int and a >= 0:
        position = kept.index(i)
        own = any(a // each == i and b // each == position and a % each == b % each for each in (1, 2, 3, 4))
        return own or (a in kept and kept.index(a) == b)
    counts_layers = bool(DEPTH.search(key)) and (a, b) == (depth, len(kept))
    counts_slots = any((a, b) == (len(slots), len(slots) - slots.count(None)) for slots in renaming.slots.values())
    if counts_layers or counts_slots:
        return f"self.{key}" not in inspect.getsource(type(module).forward)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def broken_sharing(config: PretrainedConfig, original: nn.Module, kept: Sequence[int]) -> Iterator[str]:
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


def _tie_differences(original: nn.Module, model: nn.Module, renaming: Renaming) -> Iterator[str]:
    """Which tensors the kept layers would no longer share, or share anew."""
    stack_name = find_stack(original)[0]
    before = {
        frozenset(new for name in group if (new := renaming.name(name, stack_name)) is not None)
        for group in tied_names(original)
    }
    after = {frozenset(group) for group in tied_names(model)}
    for name in sorted(min(group) for group in before ^ after if len(group) > 1):
        yield f"{name} would no longer share its weights as before"


def _outside_differences(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> Iterator[str]:
    """What differs outside the layers. Tensors with a slice for each layer are no difference."""
    before, after = _outside(original), _outside(model)
    slices = find_slices(original, model, kept)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name} would be lost or added"
        elif before[name].shape != after[name].shape and name not in slices:
            yield f"{name} would change its shape"
    stack_name = find_stack(original)[0]
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
        if (
            isinstance(before, PretrainedConfig)
            and before.get_text_config(decoder=True) is not text
            and before.to_diff_dict() != after.to_diff_dict()
        ):
            yield f"{name} would change"


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are not inside the layers."""
    stack_name = find_stack(model)[0]
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{stack_name}.")}


def _sliced_dimension(before: Sequence[int], after: Sequence[int], depth: int, left: int) -> int | None:
    """The only dimension that shrinks from `depth` slices to `left` slices; None if the shapes differ otherwise."""
    differing = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    if len(before) != len(after) or len(differing) != 1:
        return None
    a, b = before[differing[0]], after[differing[0]]
    return differing[0] if a % depth == 0 and a // depth * left == b else None


def _buffer_differences(original: PreTrainedModel, model: PreTrainedModel, renaming: Renaming) -> Iterator[str]:
    """Which buffers that are computed when a checkpoint is loaded would come out otherwise at the new position."""
    before, after = find_stack(original)[1], find_stack(model)[1]
    for position, i in enumerate(renaming.kept):
        expected, found = _computed_buffers(original, before[i]), _computed_buffers(model, after[position])
        for name, value in expected.items():
            new = renaming.inside(name)
            if new in found and not torch.equal(value, found[new]):
                yield f"block {i} would become a different layer {position} (the values of {name})"


def _computed_buffers(model: PreTrainedModel, layer: nn.Module) -> dict[str, Tensor]:
    """The buffers of a layer without weights that no checkpoint holds, computed as from_pretrained does."""
    places = [
        (name, module, key) for name, module in layer.named_modules() for key in module._non_persistent_buffers_set
    ]
    empty = [module._buffers[key] for _, module, key in places]
    for (_, module, key), buffer in zip(places, empty, strict=True):
        module._buffers[key] = None if buffer is None else torch.zeros_like(buffer, device="cpu")
    for name, module in layer.named_modules():  # the modules that own such buffers, and those around them
        if any(f"{owner}.".startswith(f"{name}.") or not name for owner, _, _ in places):
            model._init_weights(module)
    computed = {f"{name}.{key}".lstrip("."): module._buffers[key] for name, module, key in places}
    for (_, module, key), buffer in zip(places, empty, strict=True):
        module._buffers[key] = buffer
    return {name: buffer for name, buffer in computed.items() if buffer is not None}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN) and k != "training"}
