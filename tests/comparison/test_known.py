"""Removals that are known already are scored beside what methods choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from conftest import Command

from blockspin.comparison import run
from blockspin.comparison.known import known_removals, paper_models
from blockspin.comparison.methods import known_methods
from blockspin.comparison.report import write_report
from blockspin.config import CompressConfig
from blockspin.data.calibration import load_calibration
from blockspin.energies import load_energies
from blockspin.model.losses import mean_loss
from blockspin.problem import RemovalProblem
from blockspin.surgery.memory import remove_blocks

DEPTHS = {"llama-3.1-8b-instruct": 32, "qwen3-14b": 40, "llama-3.3-70b-instruct": 80, "nemotron-3-nano-30b-a3b": 52}


def test_the_papers_removals_fit_its_models() -> None:
    """The blocks are those of the model, and each goal of the paper has what its methods remove."""
    assert set(paper_models()) == set(DEPTHS)
    for model, depth in DEPTHS.items():
        for removals in known_removals(model).values():
            for removed in removals:
                assert len(set(removed)) == len(removed)
                assert max(removed) < depth

    eight = RemovalProblem(np.eye(32), 8)
    found = {method.name: method for method in known_methods(known_removals("llama-3.1-8b-instruct"), eight)}
    assert set(found) == {"paper CBO:0", "paper BI", "paper norm ratio"}


def test_a_users_removals_are_measured(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("ours: ['1,3', '2']\ntheirs: 0-1\n")
    sizes: dict[str, Any] = {
        "energy_samples": 2,
        "selection_samples": 2,
        "evaluation_samples": 4,
        "max_length": 16,
        "states": 3,
    }
    config = CompressConfig(str(tiny_folder), str(text_file), remove=2, energy="fitted", **sizes)
    monkeypatch.setattr(run, "methods", lambda config: [])
    found = run.compare(config, {"2": 2}, tmp_path / "out", against=str(table))
    assert {row.method: row.removed for row in found.rows} == {"original": (), "ours": (1, 3), "theirs": (0, 1)}

    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    number = config.calibration_samples + 2 + 4
    samples = load_calibration(text_file, tokenizer, num_samples=number, max_length=16, progress=False)[-4:]
    for row in found.rows:
        assert row.loss == pytest.approx(mean_loss(remove_blocks(model, row.removed), samples), rel=1e-5)

    # The energies were made for this goal, and the page finds them.
    assert load_energies(tmp_path / "out" / "fitted-2.safetensors").metadata["goal"] == "2"
    assert write_report(tmp_path / "out").exists()
    with pytest.raises(ValueError, match="other settings"):
        run.compare(config, {"2": 2}, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"), [("ours: 3-x", "ours"), ("[1, 2]", "no table"), ("{", "YAML"), ("", "no table")]
)
def test_mistakes_in_a_table(text: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        known_removals(str(table))


def test_an_unknown_name_says_what_there_is(command: Command, tiny_folder: Path, text_file: Path) -> None:
    code, printed = command(
        "compare", tiny_folder, "--calibration", text_file, "--remove", "1", "--against", "llama-9", "--out", "o"
    )
    assert code == 2
    assert "llama-3.1-8b-instruct" in printed
