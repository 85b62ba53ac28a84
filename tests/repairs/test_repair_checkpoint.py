"""The repair from checkpoint to checkpoint: the same as in memory, ordinary, proven, and refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import Command, random_samples, save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from blockspin.model.own_text import own_text
from blockspin.repairs.checkpoint import repair_checkpoint
from blockspin.repairs.run import repair
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples(tuple(24 - i % 5 for i in range(64)))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A saved model and a checkpoint without its block 2, in several files."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    (tmp_path / "whole" / "notes.txt").write_text("taken along")
    prune_checkpoint(tmp_path / "whole", [2], tmp_path / "short", progress=False)
    return tmp_path / "whole", tmp_path / "short"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_on_disk_as_in_memory(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, short = folders
    report = repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", own_text_share=0, progress=False)

    original = tf.AutoModelForCausalLM.from_pretrained(whole)
    in_memory = remove_blocks(original, [2])
    assert repair(in_memory, original, SAMPLES) == report
    loaded, loading = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, parameter in in_memory.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name

    # Out-projections of kept steps are new; every other byte and file is the source's.
    old, new = tensors_of(short), tensors_of(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    kept = [0, 1, 3]
    steps = [step for step in report.steps if step.kept]
    assert changed == {f"model.layers.{kept.index(step.block)}.{step.projection}.weight" for step in steps}
    assert {file.name for file in short.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "notes.txt").read_text() == "taken along"
    about = json.loads((tmp_path / "out" / "blockspin.json").read_text())
    assert about["removed"] == [2]
    assert about["repair"]["kl_after"] == report.kl_after
    assert not (tmp_path / "out-repair").exists()


def test_the_dtype_stays(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folders[0]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    prune_checkpoint(tmp_path / "half", [0], tmp_path / "shorter", progress=False)
    repair_checkpoint(tmp_path / "shorter", tmp_path / "half", SAMPLES, tmp_path / "out", progress=False)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_bad_input_is_refused_and_nothing_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, short = folders
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no readable blockspin.json"):
        repair_checkpoint(whole, whole, SAMPLES, out, progress=False)
    other = save_tiny(tmp_path / "other", vocabulary=64)
    with pytest.raises(ValueError, match=r"block 0 of the shortened model has other weights"):
        repair_checkpoint(short, other, SAMPLES, out, progress=False)
    with pytest.raises(ValueError, match=r"needs at least 96"):
        repair_checkpoint(short, whole, SAMPLES[:3], out, progress=False)
    assert not out.exists()
    assert not (tmp_path / "out-repair").exists()

    repair_checkpoint(short, whole, SAMPLES, out, progress=False)
    with pytest.raises(ValueError, match=r"out exists already"):
        repair_checkpoint(short, whole, SAMPLES, out, progress=False)
    with pytest.raises(ValueError, match=r"was repaired already"):
        repair_checkpoint(out, whole, SAMPLES, tmp_path / "again", progress=False)

    trained = shutil.copytree(short, tmp_path / "trained")
    about = json.loads((trained / "blockspin.json").read_text())
    (trained / "blockspin.json").write_text(json.dumps(about | {"distillation": {}}))
    with pytest.raises(ValueError, match=r"was trained already"):
        repair_checkpoint(trained, whole, SAMPLES, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()


def test_text_of_the_original_is_added(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, short = folders
    report = repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", own_text_share=0.5, progress=False)
    about = json.loads((tmp_path / "out" / "blockspin.json").read_text())["repair"]
    given = sum(map(len, SAMPLES))
    assert given <= about["own_tokens"] < 2 * given
    assert report.tokens == pytest.approx(15 / 16 * (given + about["own_tokens"]), rel=0.02)  # the rest is held out

    original = tf.AutoModelForCausalLM.from_pretrained(whole)
    in_memory = remove_blocks(original, [2])
    written = own_text(original, given, max(map(len, SAMPLES)))
    assert repair(in_memory, original, [*SAMPLES, *written]) == report


def test_weights_that_are_not_finite_leave_nothing_behind(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, short = folders
    file = next(file for file in short.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight of the shortened model are not finite"):
        repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-repair").exists()


def test_the_command(command: Command, text_file: Path, tmp_path: Path) -> None:
    whole, out = save_tiny(tmp_path / "whole"), tmp_path / "out"
    assert command("prune", whole, "--blocks", "1", "--out", tmp_path / "short")[0] == 0
    arguments = ("--original", whole, "--data", text_file, "--max-length", 32)
    assert command("repair", tmp_path / "short", *arguments, "--out", out)[0] == 0
    assert json.loads((out / "blockspin.json").read_text())["repair"]["original"] == str(whole)

    code, printed = command("repair", tmp_path / "short", *arguments, "--num-samples", 2, "--out", tmp_path / "other")
    assert code == 2
    assert "needs at least 96" in printed
    assert not (tmp_path / "other").exists()
