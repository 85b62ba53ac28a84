"""What commands print: tables or JSON, standard errors, no stray lines."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, random_samples, settings, tiny_model

from blockspin.comparison.report import cells
from blockspin.comparison.results import ORIGINAL, Row
from blockspin.evaluation.perplexity import Evaluation, evaluate_models, results_table
from blockspin.evaluation.scores import Score
from blockspin.model.quality import quality_of, shared_qualities
from blockspin.model.tracing import trace_model
from blockspin.scatter import standard_error
from blockspin.surgery.memory import remove_blocks

DATA = ("--max-length", 32)


def test_standard_errors_are_those_of_drawing_anew() -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 30, 400).astype(float)
    values = generator.normal(size=400) + 3 / np.sqrt(weights)

    draws = generator.integers(0, 400, (4000, 400))
    means = (weights[draws] * values[draws]).sum(1) / weights[draws].sum(1)
    assert standard_error(values, weights) == pytest.approx(means.std(), rel=0.05)
    assert standard_error([1.0], [1.0]) is None
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(400))

    # The ratio of two means is a mean of ratios, weighted by the second.
    ratio = values.mean() / weights.mean()
    of_ratio = (values - ratio * weights).std(ddof=1) / weights.mean() / np.sqrt(400)
    assert standard_error(values / weights, weights) == pytest.approx(of_ratio)


def test_losses_are_compared_sample_by_sample() -> None:
    whole, samples = tiny_model("llama"), random_samples((30, 8, 17, 25, 9))
    smaller = remove_blocks(whole, (1, 2))
    first, second = evaluate_models({"a": whole, "b": smaller}, [1, 1], samples, progress=False)
    apart = np.array(second.sample_losses) - first.sample_losses
    above, error = second.above(first)
    assert above == pytest.approx(np.average(apart, weights=[29, 7, 16, 24, 8]))
    assert first.above(first) == (0, 0)

    # The same through the passes that many removals share, and from two models.
    shared = shared_qualities(trace_model(whole), [(1, 2)], samples)[0]
    for quality in (shared, quality_of(smaller, whole, samples)):
        assert quality.loss == pytest.approx(second.loss, rel=1e-6)
        assert quality.above_error == pytest.approx(error, rel=1e-4)
    again = Evaluation.from_json(json.loads(json.dumps(second.as_json())))
    assert again == second


@pytest.fixture
def energies(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "energies.safetensors"
    made = ("energies", tiny_folder, "--calibration", text_file, "--energy-samples", 8, *DATA, "--out", path)
    assert command(*made)[0] == 0
    return path


def test_solve_as_json_and_cut(command: Command, energies: Path) -> None:
    code, printed = command("solve", energies, "--remove", 2, "--json")
    found = json.loads(printed[printed.index("{") :])
    assert (code, len(found["states"])) == (0, math.comb(4, 2))
    assert len(found["robustness"]["frequency"]) == 4

    for limit in (1, 4):
        code, printed = command("solve", energies, "--remove", 2, "--json", "--limit", limit)
        assert json.loads(printed[printed.index("{") :])["states"] == found["states"][:limit]
    code, printed = command("solve", energies, "--remove", 2, "--limit", 2)
    assert [f"CBO:{k}" in printed for k in range(4)] == [True, True, False, False]
    assert "4 more states" in printed


def test_a_single_sample_has_no_standard_error(
    command: Command, energies: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = ("--energies", energies, "--remove", 2, "--data", text_file, *DATA, "--no-choose-repaired")
    for number, shown in ((1, False), (4, True)):
        out = tmp_path / f"{number}.json"
        code, printed = command("select", tiny_folder, *given, "--num-samples", number, "--out", out)
        assert code == 0, printed
        assert (re.search(r"± ?\d", printed) is not None) == shown
        assert ("±–" in printed) == (not shown)


def test_an_error_that_is_not_known_is_a_dash_in_every_table(tmp_path: Path) -> None:
    """Of one sample, of one draw, of a task without errors; of the original, which is exact, there is none."""
    whole, sample = tiny_model("llama"), random_samples((20,))
    smaller = remove_blocks(whole, (1, 2))
    rows = evaluate_models({"a": whole, "b": smaller}, [1, 1], sample, progress=False)
    assert [row[3].endswith("% ±–") for row in results_table(rows).rows] == [False, True]
    assert Score("a", "word_perplexity", 3.0, None, None, 1, 0).as_text() == "3.0000 ±–"

    of_whole, of_smaller = (vars(quality_of(model, whole, sample)) for model in (whole, smaller))
    size: dict[str, Any] = {"num_parameters": 1, "num_bytes": 1, "tokens_per_second": 1.0}
    original = Row(ORIGINAL, "2", (), None, (), 0, 0, **of_whole, **size)
    shown = cells(Row("SLEB", "2", (1, 2), None, (), 0, 0, **of_smaller, **size), original, "blocks")
    assert [shown[name].split()[1] for name in ("KL", "loss above")] == ["±–", "±–"]
    assert "±" not in "".join(cells(original, original, "blocks").values())


def test_evaluate_knows_what_a_checkpoint_lacks(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also after two removals in a row, counted in the blocks of the original."""
    assert command("prune", tiny_folder, "--blocks", "1", "--out", tmp_path / "three")[0] == 0
    assert command("prune", tmp_path / "three", "--blocks", "1", "--out", tmp_path / "two")[0] == 0
    models = (tiny_folder, tmp_path / "three", tmp_path / "two")
    code, printed = command("evaluate", *models, "--data", text_file, "--num-samples", 6, *DATA, "--json")
    rows = json.loads(printed[printed.index("[\n") : printed.index("\n]") + 2])
    assert code == 0
    assert [row["removed"] for row in rows] == [[], [1], [1, 2]]

    code, printed = command("evaluate", *models, "--data", text_file, "--num-samples", 6, *DATA)
    assert code == 0
    assert "1-2" in printed
    assert printed.count("±") == 2


def test_compress_as_json(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    settings(tiny_folder, text_file).save(tmp_path / "settings.yaml")
    code, printed = command("compress", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0
    rows = json.loads(printed[: printed.index("\n]") + 2])
    assert rows == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    code, printed = command("report", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(printed[: printed.index("\n]") + 2]) == rows


def _in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user starts it: what packages print when they are imported or loaded is seen only there."""
    command = [sys.executable, "-m", "blockspin", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_nothing_but_ours_is_printed(tiny_folder: Path, text_file: Path) -> None:
    data = ("--data", text_file, "--num-samples", 4, *DATA)
    plain = _in_a_process("evaluate", tiny_folder, *data, "--json")
    assert json.loads(plain.stdout)[0]["num_blocks"] == 4
    lines = [line for line in plain.stderr.splitlines() if line.strip()]
    ours = ("Tokenising", "Evaluating", "Timing", "Reading", "Only")
    assert [line for line in lines if not line.startswith(ours)] == []

    quiet = _in_a_process("evaluate", tiny_folder, *data, "--quiet", "--json")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert json.loads(quiet.stdout)[0]["loss"] == json.loads(plain.stdout)[0]["loss"]


def test_no_bars_of_other_packages_while_a_checkpoint_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    which = ("--units", "sublayers", "--blocks", 1, "--out", tmp_path / "short")
    ended = _in_a_process("prune", tiny_folder, *which, "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_errors_are_told_however_quiet(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    given = ("prune", tiny_folder, "--blocks", "99", "--out", tmp_path / "out")
    quiet = _in_a_process(*given, "--quiet")
    assert (quiet.returncode, quiet.stderr.count("\n")) == (2, 1)
    assert quiet.stderr.startswith("Error:")
    code, printed = command(*given, "--quiet", "--verbose")
    assert (code, "exclude one another" in printed) == (2, True)

    verbose = _in_a_process(*given, "--verbose")
    assert verbose.returncode == 2
    assert "Traceback" in verbose.stderr
    assert "Traceback" not in _in_a_process(*given).stderr


def test_shells_complete_commands() -> None:
    environment = {
        **os.environ,
        "_BLOCKSPIN_COMPLETE": "complete_bash",
        "COMP_WORDS": "blockspin co",
        "COMP_CWORD": "1",
    }
    script = "from blockspin.cli import app; app(prog_name='blockspin')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compress", "compare"]
