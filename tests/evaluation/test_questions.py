"""The time of questions, on a clock of our own that a stand-in for the harness moves on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from blockspin.config import CompressConfig, EvaluateConfig
from blockspin.evaluation import harness, questions
from blockspin.evaluation.questions import TIMED, Questions, time_questions
from blockspin.memory import OutOfMemory

WARM_UP = 1000.0  # seconds that the first question after opening takes more


@dataclass
class Task:
    """Its questions are the seconds that they take."""

    eval_docs: list[float]


class Clock:
    """Stands in for the harness: knows the tasks, and lets the time of every question that is asked go by."""

    def __init__(self, found: Mapping[str, Mapping[str, list[float]]]) -> None:
        self.found: dict[str, Any] = {}
        for name, tasks in found.items():
            self.found[name] = {"tasks": {leaf: Task(seconds) for leaf, seconds in tasks.items()}}
        self.now = 0.0
        self.cold = WARM_UP
        self.asked: list[tuple[str, int]] = []  # name of the task and number of questions

    def run(self, lm: Any, loaded: Mapping[str, Any], config: EvaluateConfig) -> None:
        assert isinstance(config.limit, int)
        for name, task in loaded["tasks"].items():
            taken = task.eval_docs[: config.limit]
            self.asked.append((name, len(taken)))
            self.now += self.cold + sum(taken)
            self.cold = 0.0


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock, **settings: Any) -> Questions:
    monkeypatch.setattr(questions, "check_tasks", lambda *_: clock.found)
    monkeypatch.setattr(harness, "open_model", lambda *_: None)
    monkeypatch.setattr(harness, "run", clock.run)
    monkeypatch.setattr(questions, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    config = CompressConfig("model", "text", 1, tasks=tuple(clock.found), **settings)
    return time_questions(config, None, None)


def test_few_questions_are_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"choose": {"choose": [1.0, 2.0, 6.0]}, "both": {"a": [5.0], "b": [7.0, 9.0]}}
    assert timed(monkeypatch, Clock(found)) == Questions(6, 30.0)


def test_many_questions_take_what_a_few_of_all_parts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tasks of a hundred questions, of which the later ones take longer: (0 + ... + 39) / 40 in the mean."""
    clock = Clock({"group": {str(i): [float(i)] * 100 for i in range(40)}})
    asked = timed(monkeypatch, clock)
    assert sum(number for _, number in clock.asked) <= 2 * TIMED
    assert asked.number == 4000
    assert asked.seconds == pytest.approx(4000 * 39 / 2, rel=0.1)


def test_the_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({"write": {"write": [4.0] * 100}})
    assert timed(monkeypatch, clock, limit=20) == Questions(20, 80.0)
    assert timed(monkeypatch, clock, limit=0.5) == Questions(50, 200.0)


def test_questions_that_do_not_fit_into_memory_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({"write": {"write": [4.0] * 3}})

    def run_out(*_: Any) -> None:
        raise OutOfMemory("out of memory with --batch-size 8")

    monkeypatch.setattr(clock, "run", run_out)
    assert timed(monkeypatch, clock) == Questions(3, None)
