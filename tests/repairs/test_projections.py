"""The linear maps that write to the residual stream, and those that read it, are found in unlike models."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from tiny import tiny_config, tiny_random_model
from torch import nn

from blockspin.model.tracing import trace_model
from blockspin.repairs.fitting import find_maps
from blockspin.repairs.projections import find_projections

PROJECTIONS = {
    "llama": [("self_attn.o_proj", 0), ("mlp.down_proj", 1)],
    "phi3": [("self_attn.o_proj", 0), ("mlp.down_proj", 1)],
    "gpt2": [("attn.c_proj", 0), ("mlp.c_proj", 1)],
    "gpt_neox": [("attention.dense", 0), ("mlp.dense_4h_to_h", 0)],  # both in one addition
    "gemma2": [],  # norms follow both
}
HYBRIDS = {
    "nemotron_h": [["mixer.out_proj"], ["mixer.shared_experts.down_proj"], ["mixer.o_proj"]],
    "jamba": [["mamba.out_proj", "feed_forward.down_proj"], ["self_attn.o_proj"]],
    "falcon": [["self_attention.dense", "mlp.dense_4h_to_h"]],
    "qwen2_moe": [["self_attn.o_proj"]],  # its shared expert is weighed by a gate
}
READINGS = {
    "llama": [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", 0, False),
        (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", 1, False),
    ],
    "phi3": [
        (("self_attn.qkv_proj",), "input_layernorm", 0, False),
        (("mlp.gate_up_proj",), "post_attention_layernorm", 1, False),
    ],
    "qwen2": [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", 0, True),
        (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", 1, False),
    ],
    "gpt2": [(("attn.c_attn",), "ln_1", 0, True), (("mlp.c_fc",), "ln_2", 1, True)],
    "gpt_neox": [
        (("attention.query_key_value",), "input_layernorm", 0, True),
        (("mlp.dense_h_to_4h",), "post_attention_layernorm", 0, True),
    ],
}


@pytest.mark.parametrize("name", list(PROJECTIONS))
def test_out_projections_are_found(name: str) -> None:
    for found in find_projections(trace_model(tiny_model(name))):
        assert [(projection.name, projection.addition) for projection in found] == PROJECTIONS[name]
        assert all(projection.factor == pytest.approx(1, rel=1e-5) for projection in found)


@pytest.mark.parametrize("name", list(READINGS))
def test_in_projections_are_found(name: str) -> None:
    for maps in find_maps(trace_model(tiny_model(name))):
        found = [(reading.names, reading.norm, reading.additions, reading.has_bias) for reading in maps.readings]
        assert found == READINGS[name]


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_out_projections_of_hybrids_and_experts_are_found(name: str) -> None:
    found = find_projections(trace_model(tiny_random_model(tiny_config(name))))
    for block, names in zip(found, HYBRIDS[name], strict=False):
        assert [projection.name for projection in block] == names


def test_a_factor_on_the_way_is_measured() -> None:
    model = tiny_random_model(tiny_config("granite", residual_multiplier=0.5))
    factors = [projection.factor for found in find_projections(trace_model(model)) for projection in found]
    assert factors == pytest.approx([0.5] * 12, rel=1e-5)


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.requires_grad_(False)

    class Quantised(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(inputs, self.weight.to(inputs.dtype))

    quantised = Quantised(48, 32, bias=False)
    quantised.weight = nn.Parameter(weight.round().to(torch.int8), requires_grad=False)
    model.model.layers[1].mlp.down_proj = quantised
    with pytest.raises(ValueError, match=r"mlp.down_proj in block 1 are quantised .*quantise it afterwards"):
        find_projections(trace_model(model))
