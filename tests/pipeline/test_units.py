"""Sub-layers through the whole method, in one run and command by command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import Command, settings, tiny_model

import blockspin as bs
from blockspin.config import CompressConfig
from blockspin.model.losses import mean_loss
from blockspin.pipeline.compress import compress
from blockspin.problem import RemovalProblem
from blockspin.selection.result import Selection
from blockspin.surgery.feasible import Removable


def test_a_run_removes_sublayers(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = compress(settings(tiny_folder, text_file, units="sublayers", remove=3), out)
    chosen = Selection.load(out / "candidates.json").chosen
    assert len(chosen.removed) == 3
    whole = tf.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded = tf.AutoModelForCausalLM.from_pretrained(out / "checkpoint", trust_remote_code=True, dtype=torch.float32)
    expected = bs.remove_blocks(whole, chosen.removed, units="sublayers")
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict())

    # Its losses are those of the model that is left, before and after the repair.
    by_name = {row.name.split(" ")[0]: row for row in rows}
    assert list(by_name) == ["original", "CBO:0", "chosen", "random", "repaired"]
    assert by_name["chosen"].num_parameters == loaded.num_parameters()
    assert by_name["chosen"].num_bytes < by_name["original"].num_bytes
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    drawn = bs.load_calibration(text_file, tokenizer, num_samples=40, max_length=32, progress=False)
    assert by_name["chosen"].loss == pytest.approx(mean_loss(loaded, drawn[32:]), rel=1e-5)
    repaired = tf.AutoModelForCausalLM.from_pretrained(out / "repaired", trust_remote_code=True, dtype=torch.float32)
    assert by_name["repaired"].loss == pytest.approx(mean_loss(repaired, drawn[32:]), rel=1e-5)
    page = (out / "report.html").read_text()
    assert "Which sub-layers are gone" in page
    for i in chosen.removed:  # each block of a Llama has its attention first
        assert f"{('attention', 'mlp')[i % 2]} of block {i // 2}" in page
    assert "blocks" not in [cell.lower() for cell in re.findall(r"<th[^>]*>([^<]*)<", page)]


def test_each_stage_has_its_command(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    energies, common = tmp_path / "energies.safetensors", ("--max-length", 32)
    data = ("--calibration", text_file, "--energy", "secant", "--energy-samples", 6)
    assert command("energies", tiny_folder, *data, "--units", "sublayers", *common, "--out", energies)[0] == 0
    assert bs.load_energies(energies).hessian.shape == (8, 8)
    code, printed = command(
        *("select", tiny_folder, "--energies", energies, "--remove", "attention=2", "--data", text_file),
        *("--num-samples", 8, "--budget", 4, *common, "--out", tmp_path / "chosen.json"),
    )
    assert code == 0, printed
    chosen = next(line for line in printed.splitlines() if re.fullmatch(r"\d[\d,-]*", line))
    short = tmp_path / "short"
    assert command("prune", tiny_folder, "--units", "sublayers", "--blocks", chosen, "--out", short)[0] == 0
    assert len(json.loads((short / "blockspin.json").read_text())["sublayers"]) == 2
    code, printed = command("evaluate", tiny_folder, short, "--data", text_file, *common, "--trust-remote-code")
    assert code == 0, printed
    assert "perplexity" in printed


def test_energies_are_made_for_a_target_and_say_so(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    energies = tmp_path / "energies.safetensors"
    code, printed = command(
        *("energies", tiny_folder, "--calibration", text_file, "--energy-samples", 4, "--max-length", 16),
        *("--units", "sublayers", "--target-params", "80%", "--out", energies),
    )
    assert code == 0, printed
    found = bs.load_energies(energies)
    assert found.metadata["goal"] == "--target-params 80%"

    code, printed = command("solve", energies, "--target-params", "80%")
    assert (code, "are fitted to removals for" in printed) == (0, False), printed
    code, printed = command("solve", energies, "--target-params", "70%")
    assert code == 0, printed
    assert "are fitted to removals for --target-params 80% and say less of others" in " ".join(printed.split())
    code, printed = command("solve", energies, "--sweep", "params", "--points", 3)
    assert (code, printed.count("are fitted to removals for")) == (0, 1), printed


def test_bad_goals_are_refused_before_anything_is_measured(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    run = ("compress", tiny_folder, "--calibration", text_file, "--out", tmp_path / "run")
    for goal, complaint in (("moe=1", "no block is of kind"), ("8", "fewer than the 8"), ("attention=5", "1 to 4")):
        code, printed = command(*run, "--units", "sublayers", "--remove", goal)
        assert (code, complaint in printed) == (2, True), printed
    code, printed = command(*run, "--units", "heads", "--remove", 1)
    assert code == 2
    assert "sublayers" in printed
    assert not (tmp_path / "run" / "energies.safetensors").exists()


def test_what_leaves_no_attention_is_never_chosen() -> None:

    model = tiny_model("llama")
    removable = Removable(model.config, bs.find_units(model, "sublayers"))
    assert not removable((0, 2, 4, 6))
    assert removable((0, 2, 4))
    assert removable((0, 1, 5))


def test_a_problem_says_its_units() -> None:

    model = tiny_model("llama")
    assert RemovalProblem(np.eye(4), 1, blocks=bs.find_blocks(model)).units == "blocks"
    assert RemovalProblem(np.eye(8), 1, blocks=bs.find_units(model, "sublayers")).units == "sublayers"
    assert CompressConfig("model", "text", remove=1).units == "blocks"
