"""Models whose blocks lack some of their modules: what their configuration says, and the modelling file that reads it.

No stock class of transformers leaves out the attention or the MLP of a layer. A small file in the checkpoint does
(modeling_sublayers.py, the same for all), and the class of the model in memory is the one of that file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import find_stack, kind_of
from ..model.loading import auto_class
from ..model.tracing import TracedModel
from ..model.units import lacking_modules
from ..problem import Sublayer
from . import modeling_sublayers

MODELING = "modeling_sublayers"  # the name of the file in a checkpoint, without .py
_WIDTHS = 256  # those of a DeciLM feed-forward are multiples of it


# What config.json says of a model that lacks modules, and of no other.
_OWN_SETTINGS = (
    "model_type",
    "architectures",
    "auto_map",
    "absent_modules",
    "cache_positions",
    "per_layer_config",
    "block_configs",
)


@dataclass(frozen=True)
class Absent:
    """What the blocks of a shortened model lack.

    modules: the names of the modules in the model -> length of the tuple that each returned, 0 for a bare tensor.
    kinds: position of a block in the shortened model -> the kinds of its branches that are gone.
    """

    modules: dict[str, int]
    kinds: dict[int, list[str]]


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that a model is one of; its own, but where it lacks modules."""
    if not lacks_modules(model.config):
        return type(model)
    return next(base for base in type(model).__mro__ if base.__module__.startswith("transformers.models."))


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the model with all its modules; the same one where none is gone."""
    if not lacks_modules(config):
        return config
    made = next(base for base in type(config).__mro__ if base.__module__.startswith("transformers.models."))
    values = {name: value for name, value in config.to_dict().items() if name not in _OWN_SETTINGS}
    return _config_of(made, values, config)


def lacks_modules(config: PretrainedConfig) -> bool:
    """Whether a configuration is one of the modelling file."""
    return getattr(config, "absent_modules", None) is not None


def absent_before(model: PreTrainedModel, made: PreTrainedModel, kept: list[int]) -> Absent:
    """The modules that the kept blocks of a model lack already.

    kept: the blocks that stay, in order. made: a model of the stock class with these blocks and all their modules.
    """
    stack = find_stack(made)
    found = Absent({}, {})
    for block, names in lacking_modules(model, stack.name).items():
        if block not in kept:
            continue
        position = kept.index(block)
        found.kinds[position] = kind_of(stack.layers[position], names).split("+")
        for name in names:
            gone = model.get_submodule(f"{stack.name}.{block}.{name}")
            found.modules[f"{stack.name}.{position}.{name}"] = int(gone.outputs)
    return found


def add_absent(found: Absent, traced: TracedModel, removed: Collection[int], kept: list[int]) -> None:
    """Add the modules that go with the branches that are removed from blocks that stay.

    removed: numbers of sub-layers. kept: the blocks of the original that stay, in order.

    Raises:
        ValueError: a branch has no modules of its own, or none that can be left out.
    """
    stack = find_stack(traced.model).name
    for unit in traced.units:
        assert isinstance(unit, Sublayer)
        if unit.index not in removed or unit.block not in kept or unit.branch is None:
            continue

        parts = traced.traces[unit.block].parts[unit.branch]
        if not parts or not all(part.passes_on for part in parts):
            raise ValueError(
                f"sub-layer {unit.index} ({unit.kind} of block {unit.block}) of {type(traced.model).__name__} has no "
                "modules of its own that can be left out; choose other sub-layers, or whole blocks (--units blocks)"
            )
        position = kept.index(unit.block)
        found.kinds.setdefault(position, []).append(unit.kind)
        for part in parts:
            found.modules[f"{stack}.{position}.{part.name}"] = part.outputs


def cache_positions(model: nn.Module, absent: Collection[str]) -> dict[str, int]:
    """Where in the cache the attention that is left keeps its keys and values, where that is not at its layer's place.

    transformers reads the number of cached tokens from the first entry, so the entries close up; not where layers have
    caches of several types, whose order the configuration fixes.
    """
    config: Any = model.config
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    if len(set(kinds)) > 1:
        return {}

    stack = find_stack(model)
    positions: dict[str, int] = {}
    used = 0  # entries of the cache so far
    for place, layer in enumerate(stack.layers):
        caching = []
        for name, module in layer.named_modules():
            path = f"{stack.name}.{place}.{name}"
            gone = any(f"{path}.".startswith(f"{other}.") for other in absent)
            if name and getattr(module, "layer_idx", None) == place and not gone:
                caching.append(path)

        for path in caching:
            if used != place:
                positions[path] = used
        used += bool(caching)
    return positions


def is_decilm_shape(config: PretrainedConfig, absent: Absent) -> bool:
    """Whether runtimes that know DeciLM (vLLM, llama.cpp) can run the model: a Llama without biases whose first layer
    has its attention."""
    settings: dict[str, Any] = config.to_dict()
    plain = config.model_type == "llama" and not settings.get("attention_bias") and not settings.get("mlp_bias")
    if not plain or "attention" in absent.kinds.get(0, []):
        return False
    heads_fill: bool = settings["head_dim"] * settings["num_attention_heads"] == settings["hidden_size"]
    gated: bool = settings["hidden_act"] == "silu" and settings["intermediate_size"] % _WIDTHS == 0
    return heads_fill and gated


def absent_settings(model: PreTrainedModel, absent: Absent) -> dict[str, Any]:
    """What config.json says besides, for the modelling file, for transformers itself and for runtimes with DeciLM.

    model: without the blocks that are gone, but with all modules of the others.
    """
    skipped = {str(position): {"skip": kinds} for position, kinds in absent.kinds.items()}
    made = class_without(model, absent)
    opening = auto_class(model.config).__name__
    settings: dict[str, Any] = {
        "model_type": made.config_class.model_type,
        "architectures": [made.__name__],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{made.config_class.__name__}",
            opening: f"{MODELING}.{made.__name__}",
        },
        "absent_modules": absent.modules,
        "cache_positions": cache_positions(model, absent.modules),
    }
    if model.config.get_text_config(decoder=True) is model.config:
        settings["per_layer_config"] = skipped
    if is_decilm_shape(model.config, absent):
        settings["block_configs"] = _block_configs(model, absent)
    return settings


def _block_configs(model: PreTrainedModel, absent: Absent) -> list[dict[str, Any]]:
    """What DeciLM's configuration says of every layer."""
    config: Any = model.config
    heads = config.num_attention_heads // config.num_key_value_heads
    multiplier = 3 * config.intermediate_size / (2 * config.hidden_size)  # the width is 2/3 of it times the hidden size
    blocks = []
    for position in range(config.num_hidden_layers):
        gone = absent.kinds.get(position, [])
        no_attention, no_mlp = "attention" in gone, "mlp" in gone
        attention = {"n_heads_in_group": None if no_attention else heads, "no_op": no_attention}
        ffn = {"ffn_mult": None if no_mlp else multiplier, "no_op": no_mlp}
        blocks.append(
            {
                "attention": {**attention, "replace_with_linear": False},
                "ffn": {**ffn, "replace_with_linear": False},
            }
        )
    return blocks


def class_without(model: PreTrainedModel, absent: Absent) -> type[PreTrainedModel]:
    """The class of the modelling file for a model of a stock class.

    Raises:
        ValueError: the class comes with the model, not with transformers.
    """
    stock = type(model)
    if getattr(transformers, stock.__name__, None) is not stock:
        raise ValueError(
            f"{stock.__name__} is code that comes with the model; sub-layers are removed from classes of transformers "
            "only: remove whole blocks (--units blocks)"
        )
    name = "DeciLMForCausalLM" if is_decilm_shape(model.config, absent) else f"Shortened{stock.__name__}"
    made: type[PreTrainedModel] = getattr(modeling_sublayers, name)
    return made


def leave_out(model: PreTrainedModel, absent: Absent) -> None:
    """Take the modules out of a model, in place; its class becomes that of the modelling file."""
    made = class_without(model, absent)
    settings = absent_settings(model, absent)

    # Both say in config.json where they are, and bring their file along when they are saved.
    opening = auto_class(model.config).__name__
    made.config_class.register_for_auto_class()
    made.register_for_auto_class(opening)
    old: Any = model.config
    config = _config_of(made.config_class, {**old.to_dict(), **settings}, old)

    # The class takes the modules out when it makes a model; this one is made already.
    model.__class__ = made
    model._weight_conversions = []  # it is saved by the names that it has: transformers converts none for such classes
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    for name, outputs in absent.modules.items():
        model.set_submodule(name, modeling_sublayers.Absent(outputs))  # type: ignore[no-untyped-call]
    for name, position in settings["cache_positions"].items():
        model.get_submodule(name).layer_idx = position


def _config_of(made: type[PretrainedConfig], values: Mapping[str, Any], old: PretrainedConfig) -> PretrainedConfig:
    """A configuration of a class, which chooses the kernels that the old one does."""
    config = made.from_dict(dict(values))
    config._attn_implementation = old._attn_implementation
    config._experts_implementation = old._experts_implementation
    return config
