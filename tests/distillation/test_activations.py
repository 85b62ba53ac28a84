"""The estimate of activations against what autograd keeps."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny import tiny_config, tiny_random_model

from blockspin.distillation.activations import activation_bytes


def kept_bytes(model: tf.PreTrainedModel, tokens: int) -> int:
    """Of all tensors but weights that the decoder keeps for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=torch.arange(tokens)[None] % 64, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "mixtral", "gpt_neox", "phi3"])
def test_the_estimate_is_what_autograd_keeps(model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type, hidden_size=128, intermediate_size=384, head_dim=32))
    tokens = 48
    assert activation_bytes(model, 4, False) == pytest.approx(kept_bytes(model, tokens) / tokens, rel=0.3)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    model = tiny_random_model(tiny_config("llama"))
    whole, less = activation_bytes(model, 2, False), activation_bytes(model, 2, True)
    depth, width = 6, 32
    assert less == depth * 2 * width + whole / depth
