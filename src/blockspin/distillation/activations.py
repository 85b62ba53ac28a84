"""What a forward pass keeps for the backward pass, estimated from the shapes of the weights before any is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model.blocks import find_stack

_NORM_INPUT = 4  # bytes: norms compute in float32


def activation_bytes(model: nn.Module, width: int, gradient_checkpointing: bool) -> float:
    """Bytes of activations for each token of a training.

    What a linear map returns is kept twice, as it is and as what is made of it (activated, multiplied, rotated), and a
    norm keeps its input in float32 and its output: right to a third for most model types. With gradient checkpointing
    it is the input of every block, and all of one block.

    model: of the configuration, without weights. width: bytes of a number.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    blocks = [_in_block(layer, width, experts) for layer in find_stack(model).layers]
    if gradient_checkpointing:
        return len(blocks) * width * int(text.hidden_size) + max(blocks)
    return sum(blocks)


def _in_block(layer: nn.Module, width: int, experts: int) -> float:
    """Bytes of a block for each token. experts: that a token goes through; all others do not count."""
    kept = 0
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:  # of all experts, (experts, outputs, inputs)
                kept += 2 * width * experts * weight.shape[1]
            elif weight.ndim == 2 and not isinstance(module, nn.Embedding):
                outputs = getattr(module, "nf", weight.shape[0])  # GPT-2 has its weights the other way round
                kept += 2 * width * int(outputs)
            elif weight.ndim == 1 and "norm" in type(module).__name__.lower():
                kept += (_NORM_INPUT + width) * weight.numel()
                break  # a bias belongs to the same norm
    return kept
