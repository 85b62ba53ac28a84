"""What each unit of a model costs, and the whole model: parameters, bytes on disk, cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import count_parameters, find_blocks, find_stack
from ..model.loading import context_length, load_config, local_folder, model_without_weights
from ..model.weights import read_headers, tensor_shapes, weight_paths
from ..problem import Block, block_of
from ..surgery.shards import layer_prefix

MIXERS_WITHOUT_CACHE = {"mlp", "moe"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # settings, by family
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class UnitCosts:
    """What the units of a model have of everything that is counted; every tuple is (num_units,).

    active: parameters that a token uses; of the experts in a mixture those that are chosen for it.
    num_bytes: of the weights on disk.
    cache_bytes: what a text of `context` tokens takes in the key-value cache and in recurrent states; None where it
        cannot be told without running the model.
    all_parameters, all_active, all_bytes: of the whole model, with what is outside the units.
    """

    units: tuple[Block, ...]
    active: tuple[int, ...]
    num_bytes: tuple[int, ...]
    cache_bytes: tuple[int, ...] | None
    context: int
    all_parameters: int
    all_active: int
    all_bytes: int

    @property
    def parameters(self) -> tuple[int, ...]:
        return tuple([unit.num_parameters for unit in self.units])


def unit_costs(
    source: str | Path,
    units: Sequence[Block] | None = None,
    *,
    context: int | None = None,
    trust_remote_code: bool = False,
) -> UnitCosts:
    """Look at a model by its configuration and the headers of its weights; no weights are read.

    units: blocks (the default) or sub-layers. context: tokens of a text in the cache; by default 4,096, or what the
    model holds.

    Raises:
        ValueError: there is no such model, its weights are not readable, or it holds fewer tokens.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    longest = context_length(config)
    if context is not None and longest is not None and context > longest:
        raise ValueError(f"the model holds {longest:,} tokens, not {context:,} (--context)")
    length = context or min(4096, longest or 4096)

    model = model_without_weights(config, trust_remote_code=trust_remote_code)
    dtype = getattr(config, "dtype", None) or torch.float32
    blocks = find_blocks(model)
    chosen = tuple(units) if units is not None else tuple(blocks)
    block_bytes, all_bytes = _bytes_on_disk(source, model, dtype)

    inactive = []  # (num_blocks,) parameters of experts that are not chosen for a token
    for block, layer in zip(blocks, find_stack(model).layers, strict=True):
        inactive.append(block.num_parameters - active_parameters(layer, config))

    # What a sub-layer has of its block: its share of the parameters, all of which are of one kind of number.
    active, num_bytes = [], []
    for unit in chosen:
        block = blocks[block_of(unit)]
        num_bytes.append(block_bytes[block.index] * unit.num_parameters // max(block.num_parameters, 1))
        active.append(unit.num_parameters - (inactive[block.index] if "moe" in unit.kind else 0))

    all_parameters = count_parameters(model)
    cache = cache_of_layers(model, len(blocks), dtype, length)
    return UnitCosts(
        units=chosen,
        active=tuple(active),
        num_bytes=tuple(num_bytes),
        cache_bytes=None if cache is None else _by_unit(cache, chosen),
        context=length,
        all_parameters=all_parameters,
        all_active=all_parameters - sum(inactive),
        all_bytes=all_bytes,
    )


def cache_of_layers(model: PreTrainedModel, num_layers: int, dtype: torch.dtype, length: int) -> tuple[int, ...] | None:
    """Bytes of each layer's part of the cache after a text of so many tokens: (num_layers,).

    Full windows and recurrent states count as what they are. None where the model does not run without weights.

    model: on the meta device; it becomes one of bfloat16, which all kernels take there. dtype: of the model as it is.
    """
    model = model.to(torch.bfloat16).eval()
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            cache = model(input_ids=tokens, use_cache=True).get("past_key_values")
    except (RuntimeError, NotImplementedError):  # what depends on values of tensors
        return None
    layers = getattr(cache, "layers", None)
    if layers is None or len(layers) > num_layers:
        return None

    # Layers at the end may share the cache of others, and have none.
    sizes = [0] * num_layers
    for i, layer in enumerate(layers):
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                width = dtype.itemsize if value.dtype == torch.bfloat16 else value.element_size()
                sizes[i] += value.numel() * width
    return tuple(sizes)


def _by_unit(of_layers: Sequence[int], units: Sequence[Block]) -> tuple[int, ...]:
    """The cache of each unit: a layer's belongs to its first unit that mixes tokens."""
    found = [0] * len(units)
    given: set[int] = set()
    for place, unit in enumerate(units):
        layer = block_of(unit)
        if layer not in given and not {*unit.kind.split("+")} <= MIXERS_WITHOUT_CACHE:
            found[place] = of_layers[layer]
            given.add(layer)
    return tuple(found)


def _bytes_on_disk(source: str | Path, model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[int], int]:
    """Bytes of the weights of each layer, and of all; from the files, or of `dtype` where they are not safetensors."""
    stack_name, layers = find_stack(model)
    by_layer = [count_parameters(layer) * dtype.itemsize for layer in layers]
    paths = weight_paths(local_folder(source))
    if paths[0].suffix == ".bin":
        return by_layer, count_parameters(model) * dtype.itemsize

    inside = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{stack_name}."):
            inside[name.removeprefix(f"{stack_name}.")] = parameter.shape
    files = read_headers(paths)
    prefix = layer_prefix(tensor_shapes(files), stack_name, len(layers), inside)

    whole, by_layer = 0, [0] * len(layers)
    for file in files:
        for name, tensor in file.tensors.items():
            begin, end = tensor["data_offsets"]
            whole += end - begin
            index, dot, _ = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and dot and index.isdecimal() and int(index) < len(layers):
                by_layer[int(index)] += end - begin
    return by_layer, whole


def active_parameters(layer: nn.Module, config: PretrainedConfig) -> int:
    """Parameters of a layer that a token uses."""
    text: Any = config.get_text_config(decoder=True)
    experts = next((getattr(text, name) for name in _EXPERTS if getattr(text, name, None)), None)
    chosen = next((getattr(text, name) for name in _CHOSEN if getattr(text, name, None)), None)
    if not isinstance(experts, int) or not isinstance(chosen, int):
        return count_parameters(layer)

    # Experts lie in a list of modules, or all in one tensor; those that are shared are called otherwise.
    routed = 0
    for name, parameter in layer.named_parameters():
        if ".experts." in f".{name}":
            routed += parameter.numel()
    return count_parameters(layer) - routed + routed * min(chosen, experts) // experts
