"""Single stages run by two processes: `select` and `evaluate` leave the files of one, and both end when one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launched import failing_at, launch, without_times
from offline_tasks import write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockspin.data.calibration import load_calibration
from blockspin.energies import estimate_energies
from blockspin.surgery.checkpoint import prune_checkpoint

SIZES = ("--num-samples", "8", "--max-length", "32", "--batch-size", "2")


def saved_energies(model: Path, text: Path, path: Path) -> Path:
    """Energies of a saved model, to select with."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = load_calibration(str(text), tokenizer, num_samples=4, max_length=32)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    estimate_energies("secant", loaded, samples, progress=False).save(path)
    return path


def selecting(model: Path, text: Path, folder: Path, out: Path) -> list[str]:
    energies = saved_energies(model, text, folder / "energies.safetensors")
    what = ["select", str(model), "--energies", str(energies), "--remove", "2", "--data", str(text)]
    return [*what, *SIZES, "--budget", "12", "--out", str(out)]


def evaluating(models: list[Path], text: Path, out: Path) -> list[str]:
    what = ["evaluate", *map(str, models), "--data", str(text), "--text", str(text), "--window", "32"]
    return [*what, *SIZES, "--out", str(out)]


def assert_same_files(command: list[str], name: str, folder: Path) -> None:
    """A command, run in a folder of each number of processes, leaves the same JSON file and the same names."""
    stored, names = [], []
    for processes in (1, 2):
        place = folder / str(processes)
        place.mkdir()
        ended = launch(processes, ["-m", "blockspin", *command], place)
        assert ended.returncode == 0, ended.stderr
        stored.append(without_times(json.loads((place / name).read_text())))
        names.append({path.name for path in place.iterdir()})
    assert stored[0] == stored[1]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_select_what_one_selects(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    command = selecting(tiny_folder, text_file, tmp_path, Path("candidates.json"))
    assert_same_files(command, "candidates.json", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_evaluate_as_one(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    prune_checkpoint(tiny_folder, (1, 2), shorter)
    command = evaluating([tiny_folder, shorter], text_file, Path("result.json"))
    assert_same_files(command, "result.json", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_score_tasks_as_one(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """Two tasks, of which each process takes one."""
    tasks = write_tasks(tmp_path / "tasks", data_folder)
    command = ["evaluate", str(tiny_folder), "--tasks", "arc_challenge,winogrande", "--limit", "3"]
    command += ["--include-path", str(tasks), "--cache", "none", "--out", "result.json"]
    assert_same_files(command, "result.json", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "module"), [("select", "model.quality"), ("evaluate", "model.losses")])
def test_a_stage_ends_with_the_message_of_the_process_that_fails(
    stage: str, module: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """None waits for the one that failed, none writes the file of a whole run."""
    out = tmp_path / "result.json"
    if stage == "select":
        function, command = "compared", selecting(tiny_folder, text_file, tmp_path, out)
    else:
        function, command = "sample_losses", evaluating([tiny_folder], text_file, out)

    ended = launch(2, [str(failing_at(tmp_path, module, function, after=2)), *command], tmp_path)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: a fault of the second process") == 1, ended.stderr
    assert not out.exists()
    assert not (tmp_path / ".result.json.lock").exists()
