"""A fingerprint changes with anything that changes a result, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model

from blockspin.model import fingerprint

SAMPLES = random_samples((5, 7))


def change_last_weight(model: tf.PreTrainedModel) -> None:
    model.lm_head.weight.data.flatten()[-1] += 1e-6


def exchange_rows_of_the_embedding(model: tf.PreTrainedModel) -> None:
    weight = model.get_input_embeddings().weight.data
    weight[[3, 60]] = weight[[60, 3]]


def exchange_blocks(model: tf.PreTrainedModel) -> None:
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def change_dtype(model: tf.PreTrainedModel) -> None:
    model.bfloat16()


def change_setting(model: tf.PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 5000.0


CHANGES = [change_last_weight, exchange_rows_of_the_embedding, exchange_blocks, change_dtype, change_setting]


def wide_model() -> tf.PreTrainedModel:
    """Its larger weights are several of the chunks that are hashed by their sum."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_shows(change: Callable[[tf.PreTrainedModel], None]) -> None:
    model = wide_model()
    before = fingerprint.of_model(model), fingerprint.of_results(model, SAMPLES)
    assert before == (fingerprint.of_model(model), fingerprint.of_results(model, SAMPLES))
    change(model)
    after = fingerprint.of_model(model), fingerprint.of_results(model, SAMPLES)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_change_of_samples_or_settings_shows() -> None:
    model = tiny_model("llama")
    joined = [torch.cat(SAMPLES)]
    found = {
        fingerprint.of_results(model, SAMPLES),
        fingerprint.of_results(model, SAMPLES, "kl"),
        fingerprint.of_results(model, SAMPLES, "loss"),
        fingerprint.of_results(model, SAMPLES[::-1]),
        fingerprint.of_results(model, joined),
    }
    assert len(found) == 5


def test_where_a_model_was_loaded_from_does_not_matter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    loaded = []
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        loaded.append(tf.AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert fingerprint.of_model(loaded[0]) == fingerprint.of_model(loaded[1])


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_weights_may_lie_anywhere_in_memory(offset: int) -> None:
    """A weight that is a part of a larger tensor, at any place, has the fingerprint of its copy."""
    values = torch.randn(70 * 70 + offset, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Linear(70, 70, bias=False)
    module.weight.data = values[offset:].view(70, 70)
    apart = torch.nn.Linear(70, 70, bias=False)
    apart.weight.data = module.weight.data.clone()
    assert fingerprint.of_model(module) == fingerprint.of_model(apart)
