"""A dataset (hub id or local file) to seeded token samples."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import first_line
from ..progress import console, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}  # ending -> what opens the file
_CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def load_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int = 2048,
    max_length: int = 1024,
    seed: int = 42,
    split: str = "train",
    progress: bool = True,
) -> list[Tensor]:
    """Token samples from a dataset, drawn in an order fixed by the seed.

    A row is a conversation (`messages` with role and content, or `conversations` with from and value), to which the
    tokenizer's chat template is applied, or a `text`. Each is cut to `max_length` tokens; rows of fewer than two tokens
    are passed over. A plain text file is cut into windows of `max_length` tokens instead.

    Args:
        source: a hub id, or a local .json, .jsonl, .parquet, .csv or .txt file, also .gz or .xz, or a folder of them.
        tokenizer: the model's.
        num_samples: how many at most; where the source has fewer, all of them, with a warning.
        max_length: tokens of a sample at most.
        split: the split of a hub dataset.

    Returns:
        1-D int64 tensors of token ids, at least two each.

    Raises:
        ValueError: the source does not exist, is empty, lacks the fields, or num_samples or max_length is too small.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples} (--num-samples)")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length} (--max-length)")

    tokenised = islice(tokenise(source, tokenizer, max_length, seed=seed, split=split), num_samples)
    samples = []
    for ids in track(tokenised, "Tokenising", num_samples, show=progress):
        samples.append(torch.tensor(ids, dtype=torch.int64))

    if not samples:
        raise ValueError(f"the calibration set {str(source)!r} has no sample of two or more tokens (--calibration)")
    if len(samples) < num_samples:
        console.print(f"The calibration set has only {len(samples)} samples of the {num_samples} asked for; using all.")
    return samples


def tokenise(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    seed: int,
    split: str,
    truncate: bool = True,
) -> Iterator[list[int]]:
    """Token ids of every sample of a dataset, at least two each; see `load_calibration`.

    truncate: cut each row to `max_length` tokens; a plain text file is cut into windows of this length in any case.
    """
    path = Path(source)
    if _format(path) == ".txt":
        samples = _windows(_read_text(path), tokenizer, max_length, seed)
    else:
        samples = _rows(source, split, tokenizer, max_length if truncate else None, seed)
    for ids in samples:
        if len(ids) >= 2:  # one token predicts none
            yield ids


def row_to_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one row of a dataset; see `load_calibration` for the fields.

    A tokenizer without a chat template gets the turns separated by blank lines.

    Raises:
        ValueError: the row has none of the fields.
    """
    for name in _CONVERSATION_FIELDS:
        if row.get(name):
            messages = list(map(_message, row[name]))
            if getattr(tokenizer, "chat_template", None):
                return str(tokenizer.apply_chat_template(messages, tokenize=False))
            return "\n\n".join([message["content"] for message in messages])
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise ValueError(
        f"the calibration set has the fields {', '.join(row)}; it needs `messages`, `conversations` or `text` "
        "(--calibration)"
    )


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    """A turn in the form of the chat templates, from either of the usual forms."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise ValueError(f"a turn has the fields {', '.join(turn)}; it needs role and content, or from and value")
    return {"role": _ROLES.get(role, role), "content": content}


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> Iterator[list[int]]:
    """Consecutive windows of the text, in seeded order."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose=False: no warning on length
    starts = np.arange(0, len(ids), max_length)
    np.random.default_rng(seed).shuffle(starts)
    for start in starts.tolist():
        yield ids[start : start + max_length]


def _rows(
    source: str | Path, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None, seed: int
) -> Iterator[list[int]]:
    """Token ids of the rows of a dataset, in seeded order."""
    dataset = _open_dataset(source, split)
    order = np.random.default_rng(seed).permutation(len(dataset))
    for i in order.tolist():
        row = dataset[i]
        text = row_to_text(row, tokenizer)
        # A chat template writes the special tokens itself.
        by_template = bool(getattr(tokenizer, "chat_template", None)) and "text" not in row
        encoded = tokenizer(
            text,
            truncation=max_length is not None,
            max_length=max_length,
            add_special_tokens=not by_template,
            verbose=False,  # the tokenizer's warning on length does not apply
        )
        yield encoded["input_ids"]


def _format(path: Path) -> str:
    """The ending that says what is in a file, whether it is compressed or not."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def _open_dataset(source: str | Path, split: str) -> Any:
    import datasets

    path = Path(source)
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path), split=split)
        if not path.is_file():
            return datasets.load_dataset(str(source), split=split)
        if _format(path) not in _FORMATS:
            raise ValueError(f"its ending must be one of {', '.join([*_FORMATS, '.txt'])}, also with .gz or .xz")
        return datasets.load_dataset(_FORMATS[_format(path)], data_files=str(path), split="train")
    except Exception as error:  # datasets raises errors of many kinds, some of its own, for data that cannot be read
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"cannot read the calibration set {str(source)!r}: {reason} (--calibration)") from error


def _read_text(path: Path) -> str:
    open_text = _COMPRESSED.get(path.suffix, open)
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read the calibration set {str(path)!r}: {error} (--calibration)") from error
