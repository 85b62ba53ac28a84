"""The plan of a run, against what the run then does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import Command, random_samples, save_tokenizer, settings, tiny_model
from safetensors.torch import load_file

from blockspin.comparison.cost import counted
from blockspin.config import CompressConfig
from blockspin.energies import estimate_energies
from blockspin.evaluation.harness import num_questions
from blockspin.evaluation.questions import Questions
from blockspin.model.loading import load_model
from blockspin.model.tracing import trace_model
from blockspin.pipeline.compress import compress
from blockspin.pipeline.plan import RECORDS, SOLVER_SECONDS, _energy_passes, _solving, duration, plan_run
from blockspin.pipeline.stages import Samples
from blockspin.pipeline.sweeps import count_sweeps
from blockspin.problem import Block
from blockspin.surgery.checkpoint import checkpoint_bytes
from blockspin.training import DistillConfig

MANY_TEXTS = "\n\n".join(f"text {i} counts to {i * i} and has {i % 7} words" * 3 for i in range(160))


@pytest.mark.parametrize("energy", ["secant", "gauss-newton", "fisher", "empirical-fisher"])
def test_passes_are_those_that_are_counted(energy: str) -> None:
    model, samples = tiny_model("llama"), random_samples((32,) * 64)
    tokens = 64 * 32
    with counted(model, tokens) as tracing:
        traced = trace_model(model)
    with counted(model, tokens) as cost:
        estimate_energies(energy, model, samples, progress=False)

    # To one block: where a pass starts from kept states, handing these on counts as one.
    one_block = 1 / traced.depth + 0.02
    assert _energy_passes(energy, traced, len(samples)) == pytest.approx(cost.passes - tracing.passes, abs=one_block)


def test_fitted_energies_take_no_more_than_planned() -> None:
    model, samples = tiny_model("llama"), random_samples((32,) * 4)
    tokens = 4 * 32
    traced = trace_model(model)
    with counted(model, tokens) as cost:
        estimate_energies("fitted", model, samples, progress=False)

    # Many times the single removals, and at most what was planned, though tracing is counted too.
    planned = _energy_passes("fitted", traced, len(samples))
    assert planned / 8 < cost.passes < planned


def test_nothing_is_written(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    settings(tiny_folder, text_file).save(tmp_path / "settings.yaml")
    before = sorted(tmp_path.rglob("*"))
    arguments = ("compress", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "run", "--dry-run")
    code, printed = command(*arguments)
    assert code == 0
    for said in ("energies (secant)", "selection (at most)", "checkpoint", "of memory", "of disk"):
        assert said in printed
    assert sorted(tmp_path.rglob("*")) == before

    code, printed = command(*arguments, "--remove", "4")
    assert (code, "remove" in printed) == (2, True)


def test_sizes_are_those_of_the_run(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, text_file)
    plan = plan_run(config)
    forms = 4 * 4**2 * 24  # energies of 24 samples
    weights = load_file(tiny_folder / "model.safetensors")
    maps = sum(weight.nbytes for name, weight in weights.items() if "_proj" in name)
    left = checkpoint_bytes(tiny_folder, (0, 1)) / checkpoint_bytes(tiny_folder)
    checkpoint = checkpoint_bytes(tiny_folder, (0, 1)) + (tiny_folder / "tokenizer.json").stat().st_size
    expected = 2 * checkpoint + left * maps + forms  # as pruned, repaired, and what the repair has finished
    assert plan.disk_bytes - RECORDS == pytest.approx(expected, rel=0.02)
    plain = plan_run(settings(tiny_folder, text_file, repair=False))
    assert plain.disk_bytes - RECORDS == pytest.approx(checkpoint + forms, rel=0.02)
    assert {planned.stage for planned in plan.stages} - {planned.stage for planned in plain.stages} == {"repair"}
    evaluation = next(planned for planned in plan.stages if planned.stage == "evaluation")
    assert evaluation.samples == 8
    assert evaluation.seconds == pytest.approx(evaluation.tokens / plan.tokens_per_second)
    assert json.loads(json.dumps(plan.as_json()))["steps"][0]["samples"] == 24


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """A model whose weights take more than everything else that a run writes: 5 MB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = tf.LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    save_tokenizer(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("stages", ["checkpoint", "repair", "repair and training"])
def test_a_run_writes_at_most_what_is_planned(
    stages: str, wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are most whenever a folder is about to be deleted, or at the end."""
    text, out, most = tmp_path / "text.txt", tmp_path / "run", 0
    text.write_text(MANY_TEXTS)

    def measure(folder: object = None, *arguments: Any, **options: Any) -> None:
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))
        if folder is not None:
            rmtree(folder, *arguments, **options)

    rmtree: Any = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", measure)
    # The lowest layers go, so that the repair changes all that are left.
    config = settings(wide_folder, text, energy_samples=100, protect=(2, 3, 4, 5), repair=stages != "checkpoint")
    if "training" in stages:
        config = replace(config, distill=DistillConfig(max_steps=3, save_steps=1, eval_steps=3, max_length=32))
    planned = plan_run(config).disk_bytes
    compress(config, out)
    measure()
    assert most <= planned <= 1.3 * most


def test_stages_that_are_there_are_done(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """They take no time; a run that could not go on with other settings cannot be planned with them either."""
    config = settings(tiny_folder, text_file)
    compress(config, tmp_path / "run")
    for name in ("candidates.json", "evaluation.json"):
        (tmp_path / "run" / name).unlink()
    before = sorted(tmp_path.rglob("*"))
    plan = plan_run(config, tmp_path / "run")
    assert [planned.title for planned in plan.stages if not planned.done] == [
        "cheap baselines",
        "selection (at most)",
        "evaluation",
    ]
    assert all(planned.seconds is None and planned.tokens == 0 for planned in plan.stages if planned.done)
    assert plan.table().text(80).count("done") == 4
    with pytest.raises(ValueError, match=r"other settings \(max_length\)"):
        plan_run(replace(config, max_length=16), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_solver_that_is_cut_off_takes_at_least_its_time(tiny_folder: Path) -> None:
    """Forty of eighty blocks: proven in a second or two, and not in a hundredth of one."""
    config = settings(tiny_folder, tiny_folder, remove=40, time_limit=0.01)
    blocks = [Block(i, "attention+mlp", 10) for i in range(80)]
    assert (hard := _solving(config, blocks)).title == "spectrum (at least)"
    assert hard.seconds == 0.01
    easy = _solving(settings(tiny_folder, tiny_folder, remove=1, solver="enumerate"), blocks)
    assert easy.title == "spectrum (made-up energies)"
    assert easy.seconds is not None
    assert easy.seconds < SOLVER_SECONDS


def test_questions_of_tasks_are_counted() -> None:
    """Of each task those that the limit leaves."""

    @dataclass
    class Task:
        eval_docs: list[int]

    found = {"group": {"tasks": {"a": Task([0] * 10), "b": Task([0] * 3)}}, "c": {"tasks": {"c": Task([0] * 5)}}}
    assert [num_questions(found, limit) for limit in (None, 4, 0.5)] == [18, 11, 10]


@pytest.mark.parametrize("seconds", [1000.0, None])
def test_questions_of_tasks_count_for_all_models(
    seconds: float | None, tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole one, three shortened ones and the repaired one; those take less, by what they have of the weights."""
    monkeypatch.setattr("blockspin.pipeline.plan.time_questions", lambda *_: Questions(7, seconds))
    plan = plan_run(settings(tiny_folder, text_file, tasks=("choose",)))
    asked = plan.stages[-1]
    assert asked.samples == 5 * 7
    assert ("benchmark tasks not counted" in plan.summary()) == (seconds is None)
    if seconds is not None:
        left = checkpoint_bytes(tiny_folder, (0, 1)) / checkpoint_bytes(tiny_folder)
        assert asked.seconds == pytest.approx(seconds * (1 + 4 * left), rel=0.02)
        assert "About 6" in plan.summary()  # minutes
    else:
        assert asked.seconds is None


def test_memory_of_a_repair_is_that_of_both_models_and_of_what_changes(wide_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(MANY_TEXTS)
    plan = plan_run(settings(wide_folder, text, energy_samples=100, remove=3))
    weights = {name: weight.nbytes for name, weight in load_file(wide_folder / "model.safetensors").items()}
    maps = sum(size for name, size in weights.items() if "_proj" in name)
    blocks = sum(size for name, size in weights.items() if ".layers." in name)
    whole = sum(weights.values())
    smaller = whole - blocks / 2
    changed = maps * smaller / whole  # counted as the share of all weights that stays
    sums = 5 * 8 * 256 * (256 + 128)  # of the map with the most inputs

    # A third of the text will be the model's own.
    repair = next(planned for planned in plan.stages if planned.stage == "repair")
    assert repair.passes is not None
    states = 8 * 4 * 128 * repair.tokens / repair.passes * 3 / 2
    assert plan.memory_bytes == pytest.approx(whole + smaller + changed + sums + states, rel=1e-6)


def test_a_plan_tells_of_gradient_checkpointing(
    tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for or chosen ahead: one pass more, and each token keeps less than what four blocks make of it."""
    config = settings(tiny_folder, text_file, energy="empirical-fisher", repair=False, batch_size=1)
    plain = plan_run(config)
    asked_for = plan_run(replace(config, gradient_checkpointing=True))
    assert (plain.stages[0].title, plain.stages[0].passes) == ("energies (empirical-fisher)", 2)
    title = "energies (empirical-fisher, gradient checkpointing)"
    assert (asked_for.stages[0].title, asked_for.stages[0].passes) == (title, 3)

    longest = config.max_length
    makes = 4 * 4 * (32 + 48)  # bytes of a token in a block
    assert plain.memory_bytes - asked_for.memory_bytes == longest * (4 * makes - (makes + 4 * 4 * 32))

    # Half of the free memory holds half of the longest sample.
    free = longest * (4 * makes + 4 * 4 * 300)
    monkeypatch.setattr("blockspin.model.largest_batch.free_memory", lambda device: free)
    chosen = plan_run(config)
    assert chosen.stages[0].title == title
    assert chosen.memory_bytes == asked_for.memory_bytes


def test_durations() -> None:
    assert [duration(s) for s in (0.5, 42, 420, 12_600)] == ["0.5 s", "42 s", "7 min", "3.5 h"]


def test_plan_of_a_streamed_run_counts_what_is_read(tiny_folder: Path, text_file: Path) -> None:
    plan = plan_run(settings(tiny_folder, text_file, stream=True, budget=4))
    assert "repair" in [planned.stage for planned in plan.stages]
    assert plan.reading_seconds > 0
    assert f"read about {plan.sweeps:.0f} times" in plan.summary()

    # The time of a sweep is part of the stage.
    without = plan_run(settings(tiny_folder, text_file, budget=4))
    assert without.sweeps == 0
    assert "read about" not in without.summary()


def test_secant_takes_one_sweep_where_all_states_fit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace_model(load_model(tiny_folder, device_map="stream"))
    samples = Samples(random_samples((8,) * 10), [], [])
    config = CompressConfig("model", "text", remove=1, energy="secant")
    assert count_sweeps(config, traced, samples)["energies"] == 1

    # (N + 2) states of 80 tokens of 32 numbers, of which half of the free memory holds a third.
    monkeypatch.setattr("blockspin.pipeline.sweeps.available_memory", lambda: 2 * 6 * 80 * 32 * 4 // 3)
    assert count_sweeps(config, traced, samples)["energies"] == 3
