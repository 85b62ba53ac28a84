"""Turns a dataset into a file of full token windows for training, so that no step is spent on padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..files import replacing
from ..progress import track
from .calibration import tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Windows(Dataset[dict[str, Tensor]]):
    """Rows of a file of token ids, read from disk as they are asked for: {"input_ids": (length,) int64}."""

    def __init__(self, path: str | Path, length: int) -> None:
        self.rows = np.memmap(path, dtype=np.int32, mode="r").reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[index].astype(np.int64))}


def write_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    length: int,
    limit: int,
    seed: int = 42,
    split: str = "train",
    leave_out: range = range(0),
    vocabulary: int | None = None,
    progress: bool = True,
) -> None:
    """Write at most `limit` windows of `length` tokens: the samples of the dataset one after another, each whole and
    followed by the tokenizer's end-of-sequence token, in an order fixed by the seed.

    A window may hold the end of one sample and the beginning of the next. The teacher sees the same, so its
    distribution is right for what the student sees.

    source: as in `load_calibration`; conversations get the chat template.
    leave_out: numbers of samples to leave out, in the order of `load_calibration` with the same seed.
    vocabulary: how many tokens the model has an embedding of; None: whatever the tokenizer gives.

    Raises:
        ValueError: the dataset cannot be read, gives tokens that the model does not know, or fills fewer than two
            windows.
    """
    tokenised = tokenise(
        source, tokenizer, length, seed=seed, split=split, vocabulary=vocabulary, truncate=False, option="--data"
    )
    samples = (sample for number, sample in enumerate(tokenised) if number not in leave_out)
    what = f"the dataset {str(source)!r}"
    write_packed(samples, what, path, length, limit, tokenizer.eos_token_id, progress=progress)


def write_packed(
    samples: Iterable[list[int]],
    what: str,
    path: str | Path,
    length: int,
    limit: int,
    separator: int | None,
    *,
    progress: bool = True,
) -> None:
    """Write at most `limit` windows of `length` tokens of the samples, see `pack`. what: what they are, for the error.

    Raises:
        ValueError: they fill fewer than two windows.
    """
    windows = islice(pack(samples, length, separator), limit)
    written = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        for window in track(windows, "Packing", limit, show=progress):
            file.write(np.array(window, dtype=np.int32).tobytes())
            written += 1

        if written < 2:
            raise ValueError(
                f"{what} fills {written} windows of {length} tokens; at least 2 are needed: to train and to validate "
                "on (--data, --max-length)"
            )


def pack(samples: Iterable[list[int]], length: int, separator: int | None) -> Iterator[list[int]]:
    """Samples one after another, cut into windows of `length` tokens; what is left at the end is dropped.

    separator: put after each sample that does not end with it.
    """
    tokens: list[int] = []
    for sample in samples:
        tokens += sample
        if separator is not None and sample[-1] != separator:
            tokens.append(separator)

        whole = len(tokens) // length * length  # tokens in full windows
        for start in range(0, whole, length):
            yield tokens[start : start + length]
        tokens = tokens[whole:]
