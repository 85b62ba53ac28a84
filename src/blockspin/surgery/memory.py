"""Removes blocks from a model in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..model.batches import frozen
from ..model.blocks import check_model, check_removal, find_stack
from ..model.offload import check_in_memory
from ..model.probe import agree, probe_ids, probe_logits
from ..model.tracing import TracedModel, closed, trace_model
from ..problem import Removal, Units
from .absent import absent_before, add_absent, lacks_modules, leave_out, stock_class, stock_config
from .layer_config import Shortened, shorten_config
from .proof import split_blocks
from .renaming import Renaming

_DECODED_TOKENS = 8
_TOLERANCE = 1e-3  # of the largest logit
_TOLERANCE_HALF = 1e-2  # in dtypes of 16 bits and fewer
_CACHE_TOLERANCE = 1e-2  # of the largest logit: passes of other shapes round otherwise
_CACHE_TOLERANCE_HALF = 5e-2
_CACHE_FACTOR = 10  # by so much the cache may err more than that of the whole model


def remove_blocks(
    model: nn.Module, removed: Iterable[int], *, units: Units = "blocks", copy: bool = True
) -> PreTrainedModel:
    """An ordinary transformers model without the removed blocks, or sub-layers; `model` stays whole.

    A few tokens are run through both to prove that the result is `model` with the removed units' gates at zero, and a
    few are decoded with the cache. A block that loses all its sub-layers goes; one that loses some keeps the others,
    and the class of the model is then that of the modelling file that a checkpoint of it has (`absent`).

    units: what the numbers of the removal stand for.

    copy: copy the weights of the kept blocks; otherwise both models share them: that needs no memory, but what changes
        the one (training, `.to(...)`) changes the other.

    Raises:
        ValueError: a model that is compiled or not of transformers, unusable indices, a removal that the model or its
            configuration does not allow, or weights that are offloaded: `prune_checkpoint` shortens such a model on
            disk.
    """
    check_model(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model; unwrap it first (merge adapters, ...)")
    check_in_memory(model, "a shortened model that is not written to disk (blockspin prune)")
    if units == "blocks":
        removed, kept = split_blocks(model, removed)
        smaller, made = _cut(model, kept)
        absent = absent_before(model, made, kept)
    else:
        traced = trace_model(model, units)
        removed = check_sublayers(traced, removed)
        whole, _ = traced.whole_and_partial(removed)
        _, kept = split_blocks(model, whole)
        smaller, made = _cut(model, kept)
        absent = absent_before(model, made, kept)
        add_absent(absent, traced, removed, kept)
    if absent.modules or lacks_modules(model.config):
        leave_out(smaller, absent)

    # What the configuration cannot show, a few tokens do. Without weights there is nothing to compare.
    if next(model.parameters()).device.type != "meta":
        _check_logits(model, smaller, removed, units)
        _check_cache(model, smaller, removed, units)
    return deepcopy(smaller) if copy else smaller


def check_sublayers(traced: TracedModel, removed: Iterable[int]) -> Removal:
    """The removal of sub-layers as a sorted tuple of distinct numbers.

    Raises:
        ValueError: unusable numbers, or no attention would be left, in which the cache counts tokens.
    """
    checked = check_removal(removed, traced.num_units)
    attending = [unit.index for unit in traced.units if "attention" in unit.kind.split("+")]
    if attending and not {*attending} - {*checked}:
        raise ValueError(f"the removal leaves no attention; keep at least one of the sub-layers {attending}")
    return checked


def _cut(model: PreTrainedModel, kept: Sequence[int]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of the kept blocks, which shares its weights with `model`, and what its configuration makes.

    Where `model` lacks modules, it is of the stock class, which does not know that, until they are left out again.
    """
    stock = stock_class(model)

    def build(config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            built: PreTrainedModel = stock._from_config(deepcopy(config))
        return built

    shortened = shorten_config(stock_config(model.config), kept, build)

    # deepcopy takes what its memo holds as copied already: the tensors.
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    smaller: PreTrainedModel = deepcopy(model, shared)
    smaller.__class__ = stock
    copied_stack = find_stack(smaller).layers
    left = nn.ModuleList([copied_stack[i] for i in kept])
    _cut_slots(left, shortened.renaming)
    smaller.set_submodule(find_stack(model).name, left)
    _take_settings(smaller, shortened)
    _cut_slices(smaller, shortened)
    return smaller, shortened.model


def _cut_slots(stack: nn.ModuleList, renaming: Renaming) -> None:
    """Drop the entries of removed layers from lists inside the layers."""
    lists: list[tuple[nn.Module, str, nn.Module]] = []  # all of them first: layers may share a module that has one
    for layer in stack:
        for name, module in layer.named_modules():
            if name in renaming.slots:
                lists.append((layer, name, module))

    for layer, name, module in lists:
        assert isinstance(module, nn.ModuleList)
        left = nn.ModuleList()
        for entry, new_index in zip(module, renaming.slots[name], strict=True):
            if new_index is not None:
                left.append(entry)
        layer.set_submodule(name, left)


def _take_settings(smaller: PreTrainedModel, shortened: Shortened) -> None:
    """Take the configurations, numbers and tables (layer indices, depths, names of tied weights) of the model that the
    shortened configuration makes."""
    of_every_module = vars(nn.Module()).keys()  # its tensors, parts and hooks
    made = dict(shortened.model.named_modules())
    for name, module in smaller.named_modules():
        if name not in made:
            continue
        for key, value in vars(made[name]).items():
            if key not in of_every_module and _follows_configuration(value):
                setattr(module, key, value)


def _follows_configuration(value: Any) -> bool:
    return isinstance(value, PretrainedConfig) or (_is_plain(value) and not isinstance(value, bool | str | None))


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and text only."""
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | None)


def _cut_slices(smaller: PreTrainedModel, shortened: Shortened) -> None:
    """Cut the tensors outside the layers that hold a slice for each layer."""
    renaming = shortened.renaming
    for name, dimension in shortened.slices.items():
        owner, _, leaf = name.rpartition(".")
        module = smaller.get_submodule(owner)
        whole = getattr(module, leaf)

        # (..., depth * size, ...) -> (..., depth, size, ...) -> (..., kept, size, ...) -> (..., kept * size, ...)
        kept = torch.tensor(renaming.kept, device=whole.device)
        slices = whole.detach().unflatten(dimension, (renaming.depth, -1))
        cut = slices.index_select(dimension, kept).flatten(dimension, dimension + 1)
        setattr(module, leaf, nn.Parameter(cut, whole.requires_grad) if isinstance(whole, nn.Parameter) else cut)


def _check_logits(model: PreTrainedModel, smaller: PreTrainedModel, removed: Sequence[int], units: Units) -> None:
    """Raise ValueError unless the shorter model computes what `model` does with the removed units' gates at zero."""
    with closed(trace_model(model, units), removed):
        expected = probe_logits(model)
    if not agree(probe_logits(smaller), expected, _TOLERANCE_HALF if _is_half(model) else _TOLERANCE):
        raise ValueError(
            f"without the {units} {list(removed)} the other {units} of {type(model).__name__} compute something else: "
            f"they use more of the removed {units} than the residual stream; choose other {units}"
        )


def _check_cache(model: PreTrainedModel, smaller: PreTrainedModel, removed: Sequence[int], units: Units) -> None:
    """Raise ValueError if the shorter model decodes something else with its cache than without it, unlike `model`."""
    tolerance = _CACHE_TOLERANCE_HALF if _is_half(model) else _CACHE_TOLERANCE
    error = _cache_error(smaller)
    if error <= tolerance:
        return
    if error > _CACHE_FACTOR * _cache_error(model):
        raise ValueError(
            f"without the {units} {list(removed)} {type(model).__name__} computes something else with its cache than "
            f"without: transformers keeps the cache in order by the removed {units}; choose other {units}"
        )


def _cache_error(model: PreTrainedModel) -> float:
    """How far the logits of tokens that are decoded with the cache lie from those of one pass over all of them, as a
    share of the largest; 0 for a model that does not generate, infinite where generating fails."""
    if not model.can_generate():
        return 0.0
    settings = GenerationConfig(
        min_new_tokens=_DECODED_TOKENS,
        max_new_tokens=_DECODED_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with frozen(model), torch.no_grad():
        try:
            decoded = model.generate(probe_ids(model), generation_config=settings)
        except Exception:  # errors of many kinds, of model types that do not generate from tokens alone
            return math.inf
        whole = model(input_ids=decoded.sequences, use_cache=False).logits.float()  # (1, tokens, vocabulary)

    found = torch.stack(decoded.logits, dim=1).float()  # (1, decoded tokens, vocabulary)
    expected = whole[:, -1 - _DECODED_TOKENS : -1].to(found.device)  # what comes before a token predicts it
    error = (found - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(0.0))  # logits that are not numbers are not the cache's fault


def _is_half(model: nn.Module) -> bool:
    return next(model.parameters()).dtype.itemsize < 4
