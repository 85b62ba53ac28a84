"""Finds the removable blocks of a causal language model. All knowledge of model structure lives in this file."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig

from ..problem import Block, Removal
from ..problem.constraints import whole

# Settings that hold the number of layers.
DEPTH = re.compile(r"^(num|n)_(hidden_|decoder_)?(layers?|blocks)$|^decoder_layers$")

_ENCODER_DEPTH = re.compile(r"^(num_)?encoder_layers$")
_IMAGE_FEATURES = "deepstack"  # in the names of the settings and arguments for image features between blocks

# What a module is, in the order of the parts of a kind: by its own name and class (the family's name left out), or by
# the names of what is inside it.
_MIXERS = (
    ("linear_attention", r"delta|linear_?att|lightning", r"time_decay"),
    ("mamba", r"mamba|ssm", r"(?=.*\bA_log\b)(?=.*\bD\b)"),
    ("recurrent", r"recurrent|lstm|rglru", None),
    ("conv", r"conv", None),
    ("cross_attention", r"cross_?att", None),
    ("attention", r"att", None),
    ("moe", r"moe|expert", r"\bexperts?\b"),
    ("mlp", r"mlp|feed_?forward|ffn|fc\d|fc_|dense|linear", None),
)
_NO_MIXER = re.compile(r"^\w+ (?!\w*att)\w*norm|hyper_?connection|residual$", re.IGNORECASE)
_LAYER = re.compile(r"decoder_?layer|transf", re.IGNORECASE)  # a layer inside a layer is looked into
_ORDER = ("attention", "cross_attention", "linear_attention", "mamba", "recurrent", "conv", "moe", "mlp")


class Stack(NamedTuple):
    """The repeated layers of a decoder, and the name of their list inside the model."""

    name: str
    layers: nn.ModuleList


def find_stack(model: nn.Module) -> Stack:
    """The repeated layers of the decoder.

    The stack is the list of as many modules as the text configuration has layers that holds the most parameters; parts
    with a configuration of their own (an image encoder) do not count.

    Raises:
        ValueError: the model has no such list, so its blocks cannot be told apart, it is part of an encoder-decoder, or
            `check_model` refuses it.
    """
    check_model(model)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    depths = {getattr(text, "num_hidden_layers", None)}
    has_encoder = config.is_encoder_decoder or text.is_encoder_decoder
    for setting, value in vars(text).items():
        if DEPTH.search(setting):
            depths.add(value)
        if _ENCODER_DEPTH.search(setting):
            has_encoder = True
    if has_encoder:
        raise ValueError(
            f"{type(model).__name__} is part of an encoder-decoder model; blockspin shortens decoder-only models"
        )

    # An image encoder may be as deep as the decoder; it is known by a configuration of another class.
    stacks: dict[str, nn.ModuleList] = {}
    foreign: tuple[str, ...] = ()
    for name, module in model.named_modules():
        own_config = getattr(module, "config", None)
        if name and isinstance(own_config, PretrainedConfig) and type(own_config) not in (type(config), type(text)):
            foreign += (f"{name}.",)

        if isinstance(module, nn.ModuleList) and len(module) in depths and not name.startswith(foreign):
            stacks[name] = module

    if not stacks:
        raise ValueError(
            f"no removable blocks found in {type(model).__name__}: it has no list of as many layers as its "
            "configuration says; blockspin shortens decoder-only transformers"
        )

    # Of the lists that are left the stack holds the most; a list beside it may hold the other parts of its layers.
    name = max(stacks, key=lambda name: count_parameters(stacks[name]))
    parts = []
    for other, module in stacks.items():
        beside = _parent(other) == _parent(name) and len(module) == len(stacks[name])
        if beside and count_parameters(module):
            parts.append(other)

    if len(parts) > 1:
        raise ValueError(
            f"the layers of {type(model).__name__} are spread over the lists {', '.join(parts)}; "
            "blockspin removes blocks that are modules of their own"
        )
    return Stack(name, stacks[name])


def check_model(model: nn.Module) -> None:
    """Refuse what is no language model, or is compiled.

    Blocks are left out and gated by changing how they run. A compiled model is compiled anew for each such change: a
    pass of milliseconds takes minutes.

    Raises:
        ValueError: the module has no configuration of transformers, or `torch.compile` was called on a part of it.
    """
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                "the model is compiled, and would be compiled anew for every set of blocks that is tried; give it as "
                "it was before torch.compile (`model._orig_mod`, or load it again) and compile the result"
            )
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        raise ValueError(
            f"{type(model).__name__} is no causal language model of transformers: it has no configuration; give what "
            "AutoModelForCausalLM.from_pretrained returns"
        )


def find_blocks(model: nn.Module) -> list[Block]:
    """Every removable block of `model`, in order.

    Raises:
        ValueError: no stack of layers was found.
    """
    blocks = []
    for i, layer in enumerate(find_stack(model).layers):
        blocks.append(Block(i, kind_of(layer), count_parameters(layer)))
    return blocks


def other_lists(model: nn.Module) -> list[str]:
    """Names of the lists of layers outside the stack that are called like it, such as those of an image encoder."""
    stack = find_stack(model).name
    found = []
    for name, module in model.named_modules():
        called_alike = name.rpartition(".")[2] == stack.rpartition(".")[2]
        inside = f"{name}.".startswith(f"{stack}.")
        if isinstance(module, nn.ModuleList) and called_alike and not inside:
            found.append(name)
    return found


def looks_at_images(block: Block) -> bool:
    """Whether a block attends to images instead of the tokens; on text it does not run."""
    kinds = block.kind.split("+")
    return "cross_attention" in kinds and "attention" not in kinds


def image_obstacle(model: nn.Module, removed: Sequence[int]) -> str | None:
    """Why images forbid a removal; None where they do not.

    It takes blocks that attend to them, or moves those after which features of images are added to the hidden states,
    or it cannot be told which these are.
    """
    looking = [block.index for block in find_blocks(model) if looks_at_images(block)]
    seeing = sorted({*looking} & {*removed})
    if seeing:
        return (
            f"the blocks {seeing} of {type(model).__name__} attend to images; what they do shows on no text, so "
            f"blockspin does not remove them; protect {looking} (--protect)"
        )

    # Models of this kind (DeepStack, arXiv 2406.04334) take the features as an argument of the decoder.
    decoder = model.get_submodule(_parent(find_stack(model).name))
    if _IMAGE_FEATURES not in " ".join(inspect.signature(decoder.forward).parameters):
        return None

    first = _blocks_with_features(model)
    if first is None:
        return (
            f"{type(model).__name__} adds features of images to the hidden states of certain blocks, and its "
            "configuration does not say to which; blockspin cannot tell what would move"
        )
    moved = [i for i in removed if i < first]
    if moved:
        return (
            f"among the first {first} blocks {type(model).__name__} adds features of images; "
            f"they would move without the blocks {moved}; protect these (--protect)"
        )
    return None


def _blocks_with_features(model: nn.Module) -> int | None:
    """After how many of the first blocks no more features of images are added; None: the configuration does not say."""
    config: Any = model.config
    values = config.to_dict()
    features = [value for name, value in _settings(values) if _IMAGE_FEATURES in name and value]
    if all(isinstance(value, list | tuple) and {*map(type, value)} == {int} for value in features):
        return max(map(len, features), default=0)  # as many features, one after each of the first blocks

    # Otherwise the blocks are named: by lists that name layers, in pairs with those of the image encoder, or alone.
    named: list[int] = []
    for name, value in values.items():
        if "layer" in name and isinstance(value, list | tuple):
            named += _numbers(value)
    return max(named) + 1 if named else None


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a list and in the lists inside it."""
    for entry in value:
        if isinstance(entry, list | tuple):
            yield from _numbers(entry)
        elif isinstance(entry, int):
            yield entry


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a configuration and of those inside it."""
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, dict):
            yield from _settings(value)


def check_removal(removed: Iterable[int], num_blocks: int) -> Removal:
    """The removal as a sorted tuple of distinct block indices.

    Raises:
        ValueError: an index is no whole number, out of range or repeated, or no block would be left.
    """
    indices = sorted([whole(i, "block") for i in removed])
    if len(set(indices)) != len(indices):
        raise ValueError(f"blocks are named twice in the removal {indices}")
    if indices and not 0 <= indices[0] <= indices[-1] < num_blocks:
        outside = ", ".join([str(i) for i in indices if not 0 <= i < num_blocks])
        raise ValueError(f"the removal names {outside}, outside the blocks 0 to {num_blocks - 1}")
    if len(indices) >= num_blocks:
        raise ValueError(f"removing {len(indices)} of {num_blocks} blocks leaves no model; remove fewer")
    return tuple(indices)


def kind_of(layer: nn.Module, parts: Sequence[str] | None = None) -> str:
    """The mixers inside the block, e.g. "attention+mlp"; "block" where none is recognised.

    parts: names of modules inside the block; those of them alone.
    """
    classes = set()
    for module in layer.modules():
        if type(module).__module__ == type(layer).__module__:
            classes.add(type(module).__name__)

    # What the names of all its classes begin with is the name of the family ("Qwen3") and says nothing of one of them.
    family = ""
    if len(classes) > 1:
        for first, last in zip(min(classes), max(classes), strict=False):
            if first != last:
                break
            family += first

    modules = dict(layer.named_children())
    if parts is not None:
        modules = {name.rpartition(".")[2]: layer.get_submodule(name) for name in parts}
    found = set(_mixers(modules, family))
    return "+".join(sorted(found, key=_ORDER.index)) or "block"


def _mixers(modules: Mapping[str, nn.Module], family: str) -> Iterator[str]:
    """What the modules of these names are; those that are not recognised are looked into."""
    for name, child in modules.items():
        own = f"{name} {type(child).__name__.removeprefix(family)}"
        if count_parameters(child) == 0 or _NO_MIXER.search(own):
            continue
        kind = _mixer(own, child)
        if kind is not None and not _LAYER.search(own):
            yield kind
        else:
            yield from _mixers(dict(child.named_children()), family)


def _mixer(own: str, module: nn.Module) -> str | None:
    """What a module is, by its own name and class (`own`) or by the names of what is inside it."""
    inside = " ".join([*dict(module.named_parameters()), *dict(module.named_modules())])
    for kind, own_pattern, inside_pattern in _MIXERS:
        if re.search(own_pattern, own, re.IGNORECASE) or (inside_pattern and re.search(inside_pattern, inside)):
            return kind
    return None


def _parent(name: str) -> str:
    """The name of the module that holds the one of this name."""
    return name.rpartition(".")[0]


def count_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold; shared parameters count once."""
    return sum(map(count_numbers, module.parameters()))


def count_numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; in 4 bits, those that it stands for."""
    packed = getattr(parameter, "quant_state", None)  # of bitsandbytes, which holds two numbers in a byte
    return parameter.numel() if packed is None else math.prod(packed.shape)
