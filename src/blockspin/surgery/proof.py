"""Proves that a shortened configuration describes the kept layers: compares the models it and the original make.

Both are built without weights. Each of the shortened model's layers must be of the same make as the layer it came from:
module types, shapes of tensors, numbers and texts in the modules' attributes (attention type, sliding window, rope
settings, expert counts), buffers that are computed and not stored, sharing. So must what is outside the layers.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..model.blocks import DEPTH, check_removal, find_blocks, find_stack, image_obstacle
from ..problem import Removal
from .renaming import Renaming

_POSITION = re.compile(r"layer_?(id|idx|index|number)$", re.IGNORECASE)
_MOST_PER_LAYER = 4  # a layer with several attentions gives each a number: layer 5 of two has 10 and 11
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


def split_blocks(model: nn.Module, removed: Iterable[int]) -> tuple[Removal, list[int]]:
    """The removed and the kept blocks of a model, in order.

    Raises:
        ValueError: unusable indices, or a removal that no model of this kind survives, whatever its configuration.
    """
    depth = len(find_stack(model).layers)
    removed = check_removal(removed, depth)
    kept = sorted({*range(depth)} - {*removed})
    reason = obstacle(model, removed, kept)
    if reason is not None:
        raise ValueError(reason)
    return removed, kept


def obstacle(model: nn.Module, removed: Sequence[int], kept: Sequence[int]) -> str | None:
    """Why no model of this kind survives a removal, whatever its configuration; None where it may."""
    return attention_obstacle(model, kept) or image_obstacle(model, removed)


def attention_obstacle(model: nn.Module, kept: Sequence[int]) -> str | None:
    """Why the cache would not count tokens with these blocks alone; None where it does.

    The cache of a hybrid model counts them in its attention layers: one of them must stay. MiniMax has a cache of its
    own, which counts them in the first layer, whatever it is. Where this is right in the original it must be right in
    what is kept.
    """
    blocks = find_blocks(model)
    attending = [block.index for block in blocks if "attention" in block.kind.split("+")]
    if not attending:
        return None
    if not set(attending) & set(kept):
        return f"the removal leaves no attention block; keep at least one of {attending}"

    # Where the attention layers are afterwards, and whether a cache of the model's own still counts there.
    positions = [position for position, i in enumerate(kept) if i in attending]
    for cache in _own_caches(model):
        if _counts_tokens(cache, attending) and not _counts_tokens(cache, positions):
            return (
                f"block {kept[0]} ({blocks[kept[0]].kind}) would come first, and {cache.__name__} counts tokens in the "
                f"first block: generation would go wrong; keep a block of {attending} in front"
            )
    return None


def _own_caches(model: nn.Module) -> list[type[DynamicCache]]:
    """Cache classes that a model type brings along and that are made without its configuration."""
    found = []
    module = sys.modules[type(model).__module__]
    for value in vars(module).values():
        if not isinstance(value, type) or not issubclass(value, DynamicCache) or value.__module__ != module.__name__:
            continue
        if not inspect.signature(value).parameters:
            found.append(value)
    return found


def _counts_tokens(cache: type[DynamicCache], attending: Sequence[int]) -> bool:
    """Whether a cache knows its length when layers at these positions have put the keys of one token there."""
    filled = cache()
    key = torch.zeros(1, 1, 1, 1)  # (samples, heads, tokens, width)
    for position in attending:
        filled.update(key, key, position)
    return bool(filled.get_seq_length() == 1)


def find_slices(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> dict[str, int]:
    """Tensors outside the layers that have a slice for each layer: name in the model -> dimension of the slices."""
    before, after = _outside(original), _outside(model)
    depth = len(find_stack(original).layers)

    slices: dict[str, int] = {}
    for name in before.keys() & after.keys():
        dimension = _sliced_dimension(before[name].shape, after[name].shape, depth, len(kept))
        if dimension is not None:
            slices[name] = dimension
    return slices


def find_slots(original: nn.Module, model: nn.Module, kept: Sequence[int]) -> dict[str, list[int | None]]:
    """Lists inside the layers with an entry for each layer that has the list, as in `Renaming`.

    Such a list is as long as there are layers that have it, and in the shortened model as there are such layers left.
    """
    before = list(map(_list_lengths, find_stack(original).layers))  # for each layer: name of a list -> its length
    after = list(map(_list_lengths, find_stack(model).layers))

    slots: dict[str, list[int | None]] = {}
    for name in dict.fromkeys(chain.from_iterable(before)):
        # The layers that have the list, and those of them that are kept.
        users = [i for i, lengths in enumerate(before) if name in lengths]
        left = [i for i in users if i in kept]
        lengths_before = {before[i][name] for i in users}
        lengths_after = {after[kept.index(i)].get(name) for i in left}

        entry_for_each_user = lengths_before == {len(users)} and lengths_after == {len(left)}
        if entry_for_each_user and len(left) < len(users):
            slots[name] = [left.index(i) if i in left else None for i in users]
    return slots


def _list_lengths(layer: nn.Module) -> dict[str, int]:
    return {name: len(module) for name, module in layer.named_modules() if isinstance(module, nn.ModuleList)}


def alike(one: nn.Module, other: nn.Module, i: int, j: int, depth: int) -> bool:
    """Whether two layers of one model, i and j of `depth`, are of the same make, but for their indices."""
    moved = Renaming([-1] * j + [i], depth)  # as if layer i were kept as number j
    return next(_make_differences(one, other, i, moved), None) is None


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names that are one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _layer_differences(original: nn.Module, model: nn.Module, renaming: Renaming) -> Iterator[str]:
    before, after = find_stack(original).layers, find_stack(model).layers
    for position, i in enumerate(renaming.kept):
        for name in _make_differences(before[i], after[position], i, renaming):
            yield f"block {i} would become a different layer {position} ({name})"


def _make_differences(before: nn.Module, after: nn.Module, i: int, renaming: Renaming) -> Iterator[str]:
    """Names of what differs between two layers: module types, shapes, plain attributes (sliding window, ...)."""
    shapes_before, shapes_after = _renamed(_shapes(before), renaming), _shapes(after)
    for name in sorted(shapes_before.keys() | shapes_after.keys()):
        if shapes_before.get(name) != shapes_after.get(name):
            yield name

    # The same modules with the same settings: what is no tensor, such as the width of a window.
    modules_before = _renamed(dict(before.named_modules(remove_duplicate=False)), renaming)
    modules_after = dict(after.named_modules(remove_duplicate=False))
    for name in sorted(modules_before.keys() | modules_after.keys()):
        one, other = modules_before.get(name), modules_after.get(name)
        if one is None or other is None or type(one) is not type(other):
            yield name or "its type"
            continue
        plain_before, plain_after = _plain(one), _plain(other)
        for key in sorted(plain_before.keys() | plain_after.keys()):
            if not _same_attribute(one, key, plain_before.get(key), plain_after.get(key), i, renaming):
                yield f"{name}.{key}".lstrip(".")


def _renamed(inside: dict[str, Any], renaming: Renaming) -> dict[str, Any]:
    """The entries by what they are called in the shortened model; without those that are dropped there."""
    result = {}
    for name, entry in inside.items():
        new_name = renaming.inside(name)
        if new_name is not None:
            result[new_name] = entry
    return result


def _same_attribute(module: nn.Module, key: str, before: Any, after: Any, i: int, renaming: Renaming) -> bool:
    """Whether an attribute of block `i` is the same in the shortened model, where indices of layers are new."""
    kept, depth = renaming.kept, renaming.depth
    if _POSITION.search(key) and type(before) is type(after) is int and before >= 0:
        names_another_layer = before in kept and kept.index(before) == after
        return names_another_layer or _names_own_layer(before, after, i, kept.index(i))

    counts_layers = bool(DEPTH.search(key)) and (before, after) == (depth, len(kept))
    counts_slots = False
    for slots in renaming.slots.values():
        counts_slots |= (before, after) == (len(slots), len(slots) - slots.count(None))
    if counts_layers or counts_slots:  # harmless where it only serves to build the layer
        return f"self.{key}" not in inspect.getsource(type(module).forward)

    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-12) or (math.isnan(before) and math.isnan(after))
    return bool(before == after)


def _names_own_layer(before: int, after: int, i: int, position: int) -> bool:
    """Whether two numbers are those of one part of layer `i`, which moves to `position`, of a few a layer."""
    for parts in range(1, _MOST_PER_LAYER + 1):
        part = before - parts * i
        if 0 <= part < parts and after == parts * position + part:
            return True
    return False


def broken_sharing(config: PretrainedConfig, original: nn.Module, kept: Sequence[int]) -> Iterator[str]:
    """Which kept blocks use more of a removed block than the residual stream.

    Where a list calls layers "shared", each uses what the last layer before it that is not shared has computed.
    Otherwise a forward argument that starts with "prev" is something that the block before has computed. One that no
    layer can do without is a second residual stream (Reformer), which goes on after the last layer: what a gate does to
    the hidden states is not what a removal does to both.
    """
    # Layers that take the choice of tokens from an earlier one (HY-V4).
    sharing = list(filter(_says_who_shares, vars(config.get_text_config(decoder=True)).values()))
    for entries in sharing:
        for i in kept:
            source = min(i, len(entries) - 1)
            while entries[source] == "shared":
                source -= 1
            if source not in kept:
                yield f"block {i} uses what block {source} computes"
    if sharing:
        return

    # Layers that are handed something besides the hidden states by the one before (ZAYA).
    for i, layer in enumerate(find_stack(original).layers):
        arguments = inspect.signature(layer.forward).parameters.values()
        takes = [argument for argument in arguments if argument.name.startswith("prev")]
        if takes and i in kept and i > 0 and i - 1 not in kept:
            yield f"block {i} takes {takes[0].name} from block {i - 1}"
        elif takes and i not in kept and takes[0].default is inspect.Parameter.empty:
            yield f"block {i} adds to {takes[0].name} what no gate acts on"


def _says_who_shares(value: Any) -> bool:
    """Whether a setting is a list that calls some layers "shared", or all of them "full"."""
    if not isinstance(value, list) or not value or value[0] == "shared":
        return False
    return "shared" in value or set(map(str, value)) == {"full"}


def _tie_differences(original: nn.Module, model: nn.Module, renaming: Renaming) -> Iterator[str]:
    """Which tensors the kept layers would no longer share, or share anew."""
    stack_name = find_stack(original).name
    expected: set[frozenset[str]] = set()
    for group in tied_names(original):
        new_names = [renaming.name(name, stack_name) for name in group]
        expected.add(frozenset(filter(None, new_names)))

    found = set(map(frozenset, tied_names(model)))
    broken = [min(group) for group in expected ^ found if len(group) > 1]
    for name in sorted(broken):
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

    # Numbers that depend on the depth, such as the scale of the residual stream.
    stack_name = find_stack(original).name
    modules_after = dict(model.named_modules())
    for name, module in original.named_modules():
        if f"{name}.".startswith(f"{stack_name}."):
            continue
        plain_after = _plain(modules_after.get(name, module))
        for key, value in _plain(module).items():
            if isinstance(value, float) and value != plain_after.get(key, value):
                yield f"{name}.{key} would change"


def _part_differences(config: PretrainedConfig, shortened: PretrainedConfig) -> Iterator[str]:
    """Which other parts of the model (an image encoder, ...) would be configured otherwise."""
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        before, after = getattr(config, name, None), getattr(shortened, name)
        if not isinstance(before, PretrainedConfig) or before.get_text_config(decoder=True) is text:
            continue
        if before.to_diff_dict() != after.to_diff_dict():
            yield f"{name} would change"


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are not inside the layers."""
    stack_name = find_stack(model).name
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{stack_name}.")}


def _sliced_dimension(before: Sequence[int], after: Sequence[int], depth: int, left: int) -> int | None:
    """The only dimension that shrinks from `depth` slices to `left` slices; None if the shapes differ otherwise."""
    if len(before) != len(after):
        return None
    differing = [d for d, size in enumerate(before) if size != after[d]]
    if len(differing) != 1:
        return None
    size_before, size_after = before[differing[0]], after[differing[0]]
    slices_fit = size_before % depth == 0 and size_before // depth * left == size_after
    return differing[0] if slices_fit else None


def _buffer_differences(original: PreTrainedModel, model: PreTrainedModel, renaming: Renaming) -> Iterator[str]:
    """Which buffers that are computed when a checkpoint is loaded would come out otherwise at the new position."""
    before, after = find_stack(original).layers, find_stack(model).layers
    for position, i in enumerate(renaming.kept):
        expected = _renamed(_computed_buffers(original, before[i]), renaming)
        found = _computed_buffers(model, after[position])
        for name in expected.keys() & found.keys():
            if not torch.equal(expected[name], found[name]):
                yield f"block {i} would become a different layer {position} (the values of {name})"


def _computed_buffers(model: PreTrainedModel, layer: nn.Module) -> dict[str, Tensor]:
    """The buffers of a layer without weights that no checkpoint holds, computed as from_pretrained does."""
    owners: list[tuple[str, nn.Module, str]] = []  # name of a module, the module, key of its buffer
    for name, module in layer.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            owners.append((name, module, key))

    # Room for the values, on the CPU: the layer itself is on the meta device.
    empty = [module._buffers[key] for _, module, key in owners]
    for (_, module, key), buffer in zip(owners, empty, strict=True):
        module._buffers[key] = None if buffer is None else torch.zeros_like(buffer, device="cpu")

    for name, module in layer.named_modules():
        inside = [owner for owner, _, _ in owners if not name or f"{owner}.".startswith(f"{name}.")]
        if inside:  # a module that owns such buffers, or one around it, computes them
            model._init_weights(module)

    # Take the values out, and leave the layer without weights as it was.
    computed: dict[str, Tensor] = {}
    for (name, module, key), buffer in zip(owners, empty, strict=True):
        value = module._buffers[key]
        if value is not None:
            computed[f"{name}.{key}".lstrip(".")] = value
        module._buffers[key] = buffer
    return computed


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters and buffers."""
    shapes = {}
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        shapes[name] = tuple(tensor.shape)
    return shapes


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, texts or None."""
    return {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN) and key != "training"}
