"""Which removals can be saved, against the surgery itself; the search among few against all of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from conftest import save_tokenizer, settings
from tiny import DEPTH, tiny_config, tiny_random_model

from blockspin.pipeline.compress import compress
from blockspin.problem import RemovalProblem
from blockspin.solvers import solve
from blockspin.surgery.feasible import Removable, protect_what_must_stay, same_pattern_candidates, without
from blockspin.surgery.memory import remove_blocks


@pytest.mark.parametrize("model_type", ["gemma3n_text", "diffllama", "bamba", "modernbert-decoder"])
def test_the_answer_is_that_of_the_surgery(model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    removable = Removable(model.config)
    answers, works = [], []
    for removed in [(0,), (2,), (5,), (0, 1), (1, 4), (4, 5)]:
        answers.append(removable(removed))
        try:
            remove_blocks(model, removed)
            works.append(True)
        except ValueError:
            works.append(False)
    assert answers == works


def test_many_answers_need_few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    removable = Removable(tiny_config("llama"))
    assert removable.pattern == (0,) * DEPTH
    assert removable([2])
    monkeypatch.setattr(removable, "_build", lambda config: pytest.fail("built a model again"))
    assert all(removable([i]) for i in range(DEPTH))


def test_little_is_examined_anew() -> None:
    removable = Removable(tiny_config("jamba"))  # a period of two
    assert removable([0, 1])
    assert removable.among([(0,), (2, 3), (1, 4), (1, 2)], new_patterns=0) == [(2, 3), (1, 2)]
    assert removable.among([(1, 4), (0,), (2, 3)], new_patterns=1) == [(2, 3)]
    assert removable.among([(1, 4), (0,), (2, 3)], new_patterns=1) == [(0,), (2, 3)]


class Periodic(Removable):
    """Allows what leaves layers that repeat with a period of four."""

    def __init__(self) -> None:
        self.pattern = (0, 1, 0, 3) * 4

    def __call__(self, removed: Iterable[int]) -> bool:
        left = without(self.pattern, removed)
        return left == self.pattern[: len(left)]


@pytest.mark.parametrize("seed", range(5))
def test_removals_of_the_same_pattern_are_the_lowest_of_all(seed: int) -> None:
    factors = np.random.default_rng(seed).normal(size=(16, 6))
    problem = RemovalProblem(factors @ factors.T, remove=8)
    allowed = [removed for removed in combinations(range(16), 8) if Periodic()(removed)]
    assert len(allowed) > 80
    found = same_pattern_candidates(problem, Periodic(), range(8, 16))
    assert {candidate.removed for candidate in found} <= {*allowed}
    assert found[0].energy == min(map(problem.energy, allowed))
    energies = [candidate.energy for candidate in found if candidate.energy is not None]
    assert [candidate.energy for candidate in found] == sorted(energies)
    assert same_pattern_candidates(problem, Periodic(), [0, *range(9, 16)]) == []


def test_blocks_that_others_need_are_protected() -> None:
    """In Gemma 3n the last layers use the keys and values of blocks 2 and 3."""
    removable = Removable(tiny_config("gemma3n_text"))
    hessian = np.diag([4.0, 3.0, 1.0, 1.0, 5.0, 6.0])
    problem = protect_what_must_stay(RemovalProblem(hessian, remove=2), removable)
    assert problem.protect == (2, 3)
    assert solve(problem, states=1).states[0].removed == (0, 1)
    qwen = Removable(tiny_config("qwen3_vl"))  # adds features of images after its first two blocks
    assert protect_what_must_stay(RemovalProblem(np.eye(DEPTH), remove=2), qwen).protect == (0, 1)
    untouched = RemovalProblem(np.diag([1.0, 1.0, 9, 9, 9, 9]), remove=2)
    assert protect_what_must_stay(untouched, removable) is untouched


def test_a_run_ends_with_a_removal_that_can_be_saved(text_file: Path, tmp_path: Path) -> None:
    """The layers of DiffLlama have constants that depend on their number: only the last ones can go."""
    model = tiny_random_model(tiny_config("diffllama", vocab_size=300))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = compress(settings(tmp_path / "model", text_file, remove=2), tmp_path / "run")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert loaded.config.num_hidden_layers == DEPTH - 2
    chosen = next(row for row in rows if row.name.startswith("chosen"))
    assert chosen.removed == (DEPTH - 2, DEPTH - 1)
    assert all(row.removed in ((), chosen.removed) for row in rows)
