"""How many questions benchmark tasks ask, and about how long a model takes for them: timed on a few of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import CompressConfig, EvaluateConfig, TaskSettings
from ..memory import OutOfMemory
from . import harness
from .tasks import check_tasks

TIMED = 16  # questions of each entry of `--tasks`, spread over its tasks


@dataclass(frozen=True)
class Questions:
    """What one model is asked.

    number: of all tasks. seconds: that they should take; None where the timed ones do not fit into memory.
    """

    number: int
    seconds: float | None


def time_questions(config: CompressConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Time a few questions of each entry of `--tasks`, scored as a run scores them, and scale up to all.

    The first questions of a task stand for the others. They are asked in the batches of a CPU: on a GPU the harness
    looks for larger ones, with which answers that are generated take less time than is said here.

    Raises:
        ValueError: as `check_tasks`, or the answers do not fit into the model's context.
    """
    shared = {field.name: getattr(config, field.name) for field in fields(TaskSettings)}
    settings = EvaluateConfig(**shared, batch_size=harness.CPU_BATCH_SIZE)
    found = check_tasks(settings.tasks, settings, tokenizer)
    questions = harness.num_questions(found, settings.limit)
    lm = harness.open_model(model, tokenizer, settings)

    seconds = 0.0
    try:
        for name, loaded in found.items():
            number = harness.num_questions({name: loaded}, settings.limit)
            seconds += number * _seconds_of_one(lm, loaded["tasks"], settings)
    except OutOfMemory:
        return Questions(questions, None)
    return Questions(questions, seconds)


def _seconds_of_one(lm: Any, tasks: Mapping[str, Any], settings: EvaluateConfig) -> float:
    """The mean time of a question of these tasks."""
    # As many tasks as there are questions to time, from everywhere in the list.
    step = math.ceil(len(tasks) / TIMED)
    few = dict(list(tasks.items())[::step])
    each = math.ceil(TIMED / len(few))

    # One question warms up: what is imported and compiled once belongs to none.
    first = dict(list(few.items())[:1])
    _seconds_of(lm, first, settings, each=1)
    return _seconds_of(lm, few, settings, each) / harness.num_questions({"": {"tasks": few}}, each)


def _seconds_of(lm: Any, tasks: Mapping[str, Any], settings: EvaluateConfig, each: int) -> float:
    """The time of the first `each` questions of every task."""
    limited = replace(settings, limit=each)
    started = time.perf_counter()
    harness.run(lm, {"tasks": tasks, "groups": {}}, limited)
    return time.perf_counter() - started
