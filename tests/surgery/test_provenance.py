"""What blockspin.json tells after one, two and three removals, against the weights of the blocks themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file
from tiny import tiny_config, tiny_random_model

from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks
from blockspin.surgery.provenance import kept_blocks_of

UP = "model.layers.{}.mlp.up_proj.weight"


def pruned(source: Path, removed: list[int], target: Path) -> dict[str, Any]:
    prune_checkpoint(source, removed, target, details={"why": f"{removed}"}, progress=False)
    record: dict[str, Any] = json.loads((target / "blockspin.json").read_text())
    return record


def blocks_from(source: Path, target: Path) -> list[int]:
    """Which blocks of the source those of the target are, by their weights."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    found: list[int] = []
    while UP.format(len(found)) in after:
        weights = after[UP.format(len(found))]
        found.append(next(i for i in range(100) if torch.equal(before[UP.format(i)], weights)))
    return found


def test_every_removal_since_the_original_is_told(tmp_path: Path) -> None:
    tiny_random_model(tiny_config("llama")).save_pretrained(tmp_path / "0")
    records = []
    for step, removed in enumerate([[1], [0, 3], [1]]):
        records.append(pruned(tmp_path / f"{step}", removed, tmp_path / f"{step + 1}"))

    for step, record in enumerate(records):
        folder = tmp_path / f"{step + 1}"
        assert record["kept"] == blocks_from(tmp_path / f"{step}", folder)
        assert record["original"]["source"] == str(tmp_path / "0")
        assert record["original"]["kept"] == blocks_from(tmp_path / "0", folder)
        assert sorted(record["original"]["kept"] + record["original"]["removed"]) == list(range(6))
        assert [entry["why"] for entry in record["earlier"]] == ["[1]", "[0, 3]", "[1]"][:step]
        for start, depth in enumerate([6, 5, 3][: step + 1]):
            assert kept_blocks_of(folder, depth) == blocks_from(tmp_path / f"{start}", folder)
        assert kept_blocks_of(folder, 7) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable"),
        ("[]", "no record"),
        ('{"kept": [0, 1]}', "which blocks were removed"),
        ('{"kept": [0, 1], "removed": ["2"]}', "which blocks were removed"),
        ('{"kept": [0, 1], "removed": [2]}', "belongs to another model"),
    ],
)
def test_records_that_are_not_the_models_are_refused(content: str, message: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "blockspin.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(folder, [1], tmp_path / "short", progress=False)
    assert not (tmp_path / "short").exists()


def test_a_record_of_a_training_alone_is_no_removal(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "blockspin.json").write_text('{"distillation": {"steps": 3}}')
    assert pruned(folder, [1], tmp_path / "short")["earlier"] == []


@pytest.mark.parametrize("block", [3.0, 3.7, "3", True, None, torch.tensor(3)])
def test_block_numbers_are_whole_numbers(block: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = tiny_random_model(tiny_config("llama"))
    with pytest.raises(ValueError, match="must be a whole number"):
        remove_blocks(model, [block])
    with pytest.raises(ValueError, match="must be a whole number"):
        prune_checkpoint(folder, [block], tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_numbers_of_numpy_are_whole_numbers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    prune_checkpoint(folder, np.array([1, 2]), tmp_path / "short", progress=False)
    assert json.loads((tmp_path / "short" / "blockspin.json").read_text())["removed"] == [1, 2]
