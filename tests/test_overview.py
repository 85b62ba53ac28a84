"""What `blockspin info` says of a model, against the model itself and what is left of it after removals."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import Command
from tiny import tiny_config, tiny_random_model

from blockspin.overview import overview
from blockspin.surgery.memory import remove_blocks


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h", "gemma3n_text", "deepseek_v3"])
def test_numbers_are_those_of_the_model(tmp_path: Path, model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    model.save_pretrained(tmp_path / "model")
    found = overview(tmp_path / "model")
    assert found.num_parameters == model.num_parameters()
    assert found.num_bytes == sum(p.numel() * p.element_size() for p in model.parameters())

    # The cache of the model itself, after one and after two tokens.
    held = []
    for length in (1, 2):
        cache = model(input_ids=torch.full((1, length), 3), use_cache=True).past_key_values
        held.append([sum(t.nbytes for t in vars(layer).values() if torch.is_tensor(t)) for layer in cache.layers])
    growth = [after - before for before, after in zip(*held, strict=True)]
    assert found.cache_bytes is not None
    assert list(found.cache_bytes[: len(growth)]) == growth
    assert not any(found.cache_bytes[len(growth) :])


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h"])
def test_savings_are_those_of_real_removals(tmp_path: Path, model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    model.save_pretrained(tmp_path / "model")
    whole, found = model.num_parameters(), overview(tmp_path / "model")
    can_go = [index for index, removable in enumerate(found.removable) if removable]
    for row in found.savings_table().rows[:2]:
        removals = combinations(can_go, int(row[0]))
        left = [remove_blocks(model, removed).num_parameters() / whole for removed in removals]
        said = dict.fromkeys([f"{min(left):.0%}", f"{max(left):.0%}"])
        assert row[1] == " to ".join(said)


def test_blocks_that_cannot_go_alone_are_told(tmp_path: Path) -> None:
    model = tiny_random_model(tiny_config("gemma3n_text"))
    model.save_pretrained(tmp_path / "model")
    for index, removable in enumerate(overview(tmp_path / "model").removable):
        if removable:
            remove_blocks(model, [index])
        else:
            with pytest.raises(ValueError, match="block"):
                remove_blocks(model, [index])


def test_the_command_prints_tables_or_json(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    code, printed = command("info", tiny_folder)
    assert code == 0
    assert "attention+mlp" in printed
    assert "0-3" in printed

    code, printed = command("info", tiny_folder, "--json")
    assert code == 0
    assert len(json.loads(printed[printed.index("{") :])["blocks"]) == 4

    code, printed = command("info", tmp_path / "absent")
    assert (code, "absent" in printed) == (2, True)
