"""Models in 4 or 8 bits: how transformers is told to load one, and what it cannot be used for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings that load linear layers in NF4 (QLoRA, arXiv 2305.14314) and multiply in `compute_dtype`.

    The head stays as it is, and so do weights that are not those of a linear layer, such as experts that transformers
    keeps in one tensor. Needs bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    # It warns about a package from a hub that would make this faster; nobody asked for it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def int8() -> BitsAndBytesConfig:
    """The settings that load linear layers in 8 bits, row by row, and round what enters them, token by token.

    It is LLM.int8() (arXiv 2208.07339) without the columns that stay in 16 bits there: which do depends on all tokens
    of a batch, and a sample must give the same in any. The rest is as with `nf4`.
    """
    from transformers import BitsAndBytesConfig

    # It says of every product that what enters becomes float16 on the way.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def keep_unpacked(model: nn.Module) -> None:
    """Have the 4-bit layers of a model compute as they do on every machine.

    On a processor with AVX512-BF16 bitsandbytes packs the weights anew at the first pass. Packed layers multiply in
    bfloat16, fail at widths that do not fit, and compute something else once their state was read (0.50.2).
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def is_quantized(model: nn.Module) -> bool:
    """Whether some of the weights of a model stand for others, as its configuration says."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def rounds_activations(model: nn.Module) -> bool:
    """Whether what enters the layers of a model is rounded too (`int8`)."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return bool(getattr(settings, "load_in_8bit", False))


def check_unquantized(model: nn.Module, purpose: str) -> None:
    """Refuse a quantised model for what needs the true weights.

    purpose: what does, as the subject of a sentence: "a repair".

    Raises:
        ValueError: the model is quantised.
    """
    if is_quantized(model):
        raise ValueError(f"{purpose} needs the true weights, and these are quantised; leave out --quantization")
