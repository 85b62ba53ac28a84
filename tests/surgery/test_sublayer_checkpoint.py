"""Sub-layers removed from checkpoint to checkpoint: what is written loads, computes the same, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model
from safetensors.torch import load_file
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin.evaluation.side_by_side import missing_sublayers
from blockspin.model.batches import make_batches
from blockspin.model.tracing import closed, trace_model
from blockspin.problem import Removal
from blockspin.surgery.checkpoint import prune_checkpoint

BATCH = make_batches(random_samples((9, 9)), 2)[0]


def pruned(model: tf.PreTrainedModel, removed: Removal, folder: Path) -> tf.PreTrainedModel:
    model.save_pretrained(folder / "whole")
    bs.prune_sublayers(folder / "whole", removed, folder / "short", progress=False)
    return tf.AutoModelForCausalLM.from_pretrained(folder / "short", trust_remote_code=True).eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("removed", [(3,), (2, 3, 4)])
def test_a_loaded_checkpoint_computes_what_closed_gates_do(family: str, removed: Removal, tmp_path: Path) -> None:
    model = tiny_model(family)
    with torch.no_grad(), closed(trace_model(model, "sublayers"), removed):
        expected = BATCH.forward(model)
    loaded = pruned(model, removed, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(BATCH.forward(loaded), expected)

    record = json.loads((tmp_path / "short/blockspin.json").read_text())
    assert record["sublayers"] == list(removed)
    assert record["removed"] == ([1] if 2 in removed else [])
    assert "trust_remote_code" in (tmp_path / "short/README.md").read_text()


def test_experts_go_from_checkpoints(tmp_path: Path) -> None:
    model = tiny_random_model(tiny_config("qwen3_moe"))
    experts = [unit.index for unit in bs.find_units(model, "sublayers") if unit.kind == "moe"]
    with torch.no_grad(), closed(trace_model(model, "sublayers"), experts[1:2]):
        expected = BATCH.forward(model)
    with torch.no_grad():
        torch.testing.assert_close(BATCH.forward(pruned(model, tuple(experts[1:2]), tmp_path)), expected)


def test_sublayers_that_are_blocks_go_byte_by_byte(tmp_path: Path) -> None:
    loaded = pruned(tiny_model("llama"), (2, 3), tmp_path)
    assert type(loaded) is tf.LlamaForCausalLM
    prune_checkpoint(tmp_path / "whole", [1], tmp_path / "blocks", progress=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("short", "blocks")]
    assert weights[0] == weights[1]


def test_a_table_of_models_names_what_is_gone(tmp_path: Path) -> None:
    pruned(tiny_model("llama"), (3, 4), tmp_path)
    models = {name: str(tmp_path / name) for name in ("whole", "short")}
    assert missing_sublayers(models) == "short is without mlp of block 1, attention of block 2."


def test_weights_stay_as_they_are_on_disk(tmp_path: Path) -> None:
    """A checkpoint in 16 bits is not twice as large afterwards, though a CPU computes with it in float32."""
    pruned(tiny_model("llama").to(torch.bfloat16), (3,), tmp_path)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "short"))
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)  # dtypes too
    assert json.loads((tmp_path / "short/config.json").read_text())["dtype"] == "bfloat16"


def test_the_same_call_again_leaves_the_result_and_another_is_refused(tmp_path: Path) -> None:
    pruned(tiny_model("llama"), (3,), tmp_path)
    written = (tmp_path / "short/model.safetensors").stat().st_mtime_ns
    bs.prune_sublayers(tmp_path / "whole", [3], tmp_path / "short", progress=False)
    assert (tmp_path / "short/model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="exists already"):
        bs.prune_sublayers(tmp_path / "whole", [4], tmp_path / "short", progress=False)


def test_what_cannot_be_expressed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "whole")
    for removed in ([0, 2, 4, 6], [8], [1, 1]):
        with pytest.raises(ValueError, match=r"no attention|outside|twice"):
            bs.prune_sublayers(tmp_path / "whole", removed, tmp_path / "short", progress=False)
    assert not (tmp_path / "short").exists()


def decilm(removed: Removal, folder: Path) -> tf.PreTrainedModel:
    config = tiny_config("llama", intermediate_size=256, hidden_act="silu")
    return pruned(tiny_random_model(config), removed, folder)


def test_a_llama_is_decilm_too(tmp_path: Path) -> None:
    """As released models of the architecture say it: what is gone is a no-op, the others have groups and widths."""
    loaded = decilm((4, 7), tmp_path)
    written = json.loads((tmp_path / "short/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert type(loaded).__name__ == "DeciLMForCausalLM"

    config, blocks = loaded.config, loaded.config.block_configs
    assert [block.attention.no_op for block in blocks] == [False, False, True, False, False, False]
    assert [block.ffn.no_op for block in blocks] == [False, False, False, True, False, False]
    assert blocks[2].attention.n_heads_in_group is None
    assert blocks[0].attention.n_heads_in_group == config.num_attention_heads // config.num_key_value_heads
    assert int(2 * blocks[0].ffn.ffn_mult * config.hidden_size / 3) == config.intermediate_size

    # Saved again it is the same.
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["block_configs"] == written["block_configs"]
    assert again["architectures"] == ["DeciLMForCausalLM"]


def test_sublayers_go_in_two_steps(tmp_path: Path) -> None:
    """As they do at once, and the record and the card tell of both in numbers of the original."""
    at_once = decilm((4, 7), tmp_path)
    bs.prune_sublayers(tmp_path / "whole", [7], tmp_path / "first", progress=False)
    bs.prune_sublayers(tmp_path / "first", [4], tmp_path / "second", trust_remote_code=True, progress=False)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    torch.testing.assert_close(loaded.state_dict(), at_once.state_dict(), rtol=0, atol=0)
    written, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("second", "short"))
    assert written == expected

    record = json.loads((tmp_path / "second/blockspin.json").read_text())
    assert record["gone"] == ["mlp of block 3", "attention of block 2"]
    assert (record["sublayers"], record["original"]["removed"]) == ([4], [])
    card = (tmp_path / "second/README.md").read_text()
    assert "without 2 sub-layers" in card
    assert "without mlp of block 3, attention of block 2" in card


def test_a_second_removal_may_change_the_modelling_file(tmp_path: Path) -> None:
    """Without its first attention a DeciLM is none any more; its file must be another one then."""
    decilm((7,), tmp_path)
    bs.prune_sublayers(tmp_path / "short", [0, 2, 3], tmp_path / "second", trust_remote_code=True, progress=False)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True).eval()
    assert type(loaded).__name__ == "ShortenedLlamaForCausalLM"
    whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad(), closed(trace_model(whole, "sublayers"), (0, 2, 3, 7)):
        expected = BATCH.forward(whole)
    with torch.no_grad():
        torch.testing.assert_close(BATCH.forward(loaded), expected)

    # Whole blocks are their sub-layers; as blocks they are refused, and nothing is written.
    with pytest.raises(ValueError, match="lacks sub-layers"):
        prune_checkpoint(tmp_path / "short", [1], tmp_path / "third", trust_remote_code=True, progress=False)
    assert not (tmp_path / "third").exists()


def test_a_llama_whose_first_attention_is_gone_is_no_decilm(tmp_path: Path) -> None:
    assert not hasattr(decilm((0,), tmp_path).config, "block_configs")


def test_repair_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama", scale=2.0)
    pruned(model, (3, 4), tmp_path)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(2, 64, (32,), generator=generator) for _ in range(48)]
    report = bs.repair_checkpoint(
        tmp_path / "short", tmp_path / "whole", samples, tmp_path / "repaired", trust_remote_code=True, progress=False
    )
    assert report.kl_after < report.kl_before
    repaired = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", trust_remote_code=True)
    assert bs.remove_blocks(model, (3, 4), units="sublayers").num_parameters() == repaired.num_parameters()
