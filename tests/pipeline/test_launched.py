"""Runs of several processes, started by a launcher: the same files as from one process, and an end when one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launched import failing_at, launch, without_times
from safetensors.torch import load_file


def command(model: Path, text: Path, out: Path, *options: str) -> list[str]:
    sizes = ["--energy-samples", "8", "--selection-samples", "8", "--evaluation-samples", "8", "--max-length", "32"]
    what = ["compress", str(model), "--calibration", str(text), "--remove", "2", "--out", str(out)]
    return [*what, *sizes, "--batch-size", "2", "--budget", "16", *options]


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
    script = [
        str(failing_at(tmp_path, "energies.removals", "_covariances", after=2)),
        *command(tiny_folder, text_file, cut),
    ]
    ended = launch(2, [*script, "--energy", "secant"], tmp_path)
    assert ended.returncode != 0
    journal = (cut / "energies.partial.jsonl").read_text().splitlines()
    assert len(journal) == 3  # the identity, and the batches of the first round
    for processes in (3,):
        again = ["-m", "blockspin", *command(tiny_folder, text_file, cut, "--energy", "secant")]
        assert launch(processes, again, tmp_path).returncode == 0
        assert_same_run(cut, tmp_path / "whole")


@pytest.mark.slow
def test_all_processes_end_with_the_message_of_the_one_that_fails(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    script = [
        str(failing_at(tmp_path, "energies.removals", "_covariances", after=1)),
        *command(tiny_folder, text_file, tmp_path / "run"),
    ]
    ended = launch(2, [*script, "--energy", "secant"], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: a fault of the second process") == 1
    assert not (tmp_path / ".run.lock").exists()

    # Mistakes of the user, found before there is anything to share.
    wrong = [*command(tiny_folder, tmp_path / "missing.jsonl", tmp_path / "other")]
    ended = launch(2, ["-m", "blockspin", *wrong], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: cannot read the data") == 1


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
