"""The text of a training: packed once into windows, the first of which are only measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from ..config import DistillConfig
from ..data.packing import Windows, write_windows
from ..files import write_json
from ..journal import check_settings
from ..model.loading import load_config, vocabulary_size


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
) -> tuple[Dataset[Any], Dataset[Any]]:
    """The packed text, written once: what is trained on, and the first windows, on which the student is measured."""
    path, settings_file = folder / "tokens.int32", folder / "settings.json"
    settings = {"student": str(student), **asdict(config)}

    # The settings are written last: they say that the text beside them is whole, and that nothing was refused.
    if settings_file.is_file():
        check_settings(folder, "training", json.loads(settings_file.read_text()), settings)
    else:
        step = config.batch_size * config.gradient_accumulation * processes  # windows
        model_config = load_config(student, trust_remote_code=config.trust_remote_code)
        write_windows(
            config.data or "",
            tokenizer,
            path,
            length=config.max_length,
            limit=max(2, math.ceil(config.max_steps * step / (1 - config.validation_split))),
            seed=config.seed,
            split=config.split,
            leave_out=leave_out,
            vocabulary=vocabulary_size(model_config),
        )
        write_json(settings_file, settings)

    windows = Windows(path, config.max_length)
    held_out = max(1, round(len(windows) * config.validation_split))
    return Subset(windows, range(held_out, len(windows))), Subset(windows, range(held_out))
