"""Calls EleutherAI's lm-evaluation-harness: finds its tasks, opens models for it, runs it."""

from __future__ import annotations

import difflib
import functools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import EvaluateConfig
from ..errors import first_line
from ..hub import use_hub
from ..memory import OutOfMemory, is_out_of_memory
from ..model.gguf import ordinary_source
from ..model.loading import load_as

FEWSHOT_SEED = 1234  # of the harness's command line
CPU_BATCH_SIZE = 8  # for "auto" where memory does not run out early


def find_tasks(names: Sequence[str], include_path: str | None) -> dict[str, dict[str, Any]]:
    """Load the tasks and their data: name -> {"tasks": {leaf name: task}, "groups": {name: group}}.

    Raises:
        ValueError: the harness is not installed, it has no such task, or a task's data cannot be loaded.
    """
    _prepare()
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; `lm_eval ls tasks` lists all"
            raise ValueError(f"lm-eval has no task {name!r} (--tasks){hint}")
    use_hub()
    return {name: _load(manager, name) for name in names}


def num_questions(found: Mapping[str, Mapping[str, Any]], limit: float | None) -> int:
    """The questions of what `find_tasks` found.

    limit: at most so many of each task, or a share of them below 1; None: all.
    """
    number = 0
    for loaded in found.values():
        for task in loaded["tasks"].values():
            size = len(task.eval_docs)
            if limit is not None:
                size = min(size, math.ceil(limit * size) if limit < 1 else int(limit))
            number += size
    return number


def open_model(model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> Any:
    """The model as the harness takes it: an `lm_eval.api.model.LM`.

    Raises:
        ValueError: the model cannot be opened, or the backend is not installed or wants a model on disk.
    """
    _prepare()
    if config.backend == "vllm":
        return _open_with_vllm(model, config)

    from lm_eval.models.huggingface import HFLM

    if not isinstance(model, PreTrainedModel):
        model = load_as(model, config)

    # On a GPU the harness finds out what fits into the memory.
    batch_size = config.batch_size
    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = CPU_BATCH_SIZE
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def run(lm: Any, loaded: Mapping[str, Any], config: EvaluateConfig, rollouts: int = 0) -> dict[str, Any]:
    """Run one entry of `find_tasks`; returns what `lm_eval.evaluate` returns, samples included.

    rollouts: answers sampled for each question with the settings' temperature and top-p; 0 is one greedy answer.

    Raises:
        ValueError: out of memory, the answers do not fit into the model's context, or rollouts of a task without them.
    """
    from lm_eval import evaluate

    for name, task in loaded["tasks"].items():
        _set_up(task, config, rollouts)
        _check_generation(lm, name, task, rollouts)

    torch.manual_seed(config.seed)
    with _explained_memory(config.batch_size), redirect_stdout(sys.stderr):
        results: dict[str, Any] = evaluate(
            lm,
            loaded,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
        )
    return results


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the model'} has no chat template; leave --apply-chat-template out"
        )


def version() -> str:
    """The version of the installed harness.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ValueError("tasks need the lm-evaluation-harness: pip install 'blockspin[eval]'") from None


def _prepare() -> None:
    """Check that the harness is installed, and keep everything but its errors and progress bars off the screen."""
    version()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: of the user's own alone where they are enough, because indexing all takes more than
    ten seconds."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"--include-path {include_path} is not a folder of task files")
        own = _indexed(include_path, False)
        if set(names) <= set(own.all_subtasks):
            return own
    return _indexed(include_path, True)


@functools.lru_cache(maxsize=4)
def _indexed(include_path: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task with its data."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        loaded: dict[str, Any] = manager.load([name])
    except ImportError as error:
        raise ValueError(f"task {name} needs a package that is not installed: {first_line(error)}") from error
    except (DatasetNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error).lower():
            remedy = "accept its terms on its page and log in with `hf auth login`"
        else:
            remedy = "download it where there is a network, or give local task files with --include-path"
        raise ValueError(f"the data of task {name} cannot be loaded ({first_line(error)}); {remedy}") from error
    return loaded


def _open_with_vllm(model: PreTrainedModel | str | Path, config: EvaluateConfig) -> Any:
    """The harness's own wrapper of vLLM."""
    from lm_eval.api.registry import get_model

    if isinstance(model, PreTrainedModel):
        raise ValueError("--backend vllm opens models from disk; save this one first, or use --backend hf")

    arguments = {
        "pretrained": str(ordinary_source(model)),
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_size": torch.cuda.device_count() if config.device_map == "auto" else 1,
        "batch_size": config.batch_size,
    }
    try:
        return get_model("vllm")(**arguments)
    except ModuleNotFoundError as error:
        raise ValueError(f"--backend vllm needs vLLM, which is not installed ({error}): pip install vllm") from error


def _set_up(task: Any, config: EvaluateConfig, rollouts: int) -> None:
    """Put the settings into a task, as the harness's command line does."""
    generation: dict[str, Any] = {}
    if config.max_gen_tokens is not None:
        generation["max_gen_toks"] = config.max_gen_tokens
    if rollouts:
        generation |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
        task.set_config("repeats", rollouts)
    if generation and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", generation, update=True)

    # A task that is made to have no examples keeps none.
    own = task.get_config("num_fewshot")
    if own != 0:
        asked = config.num_fewshot
        task.set_config("num_fewshot", (own or 0) if asked is None else asked)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _check_generation(lm: Any, name: str, task: Any, rollouts: int) -> None:
    """Refuse rollouts of a task that generates nothing, and answers that are longer than the model's context."""
    if task.OUTPUT_TYPE != "generate_until":
        if rollouts:
            raise ValueError(f"--rollouts needs tasks that generate text; {name} is {task.OUTPUT_TYPE}")
        return

    longest = task.config.generation_kwargs.get("max_gen_toks", lm.max_gen_toks)
    if longest >= lm.max_length:
        raise ValueError(
            f"{name} generates up to {longest} tokens, but the model's context holds {lm.max_length}; "
            "allow fewer with --max-gen-tokens"
        )


@contextmanager
def _explained_memory(batch_size: int | str) -> Iterator[None]:
    """Turn an error for want of memory into one with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = 1 if batch_size == "auto" else int(batch_size) // 2
        remedy = f"try --batch-size {smaller}" if smaller else "spread the model with --device-map auto"
        raise OutOfMemory(f"out of memory with --batch-size {batch_size}; {remedy}") from error
