"""Finds the removable blocks of a causal language model. All knowledge of model structure lives in this file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

# What a child of a block is, by the class names inside it. The first match counts: experts made of MLPs are a moe.
_MIXERS = (
    ("moe", re.compile(r"moe|expert|router", re.IGNORECASE)),
    ("mamba", re.compile(r"mamba|ssm", re.IGNORECASE)),
    ("linear_attention", re.compile(r"gateddelta|linearattention|lightningattention", re.IGNORECASE)),
    ("attention", re.compile(r"attention|attn", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|feedforward|ffn", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Block:
    """A removable unit: one decoder layer with all its residual branches.

    index: position in the original model, from 0.
    kind: what the block holds, e.g. "attention+mlp", "attention+moe", "mamba".
    num_parameters: parameters inside the block.
    """

    index: int
    kind: str
    num_parameters: int


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated layers of the decoder: (name inside the model, the layers).

    The stack is the list of `num_hidden_layers` modules that holds the most parameters.

    Raises:
        ValueError: the model has no such list, so its blocks cannot be told apart.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    depth = getattr(config, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not stacks:
        raise ValueError(
            f"no removable blocks found in {type(model).__name__}: it has no list of {depth} layers "
            "(num_hidden_layers); blockspin shortens decoder-only transformers"
        )
    return max(stacks, key=lambda stack: _num_parameters([stack[1]]))


def find_blocks(model: nn.Module) -> list[Block]:
    """Every removable block of `model`, in order.

    Raises:
        ValueError: no stack of layers was found.
    """
    _, stack = find_stack(model)
    return [Block(i, _kind(layer), _num_parameters([layer])) for i, layer in enumerate(stack)]


def check_removal(removed: Iterable[int], num_blocks: int) -> tuple[int, ...]:
    """The removal as a sorted tuple of distinct block indices.

    Raises:
        ValueError: an index is out of range or repeated, or no block would be left.
    """
    indices = sorted(int(i) for i in removed)
    if len(set(indices)) != len(indices):
        raise ValueError(f"blocks are named twice in the removal {indices}")
    if indices and not 0 <= indices[0] <= indices[-1] < num_blocks:
        raise ValueError(f"the removal {indices} names blocks outside 0..{num_blocks - 1}")
    if len(indices) >= num_blocks:
        raise ValueError(f"removing {len(indices)} of {num_blocks} blocks leaves no model; remove fewer")
    return tuple(indices)


def shorten_config(config: object, kept: Sequence[int], depth: int) -> None:
    """Make a transformers configuration describe the kept layers only, in place.

    Sets the number of layers, and picks the kept entries of every list that has one entry a layer (layer_types, ...).
    """
    text = config.get_text_config(decoder=True)  # type: ignore[attr-defined]
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)


def _kind(layer: nn.Module) -> str:
    """The mixers among the block's children, e.g. "attention+mlp"; "block" where none is recognised."""
    found = []
    for child in layer.children():
        if _num_parameters([child]) == 0 or re.search(r"norm", type(child).__name__, re.IGNORECASE):
            continue
        names = " ".join(type(module).__name__ for module in child.modules())
        names = "mlp" if isinstance(child, nn.Linear) else names
        found += [kind for kind, pattern in _MIXERS if pattern.search(names)][:1]
    return "+".join(dict.fromkeys(found)) or "block"


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
