"""The text of a training: packed once into windows, the first of which are only measured. The teacher can write it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import Windows, write_packed, write_windows
from ..data.prompts import prompts
from ..files import write_json
from ..journal import check_settings
from ..model import fingerprint
from ..model.fingerprint import digest
from ..model.loading import load_config, vocabulary_size
from ..progress import console
from ..training import DistillConfig
from .cache import teachers_view
from .generation import generate_answers


class Samples(Dataset[dict[str, Tensor]]):
    """Samples in memory as the Trainer reads them."""

    def __init__(self, samples: Sequence[Tensor]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.samples[index]}


def packed(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    student: Path,
    leave_out: range,
    processes: int,
    load_teacher: Callable[[], PreTrainedModel],
) -> Windows:
    """The text in windows, written once to `folder`: that of the data, or the teacher's answers to its prompts."""
    path, settings_file = folder / "tokens.int32", folder / "settings.json"

    # Where the teacher's view is kept changes nothing of a training; how many tokens it has does.
    binding = replace(config, cache_teacher=None, top_k=config.compared_tokens)
    settings = {"student": str(student), **asdict(binding)}

    # The settings are written last: they say that the text beside them is whole, and that nothing was refused.
    if settings_file.is_file():
        check_settings(folder, "training", json.loads(settings_file.read_text()), settings)
        return Windows(path, config.max_length)

    step = config.batch_size * config.gradient_accumulation * processes  # windows
    limit = max(2, math.ceil(config.max_steps * step / (1 - config.validation_split)))
    if config.self_generated is None:
        model_config = load_config(student, trust_remote_code=config.trust_remote_code)
        write_windows(
            config.the_data,
            tokenizer,
            path,
            length=config.max_length,
            limit=limit,
            seed=config.seed,
            split=config.split,
            leave_out=leave_out,
            vocabulary=vocabulary_size(model_config),
        )
    else:
        answers = _answers(config, tokenizer, folder, leave_out, load_teacher)
        write_packed(answers, "the teacher's text", path, config.max_length, limit, tokenizer.eos_token_id)
    write_json(settings_file, settings)
    return Windows(path, config.max_length)


def _answers(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    leave_out: range,
    load_teacher: Callable[[], PreTrainedModel],
) -> list[list[int]]:
    """Prompts with the teacher's answers; those that are finished are kept in `folder`.

    Raises:
        ValueError: the data has no prompts, or the teacher does not generate.
    """
    assert config.self_generated is not None
    longest = config.max_length // 2  # tokens of a prompt
    asked = prompts(config.the_data, tokenizer, longest, seed=config.seed, split=config.split, leave_out=leave_out)
    chosen = list(islice(asked, config.self_generated))
    if not chosen:
        raise ValueError(f"{config.data} has no prompt of at most {longest} tokens (--self-generated, --max-length)")
    if len(chosen) < config.self_generated:
        console.print(f"The data has only {len(chosen)} of the {config.self_generated} prompts asked for; using all.")
    return generate_answers(
        load_teacher(), chosen, max_new_tokens=config.answer_tokens, seed=config.seed, partial=folder / "answers.jsonl"
    )


def cached(windows: Windows, config: DistillConfig, load_teacher: Callable[[], PreTrainedModel]) -> Dataset[Any]:
    """The windows with the teacher's view of them, which is kept in the folder of `--cache-teacher`."""
    assert config.cache_teacher is not None
    assert config.compared_tokens is not None
    original = fingerprint.of_model(config.the_teacher, trust_remote_code=config.trust_remote_code)
    teacher = digest([original, config.teacher_quantization])
    return teachers_view(
        windows, Path(config.cache_teacher), config.compared_tokens, config.temperature, teacher, load_teacher
    )


def divided(text: Dataset[Any], validation_split: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """What is trained on, and the first windows, on which the student is measured."""
    number = len(text)  # type: ignore[arg-type]
    held_out = max(1, round(number * validation_split))
    return Subset(text, range(held_out, number)), Subset(text, range(held_out))
