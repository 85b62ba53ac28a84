"""Loading a model in 4 bits: which of its linear layers the quantised kernels of this machine can hold."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..progress import console

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK_SIZE = 64  # inputs that share a scale
PACKED_OUTPUTS = 32  # outputs that are packed side by side for processors with AVX512-BF16


def nf4(structure: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings that load a model in NF4 (QLoRA, arXiv 2305.14314) on a device; needs bitsandbytes.

    On a processor with AVX512-BF16 bitsandbytes packs the weights anew at the first pass without gradients, and fails
    where a layer's inputs are no multiple of 64 or its outputs none of 32. Such layers stay in `compute_dtype`, and a
    line says which. Elsewhere every layer is quantised but those that transformers leaves out (the head). What is
    packed multiplies in bfloat16; never save it, because its scales are written in another order.

    structure: the model to load, its weights need not be there (`model_without_weights`).
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    if device.type != "cpu" or not packs_for_cpu():
        return config

    head: list[str] = get_keys_to_not_convert(structure)
    odd = [name for name in layers_that_cannot_be_packed(structure) if name not in head]
    if odd:
        config.llm_int8_skip_modules = [*head, *odd]
        console.print(
            f"This processor's 4-bit kernels hold widths that are multiples of {BLOCK_SIZE} (in) and {PACKED_OUTPUTS} "
            f"(out); these layers stay in {str(compute_dtype).removeprefix('torch.')}: {_summary(odd)}.",
            highlight=False,
            soft_wrap=True,
        )
    return config


def packs_for_cpu() -> bool:
    """Whether bitsandbytes packs 4-bit weights for this processor, as it does for those with AVX512-BF16."""
    # It warns about a package from a hub that would make this faster; nobody asked for it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.nn import modules

    return bool(modules.has_avx512bf16())


def layers_that_cannot_be_packed(model: nn.Module) -> list[str]:
    """Names of the linear layers whose widths do not fit the packed form."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (layer.in_features % BLOCK_SIZE or layer.out_features % PACKED_OUTPUTS):
            found.append(name)
    return found


def _summary(names: list[str]) -> str:
    """Layers that differ in numbers only as one entry: "30 x model.layers.*.mlp.down_proj"."""
    alike = Counter([re.sub(r"\b\d+\b", "*", name) for name in names])
    return ", ".join(f"{count} x {name}" for name, count in alike.items())
