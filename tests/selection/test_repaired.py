"""The choice between the last candidates as a repair leaves them, against repairs made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import random_samples, tiny_model

from blockspin.config import ChoosingSettings
from blockspin.model.quality import quality_of
from blockspin.model.tracing import find_units
from blockspin.problem import Removal, Units
from blockspin.repairs.run import repair
from blockspin.selection import repaired
from blockspin.selection.repaired import choose_repaired, finalists
from blockspin.selection.result import Selection, Trial
from blockspin.solvers.candidates import Candidate
from blockspin.surgery.feasible import Removable
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples((20,) * 8, seed=3)
TEXT = random_samples((24,) * 40, seed=4)
MODEL = tiny_model("llama")
EVERYTHING = Removable(MODEL.config)
SETTINGS = ChoosingSettings(seed=0)


def selection_of(*removals: Removal, units: Units = "blocks") -> Selection:
    """A selection whose trials are these removals of the tiny model, in this order."""
    trials = []
    for removed in removals:
        kl = quality_of(remove_blocks(MODEL, removed, units=units, copy=False), MODEL, SAMPLES).kl
        trials.append(Trial(removed, "test", None, kl, None, len(SAMPLES), 0.0, None))
    chosen = Candidate(removals[0], "test", None, trials[0].loss)
    return Selection(chosen, tuple(trials), "kl", 10.0, 1.0)


def repaired_kl(removed: Removal, units: Units = "blocks") -> float:
    """What a repair by hand leaves; the tiny model's widest map has 48 inputs, so 3 * 96 tokens are fitted to."""
    shortened = remove_blocks(MODEL, removed, units=units)
    repair(shortened, MODEL, TEXT[:12])
    return quality_of(shortened, MODEL, SAMPLES).kl


def test_the_best_after_a_repair_is_chosen() -> None:
    removals: list[Removal] = [(0,), (1,), (2,), (3,)]
    expected = {removed: repaired_kl(removed) for removed in removals}
    best = min(removals, key=lambda removed: expected[removed])
    worst = max(removals, key=lambda removed: expected[removed])
    removals.sort(key=lambda removed: removed != worst)  # the choice so far

    found = choose_repaired(MODEL, selection_of(*removals), SAMPLES, TEXT, EVERYTHING, SETTINGS, progress=False)
    assert found.chosen.removed == best
    for trial in found.trials:
        assert trial.repaired == pytest.approx(expected[trial.removed], rel=1e-4)
    assert found.passes == 10
    assert found.repair_passes > 4 * 1.75  # each is measured beside the original
    assert f"{expected[best]:.4f} after a repair" in found.summary()
    assert "repaired" in found.table().text(120)
    parts = found.table().text(50).split("\n\n")  # each says which removals its numbers are of
    assert len(parts) > 1
    assert all(part.startswith("removed") for part in parts)


def test_sub_layers_are_repaired_too() -> None:
    removals: list[Removal] = [(1, 3), (2, 5), (4, 7)]
    expected = {removed: repaired_kl(removed, "sublayers") for removed in removals}
    removals.sort(key=lambda removed: -expected[removed])  # the worst is the choice so far
    removable = Removable(MODEL.config, find_units(MODEL, "sublayers"))

    found = choose_repaired(
        MODEL, selection_of(*removals, units="sublayers"), SAMPLES, TEXT, removable, SETTINGS, progress=False
    )
    assert found.chosen.removed == removals[-1]
    for trial in found.trials:
        assert trial.repaired == pytest.approx(expected[trial.removed], rel=1e-4)


def test_finalists_differ_where_they_can() -> None:
    trials = []
    for k, removed in enumerate([(1, 2), (1, 3), (4, 5), (2, 3), (6, 7)]):
        trials.append(Trial(removed, "test", None, k / 10, None, 4, 0.0, None))
    trials.append(Trial((8, 9), "test", None, 0.0, None, 2, 0.0, None))  # left the race early
    chosen = Candidate((2, 3), "test", None, 0.3)
    last = finalists(Selection(chosen, tuple(trials), "kl", 0.0, 0.0), lambda removed: removed != (6, 7))
    assert [trial.removed for trial in last] == [(2, 3), (4, 5), (1, 2), (1, 3)]


def test_too_little_text_leaves_the_choice_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = selection_of((0,), (1,))
    assert choose_repaired(MODEL, before, SAMPLES, TEXT[:3], EVERYTHING, SETTINGS, progress=False) is before
    assert "too little text" in capsys.readouterr().err


def test_quantised_weights_leave_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    model, before = tiny_model("llama"), selection_of((0,), (1,))
    model.config.quantization_config = {"quant_method": "fp8"}
    assert choose_repaired(model, before, SAMPLES, TEXT, EVERYTHING, SETTINGS, progress=False) is before
    assert "quantised" in capsys.readouterr().err


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, file = selection_of((0,), (1,), (2,)), tmp_path / "kept.jsonl"
    done: list[Removal] = []
    measured = repaired._measured

    def killed(model: Any, trial: Trial, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(trial.removed)
        return measured(model, trial, *rest)

    monkeypatch.setattr(repaired, "_measured", killed)
    with pytest.raises(KeyboardInterrupt):
        choose_repaired(MODEL, before, SAMPLES, TEXT, EVERYTHING, SETTINGS, partial=file, progress=False)
    first, done[:] = list(done), []
    found = choose_repaired(MODEL, before, SAMPLES, TEXT, EVERYTHING, SETTINGS, partial=file, progress=False)
    assert sorted([*first, *done]) == [(0,), (1,), (2,)]
    assert all(trial.repaired is not None for trial in found.trials)
