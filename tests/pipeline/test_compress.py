"""The whole method on a tiny model: artefacts, resuming, and bad input that leaves everything as it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import Command, save_tiny, settings

from blockspin.config import ENERGY_NAMES, CompressConfig, parse_remove
from blockspin.data.calibration import load_calibration
from blockspin.energies import load_energies
from blockspin.model.losses import mean_loss
from blockspin.pipeline.compress import compress
from blockspin.pipeline.plan import plan_run
from blockspin.pipeline.preflight import open_run
from blockspin.problem import Block, RemovalProblem
from blockspin.selection.result import Selection
from blockspin.selection.select import select
from blockspin.solvers import Spectrum
from blockspin.solvers.candidates import Candidate, random_candidate
from blockspin.surgery.memory import remove_blocks


def test_a_run_leaves_every_artefact(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, text_file)
    rows = compress(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "run.yaml",
        "energies.safetensors",
        "spectrum.json",
        "candidates.json",
        "checkpoint",
        "repaired",
        "evaluation.json",
        "report.html",
    }
    selection = Selection.load(tmp_path / "run" / "candidates.json")
    chosen = selection.chosen
    assert chosen.loss == min(trial.loss for trial in selection.trials if trial.num_samples == 8)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint", dtype=torch.float32)
    whole = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.testing.assert_close(loaded.state_dict(), remove_blocks(whole, chosen.removed).state_dict())
    assert rows[0].name == "original"
    assert rows[2].removed == chosen.removed
    assert rows[2].num_parameters == loaded.num_parameters()
    assert rows[2].num_bytes < rows[0].num_bytes
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["perplexity"] for row in stored] == [row.perplexity for row in rows]
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    held_out = load_calibration(text_file, tokenizer, num_samples=40, max_length=32, progress=False)[32:]
    assert rows[2].loss == pytest.approx(mean_loss(loaded, held_out), rel=1e-5)

    repaired = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "repaired", dtype=torch.float32)
    assert [row.name for row in rows] == ["original", "CBO:0", rows[2].name, "random", "repaired"]
    assert rows[4].removed == chosen.removed
    assert rows[4].num_bytes == rows[2].num_bytes
    assert rows[4].loss == pytest.approx(mean_loss(repaired, held_out), rel=1e-5)


def test_a_run_can_do_without_the_repair_and_have_it_later(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    plain = compress(settings(tiny_folder, text_file, repair=False), tmp_path / "run")
    assert "repaired" not in [row.name for row in plain]
    assert not (tmp_path / "run" / "repaired").exists()
    assert compress(settings(tiny_folder, text_file), tmp_path / "run")[:-1] == plain
    with pytest.raises(ValueError, match=r"other settings \(repair\)"):
        compress(settings(tiny_folder, text_file, repair=False), tmp_path / "run")


def test_too_little_text_for_the_repair_is_refused_first(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The repair comes last, and what it lacks is known when the model is open."""
    little = settings(tiny_folder, text_file, energy_samples=2, selection_samples=1, max_length=8)
    with pytest.raises(ValueError, match=r"inputs needs at least [\d,]+ for a repair"):
        compress(little, tmp_path / "run")
    with pytest.raises(ValueError, match=r"inputs needs at least [\d,]+ for a repair"):
        plan_run(little)
    assert not (tmp_path / "run" / "energies.safetensors").exists()
    assert not (tmp_path / "run" / "run.yaml").exists()
    assert compress(replace(little, repair=False), tmp_path / "run")[0].name == "original"


def test_the_choice_is_the_candidate_of_lowest_measured_loss(tiny_folder: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    samples = [torch.arange(2, 30), torch.arange(40, 50)]
    candidates = [Candidate((i, j), "test") for i in range(4) for j in range(i)]
    candidates = [Candidate(tuple(sorted(c.removed)), c.source) for c in candidates]
    losses = [mean_loss(remove_blocks(model, c.removed), samples) for c in candidates]
    chosen = select(model, candidates, samples, objective="loss", progress=False)
    assert chosen.removed == candidates[int(np.argmin(losses))].removed
    assert chosen.loss == pytest.approx(min(losses), rel=1e-5)


def test_a_finished_run_is_not_done_again(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_folder, text_file)
    rows = compress(config, tmp_path / "run")
    monkeypatch.setattr("blockspin.pipeline.compress.load_as", lambda *a, **k: pytest.fail("loaded the model again"))
    assert compress(config, tmp_path / "run") == rows


def test_stages_continue_after_any_of_them(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Whatever artefacts are missing, the rest of the run is the same."""
    config = settings(tiny_folder, text_file)
    rows = compress(config, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for name in ("evaluation.json", "candidates.json", "energies.safetensors"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / "evaluation.json").unlink(missing_ok=True)
        again = compress(config, tmp_path / "run")
        assert [(row.removed, row.loss) for row in again] == [(row.removed, row.loss) for row in rows]
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run" / "energies.safetensors").read_bytes() == before["energies.safetensors"]


@pytest.mark.parametrize("energy", ["fitted", *(pytest.param(e, marks=pytest.mark.slow) for e in ("secant", "fisher"))])
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(
    tiny_folder: Path, text_file: Path, tmp_path: Path, energy: str
) -> None:
    config = settings(tiny_folder, text_file, energy_samples=30, batch_size=1, energy=energy)
    unbroken = compress(config, tmp_path / "unbroken")
    config.save(tmp_path / "settings.yaml")
    arguments = ["compress", "--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "run")]
    run = [sys.executable, "-m", "blockspin", *arguments]
    seen: set[str] = set()
    for stage in ("energies.partial.jsonl", "candidates.partial.jsonl", "candidates.json", "checkpoint"):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "run" / stage).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen |= {path.name for path in (tmp_path / "run").iterdir()}
    assert "energies.partial.jsonl" in seen
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [(tuple(row["removed"]), row["loss"]) for row in rows] == [(row.removed, row.loss) for row in unbroken]
    np.testing.assert_array_equal(
        load_energies(tmp_path / "run" / "energies.safetensors").hessian,
        load_energies(tmp_path / "unbroken" / "energies.safetensors").hessian,
    )


@pytest.mark.parametrize("energy", ENERGY_NAMES)
def test_each_stage_has_its_command(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, energy: str
) -> None:
    gradients, spectrum = tmp_path / "g.safetensors", tmp_path / "s.json"
    common = ("--max-length", 32)
    data = ("--calibration", text_file, "--energy", energy, "--num-samples", 20, "--energy-samples", 6)
    assert command("gradients", tiny_folder, *data, *common, "--out", gradients)[0] == 0
    code, printed = command("solve", gradients, "--remove", 2, "--states", 5, "--protect", 0, "--out", spectrum)
    assert code == 0
    assert "CBO:0" in printed
    states = Spectrum.load(spectrum).states
    assert "Drawn anew" in printed
    problem = RemovalProblem(load_energies(gradients).hessian, 2, protect=(0,))
    every = [(i, j) for j in range(4) for i in range(1, j)]
    assert states[0].removed == min(every, key=problem.energy)
    code, printed = command(
        *("select", tiny_folder, "--energies", gradients, "--remove", 2, "--data", text_file, "--num-samples", 8),
        *("--budget", 4, *common, "--out", tmp_path / "c.json"),
    )
    assert code == 0
    chosen = next(line for line in printed.splitlines() if re.fullmatch(r"\d[\d,-]*", line))
    assert command("prune", tiny_folder, "--blocks", chosen, "--out", tmp_path / "short")[0] == 0
    code, printed = command("evaluate", tiny_folder, tmp_path / "short", "--data", text_file, *common)
    assert code == 0
    assert "perplexity" in printed


@pytest.mark.parametrize("remove", [0, -1, 4, 99])
def test_impossible_numbers_of_removals(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, remove: int
) -> None:
    out = tmp_path / "run"
    code, printed = command("compress", tiny_folder, "--remove", remove, "--calibration", text_file, "--out", out)
    assert code == 2
    assert "remove" in printed
    assert "Traceback" not in printed
    assert not out.exists()


def test_bad_input_gives_one_line_and_code_2(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    ).save_pretrained(encoder)
    broken = save_tiny(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fields.jsonl").write_text('{"question": "?"}\n' * 3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    good = {"model": tiny_folder, "--remove": 2, "--calibration": text_file, "--out": tmp_path / "run"}
    cases: list[tuple[dict[str, object], str]] = [
        ({"model": tmp_path / "absent"}, "cannot open the model"),
        ({"model": encoder}, "not a decoder-only"),
        ({"model": broken}, "truncated"),
        ({"--calibration": tmp_path / "absent.jsonl"}, "cannot read the data"),
        ({"--calibration": tmp_path / "empty.jsonl"}, "calibration"),
        ({"--calibration": tmp_path / "fields.jsonl"}, "has the fields question"),
        ({"--remove": "moe=1"}, "moe"),
        ({"--remove": "many"}, "--remove takes"),
        ({"--protect": "0,1,2"}, "protected"),
        ({"--solver": "magic"}, "--solver"),
        ({"--beta": -1}, "--beta weighs a gradient: choose --energy"),
        ({"--dtype": "int3"}, "--dtype"),
        ({"--batch-size": 0}, "--batch-size"),
        ({"--out": tmp_path / "other"}, "is not a run of blockspin"),
        ({"--out": text_file}, "--out"),
        ({"--out": "/proc/nowhere"}, "cannot write"),
    ]
    for changes, message in cases:
        arguments = {**good, **changes}
        options = [part for flag, value in arguments.items() if flag != "model" for part in (flag, value)]
        code, printed = command("compress", arguments["model"], *options)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), (changes, printed)
        assert message in errors[0]
        assert "Traceback" not in printed
        assert not (tmp_path / "run").exists(), changes
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_loss_that_is_not_a_number(command: Command, text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    code, printed = command(
        "gradients", folder, "--calibration", text_file, "--max-length", 32, "--out", tmp_path / "g.safetensors"
    )
    assert code == 2
    assert "loss of sample" in printed
    assert not (tmp_path / "g.safetensors").exists()


def test_a_truncated_gradients_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "g.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    code, printed = command("solve", tmp_path / "g.safetensors", "--remove", 2)
    assert (code, "truncated" in printed) == (2, True)


def test_a_folder_of_another_run_is_refused_and_kept(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    settings(tiny_folder, text_file).save(tmp_path / "settings.yaml")
    arguments = ("compress", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "run")
    assert command(*arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, printed = command(*arguments, "--seed", 7)
    assert code == 2
    assert "other settings (seed)" in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_unknown_settings_are_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("modle: typo\n")
    code, printed = command("compress", "--config", tmp_path / "settings.yaml")
    assert (code, "unknown settings: modle" in printed) == (2, True)


def test_random_removals_respect_the_problem() -> None:
    problem = RemovalProblem(np.eye(8), 3, protect=(0, 5))
    drawn = {random_candidate(problem, seed).removed for seed in range(200)}
    assert all(problem.allows(removed) for removed in drawn)
    assert len(drawn) == 20  # every one of C(6, 3)
    blocks = [Block(i, "attention+mlp", 100 + i) for i in range(8)]
    budget = RemovalProblem(np.eye(8), remove_parameters=0.4, blocks=blocks)
    assert all(budget.allows(random_candidate(budget, seed).removed) for seed in range(50))


def test_remove_is_a_number_or_a_number_for_each_kind_or_a_share() -> None:
    assert parse_remove("8") == 8
    assert parse_remove("moe=2, attention=1") == {"moe": 2, "attention": 1}
    assert parse_remove("25%") == 0.25
    for text in ("moe=", "=", "8,9", "1.5", "moe=0", "0%", "100%", "%"):
        with pytest.raises(ValueError, match="--remove"):
            parse_remove(text)


def test_a_loss_that_is_not_finite_binds_no_settings(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal of the samples that were finished before it goes: a corrected command runs in the same folder."""
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    (token,) = tf.AutoTokenizer.from_pretrained(tiny_folder)("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(tiny_folder)
    texts = [*(f"{k} is a whole number, and a good one" for k in range(20)), *(f"{k}~" for k in range(20))]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))

    finished = []
    monkeypatch.setattr("blockspin.journal.Journal.append", lambda self, entry: finished.append(entry))
    config = settings(tiny_folder, data, energy="empirical-fisher", batch_size=1)
    with pytest.raises(ValueError, match=r"loss of sample \d+ is nan"):
        compress(config, tmp_path / "run")
    assert finished  # the longest samples come first
    assert not list((tmp_path / "run").glob("energies.*"))
    open_run(replace(config, calibration="other.jsonl"), tmp_path / "run")


def test_settings_bind_a_run_from_the_stage_that_used_them(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a mistake the corrected command runs, and what was finished before is kept."""
    out = tmp_path / "run"
    config = settings(tiny_folder, text_file)

    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("not today")

    # Nothing is computed yet when the energies are refused: every setting may change.
    with monkeypatch.context() as patch:
        patch.setattr("blockspin.pipeline.stages.estimate_energies", refuse)
        with pytest.raises(ValueError, match="not today"):
            compress(replace(config, dtype="float16", max_length=16), out)
    assert (out / "run.yaml").is_file()

    with monkeypatch.context() as patch:
        patch.setattr("blockspin.pipeline.stages.solve", refuse)
        with pytest.raises(ValueError, match="not today"):
            compress(replace(config, states=3), out)
    energies = (out / "energies.safetensors").stat().st_mtime_ns

    # The energies bind their settings, but not those of the solver.
    with pytest.raises(ValueError, match=r"other settings \(max_length\)"):
        compress(replace(config, max_length=16), out)
    compress(replace(config, states=4), out)
    assert (out / "energies.safetensors").stat().st_mtime_ns == energies
    assert len(Spectrum.load(out / "spectrum.json").states) == 4
    assert CompressConfig(**CompressConfig.read(out / "run.yaml")).states == 4

    changes: list[dict[str, Any]] = [
        {"states": 5},
        {"remove": 1},
        {"budget": 1.0},
        {"evaluation_samples": 4},
        {"tasks": ("a",)},
    ]
    for change in changes:
        with pytest.raises(ValueError, match=rf"other settings \({next(iter(change))}\)"):
            compress(replace(config, **{"states": 4, **change}), out)
