"""Scores models on the tasks of the lm-evaluation-harness; each result is kept on disk once it is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import CompressConfig, EvaluateConfig, TaskSettings
from ..files import write_json
from ..model import fingerprint
from ..model.blocks import check_model
from ..model.loading import load_tokenizer
from ..processes import from_main, gathered, share
from ..progress import console
from . import harness
from .scores import Score, extract_scores

Scorer = Callable[[Any], tuple[Score, ...]]  # of a model in memory, on the tasks of a run

_DECIDING = ("limit", "num_fewshot", "apply_chat_template", "backend", "max_gen_tokens", "dtype")
_KEPT = ("results", "versions", "n-shot", "n-samples", "configs")  # of what the harness returns


def evaluate(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> list[Score]:
    """Score a model on tasks of EleutherAI's lm-evaluation-harness (extra `eval`).

    model: in memory, a local folder or a hub id. tasks: tasks or groups of the harness, default those of the paper.
    tokenizer: default that of the folder or hub id the model was loaded from.
    settings: those of `blockspin.config.EvaluateConfig`: limit=100, num_fewshot=5, rollouts={"aime25": 10}, ...

    Returns a score for each task in order; groups that the harness does not aggregate give one for each member.

    Raises:
        ValueError: the harness is missing, a task is unknown or its data cannot be had, there is no chat template
            though one is asked for, memory runs out, or the model is compiled, or no language model of transformers.
    """
    return evaluate_tasks(model, EvaluateConfig(tasks=tuple(tasks), **settings), tokenizer)


def evaluate_tasks(
    model: PreTrainedModel | str | Path, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Score]:
    """As `evaluate`, with the settings as one value."""
    if isinstance(model, nn.Module):
        check_model(model)
    if tokenizer is None:
        source = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)

    # Only the tasks whose results are not kept on disk need the model.
    files = result_files(model, tokenizer, config)
    known = from_main(lambda: _read_all(files))
    missing = [task for task in config.tasks if task not in known]
    if missing:
        loaded = check_tasks(missing, config, tokenizer)
        lm = harness.open_model(model, tokenizer, config)

    # Several processes share the tasks.
    found = gathered(_score(lm, loaded.pop(task), task, config) for task in share(missing))
    for number, (task, (scores, results)) in enumerate(zip(missing, found, strict=True), 1):
        known[task] = scores
        for score in known[task]:
            console.print(f"{score.task} {score.as_text()}, task {number} of {len(missing)}", highlight=False)
        if task in files:
            from_main(partial(_write, files[task], scores, results))

    in_order = []
    for task in config.tasks:
        in_order += known[task]
    return in_order


def check_tasks(
    tasks: Sequence[str], config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Refuse what cannot be scored before any model is loaded; returns what `harness.find_tasks` found.

    Raises:
        ValueError: the harness is missing, a task is unknown or its data cannot be had, or there is no chat template.
    """
    if config.apply_chat_template:
        harness.check_chat_template(tokenizer)
    return harness.find_tasks(tasks, config.include_path)


def scorer(config: CompressConfig, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Scorer:
    """A function that scores models on the tasks of a run; the tasks are checked now. Without tasks it returns nothing.

    Raises:
        ValueError: as `check_tasks`.
    """
    if not config.tasks:
        return lambda model: ()

    shared = {f.name: getattr(config, f.name) for f in fields(TaskSettings)}
    settings = EvaluateConfig(**shared, cache=str(cache), trust_remote_code=config.trust_remote_code)
    check_tasks(settings.tasks, settings, tokenizer)
    return lambda model: tuple(evaluate_tasks(model, settings, tokenizer))


def result_files(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig
) -> dict[str, Path]:
    """Task -> the file of its result, named by the task and a digest of everything that decides the result.

    Empty where the settings keep no results.
    """
    if config.cache is None:
        return {}

    shared = {
        "model": fingerprint.of_model(model, trust_remote_code=config.trust_remote_code),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "task files": fingerprint.of_folder(config.include_path) if config.include_path else None,
        "harness": harness.version(),
        "gpu": torch.cuda.is_available(),
        **{name: getattr(config, name) for name in _DECIDING},
    }
    if config.quantization is not None:
        shared["quantization"] = config.quantization

    files = {}
    for task in config.tasks:
        rollouts = dict(config.rollouts).get(task, 0)
        sampling = (rollouts, config.temperature, config.top_p, config.seed) if rollouts else 0
        key = fingerprint.digest({**shared, "task": task, "sampling": sampling})
        files[task] = Path(config.cache) / f"{Path(task).stem}-{key}.json"
    return files


def _read_all(files: Mapping[str, Path]) -> dict[str, list[Score]]:
    """The scores of every task that has its file."""
    return {task: _read(file) for task, file in files.items() if file.is_file()}


def _write(file: Path, scores: Sequence[Score], results: dict[str, Any]) -> None:
    write_json(file, {"scores": list(map(Score.as_json, scores)), "results": results})


def _read(file: Path) -> list[Score]:
    """The scores in the file of a result."""
    try:
        return list(map(Score.from_json, json.loads(file.read_text())["scores"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a result of blockspin; remove it, or choose another folder (--cache)"
        ) from error


def _score(lm: Any, loaded: dict[str, Any], task: str, config: EvaluateConfig) -> tuple[list[Score], dict[str, Any]]:
    """The scores, and the harness's own results that they come from."""
    rollouts = dict(config.rollouts).get(task, 0)
    results = harness.run(lm, loaded, config, rollouts)
    scores = extract_scores(results, loaded, task, rollouts)

    # As they will be read back: what JSON does not know becomes text.
    kept = {name: results[name] for name in _KEPT}
    return scores, json.loads(json.dumps(kept, default=str))
