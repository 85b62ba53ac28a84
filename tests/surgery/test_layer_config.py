"""Settings that only look as if they were by layer stay; patterns for modules mean the same modules afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from conftest import save_tiny, tiny_model
from tiny import DEPTH, tiny_config, tiny_random_model
from torch import nn

from blockspin.model.blocks import find_stack
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks
from blockspin.surgery.patterns import module_settings
from blockspin.surgery.renaming import Renaming

LABELS = {str(i): f"label {i}" for i in range(4)}  # as many as the tiny model has layers


def test_lists_that_happen_to_be_as_long_as_the_depth_stay(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())
    assert written["num_hidden_layers"] == len(LABELS)
    others = {
        "id2label": LABELS,
        "label2id": {name: int(i) for i, name in LABELS.items()},
        "languages": ["en", "de", "fr", "it"],
        "task_specific_params": {"scores": [1, 2, 3, 4]},
        "kv_cache_scale_by_layer": [1.0, 2.0, 3.0, 4.0],
    }
    (folder / "config.json").write_text(json.dumps(written | others))
    prune_checkpoint(folder, [1], tmp_path / "short", progress=False)
    expected = written | others | {"num_hidden_layers": 3, "kv_cache_scale_by_layer": [1.0, 3.0, 4.0]}
    assert json.loads((tmp_path / "short" / "config.json").read_text()) == expected
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert remove_blocks(loaded, [1]).config.id2label == loaded.config.id2label


def test_scales_of_rotations_that_are_as_many_as_the_layers_stay(tmp_path: Path) -> None:
    """Phi-3 has one for every pair of rotated dimensions: here 4, and 4 layers."""
    config = tiny_model("phi3").config
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    model = tiny_random_model(tf.Phi3Config(**{**config.to_diff_dict(), "rope_parameters": rope}))
    model.save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", [2], tmp_path / "short", progress=False)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert loaded.config.num_hidden_layers == 3
    assert loaded.config.rope_parameters == model.config.rope_parameters


def looked_up(dynamic: dict[str, Any], name: str) -> Any:
    """What GPTQModel's table says of a module: the first pattern that matches; "-:" leaves the module unquantised."""
    for pattern, entry in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return entry
    return None


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])  # mixtral: experts have numbers too
@pytest.mark.parametrize("removed", [(0,), (1, 4), (3,), (5,)])
def test_tables_of_patterns_mean_the_same_modules(model_type: str, removed: tuple[int, ...]) -> None:
    model = tiny_random_model(tiny_config(model_type))
    if model_type == "mixtral":  # transformers fuses the experts; the checkpoints that GPTQModel writes do not
        for layer in model.model.layers:
            layer.mlp.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(2, 2)}) for _ in range(DEPTH))
    dynamic = {
        r"-:.*\.2\..*": {},
        r"+:.*\.3\..*": {"bits": 8},
        r"+:model\.layers\.(?:4|5)\.self_attn\..*": {"bits": 4},
        r".*\.[01]\.self_attn\.q_proj": {"bits": 3},
        r"+:.*_proj$": {"bits": 2},
        r"-:lm_head": {},
    }
    kept = [i for i in range(DEPTH) if i not in removed]
    renaming = Renaming(kept, DEPTH)
    new = module_settings(model, renaming).rewritten({"dynamic": dynamic})["dynamic"]
    modules = [name for name, _ in model.named_modules() if name]
    stack_name = find_stack(model).name
    compared = 0
    for old_name in modules:
        new_name = renaming.name(old_name, stack_name)
        if new_name is not None:
            assert looked_up(new, new_name) == looked_up(dynamic, old_name), (old_name, new_name, new)
            compared += 1
    assert compared > 30


def test_short_patterns_stay_short() -> None:
    model = tiny_random_model(tiny_config("llama"))
    settings = module_settings(model, Renaming([0, 2, 3, 4, 5], DEPTH))
    assert settings.rewritten([r"+:.*\.3\..*", "lm_head"]) == [r"+:.*\.2\..*", "lm_head"]
    assert settings.rewritten([r"re:.*\.1\..*"]) == []
