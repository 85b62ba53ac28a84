"""Checkpoints as they are published: old forms, quantised, in several files, with layers besides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_random_model

from blockspin.model.tracing import skipped, trace_model
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks


def test_written_configurations_keep_their_form(tmp_path: Path) -> None:
    """An old Nemotron-H folder says hybrid_override_pattern; so does the shortened one, with nothing else changed."""
    model = tiny_random_model(tiny_config("nemotron_h"))
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    written = json.loads(path.read_text())
    del written["layers_block_type"]
    written |= {"hybrid_override_pattern": "ME*ME-", "num_hidden_layers": 6, "auto_map": {"AutoConfig": "own.Config"}}
    path.write_text(json.dumps(written))
    prune_checkpoint(tmp_path / "whole", [1, 3], tmp_path / "short", progress=False)
    expected = written | {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4}
    assert json.loads((tmp_path / "short" / "config.json").read_text()) == expected


def test_a_quantised_nemotron_h_checkpoint(tmp_path: Path) -> None:
    """FP8 weights with scales beside them, and a list of what is not quantised, by layer."""
    model = tiny_random_model(tiny_config("nemotron_h"))
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    tensors = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        quantised = "mixer" in name and tensor.ndim == 2
        tensors[name] = tensor.to(torch.float8_e4m3fn) if quantised else tensor
        if quantised:
            tensors[name.replace(".weight", ".weight_scale")] = torch.tensor(float(name.split("layers.")[1][0]))
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    left_out = {"exclude_modules": ["lm_head", "backbone.layers.0.mixer.conv1d", "backbone.layers.3.mixer.conv1d"]}
    (whole / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8", **left_out}})
    )
    (whole / "hf_quant_config.json").write_text(json.dumps({"quantization": left_out}))
    (whole / "code").mkdir()
    (whole / "code" / "own.py").write_text("pass")
    prune_checkpoint(whole, [1, 4], tmp_path / "short", progress=False)
    short = load_file(tmp_path / "short" / "model.safetensors")
    scales = {name: float(value) for name, value in short.items() if name.endswith("in_proj.weight_scale")}
    prefix = next(name for name in tensors if "layers.0" in name).split("layers.0")[0]
    assert scales == {
        f"{prefix}layers.0.mixer.in_proj.weight_scale": 0,
        f"{prefix}layers.2.mixer.in_proj.weight_scale": 3,
    }
    expected = {"exclude_modules": ["lm_head", "backbone.layers.0.mixer.conv1d", "backbone.layers.2.mixer.conv1d"]}
    written = json.loads((tmp_path / "short" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "fp8", **expected}
    assert json.loads((tmp_path / "short" / "hf_quant_config.json").read_text()) == {"quantization": expected}
    assert (tmp_path / "short" / "code" / "own.py").read_text() == "pass"


def test_pytorch_weights_are_converted(tmp_path: Path) -> None:
    model = tiny_random_model(tiny_config("llama"))
    model.config.save_pretrained(tmp_path / "whole")
    tensors = model.state_dict()
    halves = list(tensors)[::2], list(tensors)[1::2]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(halves, 1):
        path = tmp_path / "whole" / f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, path)
        weight_map |= dict.fromkeys(names, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "whole" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    prune_checkpoint(tmp_path / "whole", [0, 3], tmp_path / "short", progress=False)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    torch.testing.assert_close(loaded.state_dict(), remove_blocks(model, [0, 3]).state_dict(), rtol=0, atol=0)
    assert not list((tmp_path / "short").glob("*.bin"))


def test_layers_for_multi_token_prediction_stay_behind_the_last(tmp_path: Path) -> None:
    model = tiny_random_model(tiny_config("deepseek_v3"))
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    extra = {"model.layers.6.eh_proj.weight": torch.ones(2, 2)}
    save_file(tensors | extra, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "whole", [0, 4], tmp_path / "short", progress=False)
    short = load_file(tmp_path / "short" / "model.safetensors")
    assert torch.equal(short["model.layers.4.eh_proj.weight"], torch.ones(2, 2))
    assert json.loads((tmp_path / "short" / "config.json").read_text())["first_k_dense_replace"] == 0


def test_the_rest_of_a_model_whose_layers_attend_to_images_is_shortened(tmp_path: Path) -> None:
    """Mllama's layers of this kind rest on text; a folder as published holds the image encoder too."""
    model = tf.MllamaForConditionalGeneration(tiny_config("mllama")).eval()
    model.save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", [0, 5], tmp_path / "short", progress=False)
    loaded, report = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "short", output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.text_config.cross_attention_layers == [2]
    assert loaded.state_dict().keys() == remove_blocks(model, [0, 5]).state_dict().keys()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad(), skipped(trace_model(model), [0, 5]):
        expected = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match=r"the blocks \[3\] of Mllama\w+ attend to images"):
        prune_checkpoint(tmp_path / "whole", [3], tmp_path / "other", progress=False)
