"""Llamas without some of their attention run in llama.cpp as the architecture deci. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from numpy.typing import NDArray
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin.problem import Removal

VOCABULARY = 64
PROMPT = [5, 9, 33, 7, 12, 40, 3, 28]


def shortened(removed: Removal, folder: Path) -> tf.PreTrainedModel:
    config = tiny_config("llama", vocab_size=VOCABULARY, intermediate_size=256, hidden_act="silu")
    tiny_random_model(config).save_pretrained(folder / "whole")
    bs.prune_sublayers(folder / "whole", removed, folder / "short", progress=False)
    return tf.AutoModelForCausalLM.from_pretrained(folder / "short", trust_remote_code=True).eval()


def permuted(weight: torch.Tensor, heads: int) -> NDArray[np.float32]:
    """The rows of a query or key projection in the order in which llama.cpp rotates pairs."""
    rows = weight.view(heads, 2, -1, weight.shape[1])  # (heads, halves, half of a head, width)
    array: NDArray[np.float32] = rows.transpose(1, 2).reshape(weight.shape).numpy()
    return array


def write_gguf(model: tf.PreTrainedModel, path: Path) -> None:
    """What llama.cpp's converter writes of a DeciLM, from `block_configs`: heads and widths of 0 where nothing is."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    head_counts, group_counts, widths = [], [], []
    for block in config.block_configs:
        group = block.attention.n_heads_in_group
        head_counts.append(0 if group is None else config.num_attention_heads)
        group_counts.append(0 if group is None else config.num_attention_heads // group)
        multiplier = block.ffn.ffn_mult or 0.0
        widths.append(256 * math.ceil(int(2 * multiplier * config.hidden_size / 3) / 256))

    writer = gguf.GGUFWriter(path, "deci")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths)
    writer.add_head_count(head_counts)
    writer.add_head_count_kv(group_counts)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([3, 3, 2] + [1] * (VOCABULARY - 3))  # control tokens, an unknown one, ordinary ones

    tensors = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm, "output": model.lm_head}
    for i, layer in enumerate(model.model.layers):
        if head_counts[i]:
            attention = layer.self_attn
            for name, projection, heads in (
                ("attn_q", attention.q_proj, head_counts[i]),
                ("attn_k", attention.k_proj, group_counts[i]),
            ):
                writer.add_tensor(f"blk.{i}.{name}.weight", permuted(projection.weight.detach(), heads))
            tensors[f"blk.{i}.attn_v"], tensors[f"blk.{i}.attn_output"] = attention.v_proj, attention.o_proj
            tensors[f"blk.{i}.attn_norm"] = layer.input_layernorm
        if widths[i]:
            tensors[f"blk.{i}.ffn_norm"] = layer.post_attention_layernorm
            tensors[f"blk.{i}.ffn_gate"] = layer.mlp.gate_proj
            tensors[f"blk.{i}.ffn_up"], tensors[f"blk.{i}.ffn_down"] = layer.mlp.up_proj, layer.mlp.down_proj
    for name, module in tensors.items():
        writer.add_tensor(f"{name}.weight", module.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(path: Path) -> NDArray[np.float32]:
    """(prompt, vocabulary): what llama.cpp computes."""
    llama = pytest.importorskip("llama_cpp").Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    llama.eval(PROMPT)
    return np.array(llama.scores[: len(PROMPT)])


def expected_of(model: tf.PreTrainedModel) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    return logits


@pytest.mark.parametrize("removed", [(4,), (2, 6), (2, 3, 8)])
def test_llama_cpp_computes_what_transformers_computes(removed: Removal, tmp_path: Path) -> None:
    model = shortened(removed, tmp_path)
    write_gguf(model, tmp_path / "short.gguf")
    expected = expected_of(model)
    np.testing.assert_allclose(logits_of(tmp_path / "short.gguf"), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_llama_cpp_loses_the_attention_of_a_layer_without_mlp(tmp_path: Path) -> None:
    """Why `prune` warns: there is no error there, and the result is another."""
    model = shortened((5,), tmp_path)
    write_gguf(model, tmp_path / "short.gguf")
    expected = expected_of(model)
    assert np.abs(logits_of(tmp_path / "short.gguf") - expected).max() > 0.1 * np.abs(expected).max()
