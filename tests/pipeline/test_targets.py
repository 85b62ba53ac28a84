"""Targets through the whole method: a speedup from a table of times, from the command to the page of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from conftest import Command

import blockspin as bs
from blockspin.costs.timing import Seconds, TimeTable
from blockspin.evaluation.cost import Workload
from blockspin.machine import describe_machine
from blockspin.problem import Units
from blockspin.selection.result import Selection

DECODE = {"attention+mlp": 0.2, "attention": 0.15, "mlp": 0.05}  # seconds that a unit takes, of 1 s


def write_table(path: Path, units: Units, about: dict[str, str]) -> None:
    kinds = ["attention+mlp"] if units == "blocks" else ["attention", "mlp"]
    times = {kind: Seconds(DECODE[kind] / 10, DECODE[kind]) for kind in kinds}
    workload = Workload(batch_size=1, length=8, new_tokens=4)
    TimeTable(Seconds(0.1, 1.0), times, units, workload, "float32", "cpu", about).save(path)


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
def test_a_run_for_a_speedup(
    units: Units, command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, table = tmp_path / "run", tmp_path / "table.json"
    write_table(table, units, describe_machine())
    code, printed = command(
        *("compress", tiny_folder, "--calibration", text_file, "--out", out, "--units", units),
        *("--target-speedup", 1.3, "--profile", table, "--max-length", 16, "--no-repair", "--budget", 8),
        *("--energy-samples", 4, "--selection-samples", 4, "--evaluation-samples", 4),
    )
    assert code == 0, printed

    # The choice takes 0.23 s or more away, by the table, and leaves a model that loads.
    removed = Selection.load(out / "candidates.json").chosen.removed
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    gone = sum(DECODE[bs.find_units(model, units)[i].kind] for i in removed)
    assert gone >= 1 - 1 / 1.3
    smaller = tf.AutoModelForCausalLM.from_pretrained(out / "checkpoint", trust_remote_code=units == "sublayers")
    assert smaller.num_parameters() == bs.remove_blocks(model, removed, units=units).num_parameters()

    # The energies are made for it: all that was measured meets it.
    energies: Any = bs.load_energies(out / "energies.safetensors")
    assert energies.metadata["goal"] == "--target-speedup 1.3"
    saved = energies.removed @ [DECODE[block.kind] for block in energies.blocks]
    assert (saved >= 1 - 1 / 1.3 - 1e-9).all()

    goals = json.loads((out / "goals.json").read_text())
    assert goals["times"]["predicted"]["decode"] == pytest.approx(1 / (1 - gone))
    measured = goals["times"]["measured"]["decode"]
    assert f"decode {measured:.2f}x as fast ({1 / (1 - gone):.2f}x predicted; " in (out / "report.html").read_text()


def test_times_of_another_machine_only_predict(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, table = tmp_path / "run", tmp_path / "table.json"
    write_table(table, "blocks", {})
    code, printed = command(
        *("compress", tiny_folder, "--calibration", text_file, "--out", out, "--energy", "secant", "--budget", 2),
        *("--target-speedup", 1.3, "--profile", table, "--max-length", 16, "--no-repair"),
        *("--energy-samples", 4, "--selection-samples", 4, "--evaluation-samples", 4),
    )
    assert code == 0, printed
    assert json.loads((out / "goals.json").read_text())["times"]["measured"] is None
    assert "not measured here: prefill 1.67x as fast, decode 1.67x as fast" in (out / "report.html").read_text()
