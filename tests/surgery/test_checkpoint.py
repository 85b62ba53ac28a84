"""Removal in memory and on disk: the same model, ordinary, loadable, with a working cache."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import random_samples, save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from blockspin.model.batches import make_batches
from blockspin.model.tracing import skipped, trace_model
from blockspin.surgery.checkpoint import checkpoint_bytes, prune_checkpoint
from blockspin.surgery.memory import remove_blocks

REMOVALS = [(0,), (3,), (1, 2), (0, 3)]


@pytest.mark.parametrize("removed", REMOVALS)
def test_disk_equals_memory_and_the_cache_works(family: str, removed: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    in_memory = remove_blocks(model, removed)
    prune_checkpoint(tmp_path / "whole", removed, tmp_path / "short", progress=False)
    loaded, report = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "short", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.num_hidden_layers == in_memory.config.num_hidden_layers == 4 - len(removed)
    batch = make_batches(random_samples((12, 12)), 2)[0]
    with torch.no_grad(), skipped(trace_model(model), removed):
        expected = batch.forward(model)
    for shortened in (loaded, in_memory):
        with torch.no_grad():
            torch.testing.assert_close(batch.forward(shortened), expected)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        cached, uncached = (shortened.generate(batch.token_ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, uncached)
        assert cached.shape == (2, 24)


def test_memory_removal_shares_weights_and_leaves_the_model_whole() -> None:
    model = tiny_model("llama")
    smaller = remove_blocks(model, [1], copy=False)
    assert smaller.model.layers[1].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: the head is the embedding
def test_what_happens_to_a_copy_does_not_happen_to_the_model(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = remove_blocks(model, [1])
    tied = {id(p) for p in model.parameters()} & {id(p) for p in smaller.parameters()}
    assert not tied
    assert len(list(smaller.parameters())) < len(list(model.parameters()))
    smaller.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    embedding, head = smaller.get_input_embeddings().weight, smaller.get_output_embeddings().weight
    assert (embedding is head) == model.config.tie_word_embeddings


def test_lists_with_an_entry_a_layer_follow_the_removal() -> None:
    model = tiny_model("gemma2")
    types = list(model.config.layer_types)
    assert len(set(types)) == 2
    assert remove_blocks(model, [0]).config.layer_types == types[1:]


def test_a_removal_that_the_configuration_cannot_express_is_refused() -> None:
    """Jamba places its attention layers by a period and an offset, of which none leaves mamba, attention, attention."""
    config = tf.JambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        use_mamba_kernels=False,
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"block 3 would become a different layer 2.* each of the blocks \[0, 3\]"):
        remove_blocks(model, [2])
    assert remove_blocks(model, [0]).config.attn_layer_offset == 0


@pytest.mark.parametrize("removed", [(4,), (-1,), (1, 1), (0, 1, 2, 3)])
def test_unusable_indices_are_refused(removed: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"blocks"):
        remove_blocks(tiny_model("llama"), removed)


def test_shards_are_rewritten_and_files_taken_along(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    (folder / "LICENSE").write_text("free")
    prune_checkpoint(folder, [1, 2], tmp_path / "short", details={"note": "why"}, progress=False)
    written = sorted((tmp_path / "short").glob("*.safetensors"))
    index = json.loads((tmp_path / "short" / "model.safetensors.index.json").read_text())
    tensors = {path.name: load_file(path) for path in written}
    assert {name: file for file, entries in tensors.items() for name in entries} == index["weight_map"]
    assert index["metadata"]["total_size"] == checkpoint_bytes(folder, [1, 2])
    assert index["metadata"]["total_size"] == sum(t.nbytes for entries in tensors.values() for t in entries.values())
    assert (tmp_path / "short" / "LICENSE").read_text() == "free"
    note = json.loads((tmp_path / "short" / "blockspin.json").read_text())
    assert (note["removed"], note["kept"], note["note"]) == ([1, 2], [0, 3], "why")
    whole, short = (tf.AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "short"))
    torch.testing.assert_close(short.state_dict(), remove_blocks(whole, [1, 2]).state_dict(), rtol=0, atol=0)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "short")("a few")["input_ids"]


def test_names_without_the_leading_part_are_understood(tmp_path: Path) -> None:
    """Old GPT-2 checkpoints say "h.0.attn..." where the model says "transformer.h.0.attn..."."""
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path / "old")
    tensors = {name.removeprefix("transformer."): t for name, t in model.transformer.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "old" / "model.safetensors")
    prune_checkpoint(tmp_path / "old", [0], tmp_path / "short", progress=False)
    short = load_file(tmp_path / "short" / "model.safetensors")
    assert torch.equal(short["h.0.mlp.c_fc.weight"], model.transformer.h[1].mlp.c_fc.weight)
    assert "h.3.mlp.c_fc.weight" not in short


def test_bytes_are_copied_whatever_the_dtype(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "model.safetensors"
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(path).items()}, path)
    prune_checkpoint(folder, [0], tmp_path / "short", progress=False)
    before, after = load_file(path), load_file(tmp_path / "short" / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(after[name.format(0)].view(torch.uint8), before[name.format(1)].view(torch.uint8))


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blockspin.surgery.checkpoint.write_shards", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left"):
        prune_checkpoint(folder, [0], tmp_path / "short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_bad_sources_and_targets_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        prune_checkpoint(folder, [0], folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="truncated"):
        prune_checkpoint(folder, [0], tmp_path / "short")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors or \.bin weights"):
        prune_checkpoint(folder, [0], tmp_path / "short")


@pytest.mark.parametrize(
    ("family", "removed", "noted"), [("gemma2", [3], False), ("gemma2", [0], True), ("llama", [0], False)]
)
def test_a_new_order_of_sliding_windows_is_said(
    family: str, removed: list[int], noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", removed, tmp_path / "short")
    assert ("loading_elsewhere" in capsys.readouterr().err) == noted


def test_killed_at_any_moment_it_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    """Kill the process at its first, second, ... change to the file system; then the same call succeeds."""
    folder, target = save_tiny(tmp_path / "model", max_shard_size="80KB"), tmp_path / "short"
    changes = ("os.mkdir", "os.rename", "shutil.copyfile", "os.truncate")

    def prune(kill_at: int) -> None:
        seen = itertools.count(1)

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            writes = (
                event == "open" and str(arguments[0]).startswith(str(tmp_path)) and set(str(arguments[1])) & set("wa")
            )
            if (writes or event in changes) and next(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        prune_checkpoint(folder, [1], target, progress=False)

    for moment in itertools.count(1, 3):
        process = multiprocessing.get_context("fork").Process(target=prune, args=(moment,))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not target.exists()
    assert moment > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "short"]
    tf.AutoModelForCausalLM.from_pretrained(target)


# The settings of a quantisation method that name layers, as they are in the files of its own tools.
QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {
        "tensors": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
        "config": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "lists": ("modules_to_not_convert",),
    },
    "compressed-tensors": {
        "tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
        "config": {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        "lists": ("ignore",),
    },
    "gptq": {
        "tensors": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        "config": {"bits": 4, "group_size": 128},
        "lists": ("modules_in_block_to_quantize", "dynamic"),
    },
    "awq": {
        "tensors": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "config": {"bits": 4, "group_size": 128, "version": "gemm"},
        "lists": ("modules_to_not_convert",),
    },
    "bitsandbytes": {
        "tensors": {
            "weight": torch.uint8,
            "weight.absmax": torch.uint8,
            "weight.quant_map": torch.float32,
            "weight.quant_state.bitsandbytes__nf4": torch.uint8,
        },
        "config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "lists": ("llm_int8_skip_modules",),
    },
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints(method: str, tmp_path: Path) -> None:
    """Every tensor of a kept layer keeps its bytes, and the settings that name a layer follow it."""
    folder, form = save_tiny(tmp_path / "model"), QUANTISED[method]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "_proj.weight" in name]:
        del tensors[name]
        for part, dtype in form["tensors"].items():
            raw = torch.randint(256, (6, 8 * dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[name.replace("weight", part)] = raw.view(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.3.self_attn"]
    lists = {key: {name: {"bits": 8} for name in names} if key == "dynamic" else names for key in form["lists"]}
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": method, **form["config"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation | lists}))

    prune_checkpoint(folder, [1], tmp_path / "short", progress=False)
    short, new = load_file(tmp_path / "short" / "model.safetensors"), {0: 0, 2: 1, 3: 2}
    expected = {}
    for name, tensor in tensors.items():
        layer = re.search(r"layers\.(\d)\.", name)
        if layer is None or int(layer[1]) in new:
            expected[name if layer is None else name.replace(layer[0], f"layers.{new[int(layer[1])]}.")] = tensor
    assert short.keys() == expected.keys()
    assert all(
        torch.equal(short[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items()
    )
    left = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn"]
    new_lists = {key: {name: {"bits": 8} for name in left} if key == "dynamic" else left for key in form["lists"]}
    written = json.loads((tmp_path / "short" / "config.json").read_text())
    assert written["quantization_config"] == quantisation | new_lists
