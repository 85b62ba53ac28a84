"""How many tokens of a batch should fit into the memory that is free, as far as the shapes of the weights tell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import free_memory
from .batches import BatchSize, Room, make_batches
from .blocks import find_stack
from .head import CHUNK_BYTES, LOGIT_COPIES
from .offload import running_device

SHARE = 1 / 2  # of the free memory; the rest is for states that are kept for later passes, and for what is not counted
COPIES = 4  # that are held at a time of what enters a block, and of what is widest in it


def tokens_that_fit(*models: nn.Module, backward: bool = False) -> float:
    """The tokens of a batch, padding included, that memory should suffice for, through one model at a time.

    Counted are what a block makes of them, and the logits of a chunk of them. What is not, such as attention matrices
    or the states of a scan, shows when memory runs out.

    backward: every block keeps what it makes for a backward pass.
    """
    fitting = math.inf
    for model in models:
        vocabulary: int = _text_config(model).vocab_size
        of_logits = LOGIT_COPIES * torch.float32.itemsize * vocabulary  # bytes of each token of a chunk
        for device, made in _made_on(model).items():
            held = sum(made) if backward else max(made)
            room = SHARE * free_memory(device)

            # All tokens with their logits, or as many as there is room for beside those of a full chunk.
            fitting = min(fitting, max(room / (held + of_logits), (room - LOGIT_COPIES * CHUNK_BYTES) / held))
    return fitting


def kept_bytes(model: nn.Module, gradient_checkpointing: bool) -> int:
    """Of each token, for a backward pass: what every block makes, or the inputs of all blocks and what one makes."""
    made = [one for on_device in _made_on(model).values() for one in on_device]
    if not gradient_checkpointing:
        return sum(made)
    width: int = _text_config(model).hidden_size
    return len(made) * width * next(model.parameters()).element_size() + max(made)


def lowered_size(
    batch_size: BatchSize, samples: Sequence[Tensor], *models: nn.Module, backward: bool = False
) -> list[str]:
    """The note that fewer samples run side by side than were asked for; none where as many should fit, or "auto".

    Raises:
        ValueError: unusable samples.
    """
    if batch_size == "auto":
        return []
    longest = make_batches(samples, batch_size)[0]
    largest = Room(tokens_that_fit(*models, backward=backward)).cut([longest])[0]
    taken, length = largest.token_ids.shape
    if taken == len(longest.indices):
        return []
    what_for = "of the gradients " if backward else ""
    return [
        f"Note: half of the free memory should not hold {len(longest.indices)} samples {what_for}side by side "
        f"(--batch-size {batch_size}); {taken} of {length:,} tokens are taken."
    ]


def _made_on(model: nn.Module) -> dict[torch.device, list[int]]:
    """For each device, what each block there makes of a token, in bytes."""
    config = _text_config(model)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    element = next(model.parameters()).element_size()  # bytes
    made = defaultdict(list)
    for layer in find_stack(model).layers:
        numbers = COPIES * (config.hidden_size + _widest(layer, experts))
        made[running_device(layer)].append(element * numbers)
    return made


def _text_config(model: Any) -> Any:
    """The settings of the decoder, whose class is not known here."""
    return model.config.get_text_config(decoder=True)


def _widest(layer: nn.Module, experts: int) -> int:
    """The most numbers that a linear map of a block makes of a token. experts: that a token goes through."""
    widest = 0
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:  # of all experts, (experts, outputs, inputs) or (experts, inputs, outputs)
                widest = max(widest, experts * max(weight.shape[1:]))
            elif weight.ndim == 2 and not isinstance(module, nn.Embedding):
                outputs = getattr(module, "out_features", weight.shape[0])  # weights in 4 bits have another shape
                widest = max(widest, getattr(module, "nf", outputs))  # GPT-2 has its weights the other way round
    return widest
