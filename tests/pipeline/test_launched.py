"""Runs of several processes, started by a launcher: the same files as from one process, and an end when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
TIMES = ("seconds", "tokens_per_second")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as launchers have it: sums do not depend on threads then


def command(model: Path, text: Path, out: Path, *options: str) -> list[str]:
    sizes = ["--energy-samples", "8", "--selection-samples", "8", "--evaluation-samples", "8", "--max-length", "32"]
    what = ["compress", str(model), "--calibration", str(text), "--remove", "2", "--out", str(out)]
    return [*what, *sizes, "--batch-size", "2", "--budget", "16", *options]


def launch(processes: int, script: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *LAUNCHER, str(processes)] if processes > 1 else [sys.executable]
    return subprocess.run([*start, *script], env=ONE_THREAD, capture_output=True, text=True, timeout=240, cwd=folder)


def without_times(value: Any) -> Any:
    """A JSON value without what depends on the machine."""
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if name not in TIMES}
    return list(map(without_times, value)) if isinstance(value, list) else value


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "energies.safetensors").read_bytes() == (expected / "energies.safetensors").read_bytes()
    for name in ("spectrum.json", "candidates.json", "evaluation.json"):
        stored = [without_times(json.loads((folder / name).read_text())) for folder in (found, expected)]
        assert stored[0] == stored[1], name
    for name in ("checkpoint", "repaired"):
        weights = [load_file(folder / name / "model.safetensors") for folder in (found, expected)]
        assert weights[0].keys() == weights[1].keys()
        for tensor, values in weights[1].items():
            assert (weights[0][tensor] == values).all()
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launched_runs_leave_the_files_of_a_run_alone(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        ended = launch(processes, ["-m", "blockspin", *command(tiny_folder, text_file, out)], tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("perplexity") == 1  # one process prints the tables
        assert_same_run(out, tmp_path / "1")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_numbers_of_processes_continue_a_run(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Cut off after a part of the energies, as a process that is killed leaves the folder."""
    plain = ["-m", "blockspin", *command(tiny_folder, text_file, tmp_path / "whole", "--energy", "secant")]
    assert launch(1, plain, tmp_path).returncode == 0

    cut = tmp_path / "cut"
    script = [str(failing_at(tmp_path, "_covariances", after=2)), *command(tiny_folder, text_file, cut)]
    ended = launch(2, [*script, "--energy", "secant"], tmp_path)
    assert ended.returncode != 0
    journal = (cut / "energies.partial.jsonl").read_text().splitlines()
    assert len(journal) == 3  # the identity, and the batches of the first round
    for processes in (3,):
        again = ["-m", "blockspin", *command(tiny_folder, text_file, cut, "--energy", "secant")]
        assert launch(processes, again, tmp_path).returncode == 0
        assert_same_run(cut, tmp_path / "whole")


def failing_at(folder: Path, name: str, after: int) -> Path:
    """A script that runs blockspin, but for the second process, in which a function of the energies fails."""
    script = folder / "failing.py"
    script.write_text(
        f"""
import os
from blockspin.cli import main
from blockspin.energies import removals

whole, calls = removals.{name}, []

def failing(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) >= {after}:
        raise ValueError("a fault of the second process")
    return whole(*arguments)

removals.{name} = failing
main()
"""
    )
    return script


@pytest.mark.slow
def test_all_processes_end_with_the_message_of_the_one_that_fails(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    script = [str(failing_at(tmp_path, "_covariances", after=1)), *command(tiny_folder, text_file, tmp_path / "run")]
    ended = launch(2, [*script, "--energy", "secant"], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: a fault of the second process") == 1
    assert not (tmp_path / ".run.lock").exists()

    # Mistakes of the user, found before there is anything to share.
    wrong = [*command(tiny_folder, tmp_path / "missing.jsonl", tmp_path / "other")]
    ended = launch(2, ["-m", "blockspin", *wrong], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: cannot read the calibration set") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launched_comparisons_choose_as_one_alone(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    rows = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        plain = command(tiny_folder, text_file, out, "--energy", "secant", "--no-repair")
        ended = launch(processes, ["-m", "blockspin", "compare", *plain[1:]], tmp_path)
        assert ended.returncode == 0, ended.stderr
        stored = json.loads((out / "comparison.json").read_text())
        rows.append([without_times({**row, "passes": None}) for row in stored["rows"]])
    assert rows[0] == rows[1]
