"""Turns a dataset (hub id or local file) into token samples, in an order fixed by a seed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import first_line
from ..progress import console, track
from ..sources import sources_of
from .reading import SOURCE, is_plain_text, open_rows, remedy, text_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    vocabulary: int | None = None,
    option: str = SOURCE,
    progress: bool = True,
) -> list[Tensor]:
    """Token samples from a dataset, drawn in an order fixed by the seed.

    A row is a conversation (`messages` with role and content, or `conversations` with from and value), to which the
    tokenizer's chat template is applied, or a `text`. Of a content that is a list of parts the texts are taken. Each
    row is cut to `max_length` tokens; rows that are empty (null, no turns) or of fewer than two tokens are passed over.
    A plain text file is cut into windows of `max_length` tokens instead. Of several sources, with commas between their
    names, each gives a sample in turn.

    Args:
        source: a hub id, or a local .json, .jsonl, .parquet, .csv or .txt file, also .gz or .xz, or a folder of them;
            several are mixed.
        tokenizer: the model's.
        num_samples: how many at most; where the source has fewer, all of them, with a warning.
        max_length: tokens of a sample at most.
        split: the split of a hub dataset.
        vocabulary: how many tokens the model has an embedding of; None: whatever the tokenizer gives.
        option: the command-line option that names the source, for errors.

    Returns:
        1-D int64 tensors of token ids, at least two each.

    Raises:
        ValueError: the source does not exist, is empty, lacks the fields, gives tokens that the model does not know, or
            num_samples or max_length is too small.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples} (--num-samples)")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length} (--max-length)")

    tokenised = tokenise(source, tokenizer, max_length, seed=seed, split=split, vocabulary=vocabulary, option=option)
    samples = []
    for ids in track(islice(tokenised, num_samples), "Tokenising", num_samples, show=progress):
        samples.append(torch.tensor(ids, dtype=torch.int64))

    if not samples:
        raise ValueError(f"the data {str(source)!r} has no sample of two or more tokens ({remedy(option)})")
    if len(samples) < num_samples:
        console.print(
            f"The data {str(source)!r} has only {len(samples)} of the {num_samples} samples asked for ({option}); "
            "using all.",
            soft_wrap=True,
            highlight=False,
        )
    return samples


def tokenise(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    seed: int,
    split: str,
    vocabulary: int | None = None,
    truncate: bool = True,
    option: str = SOURCE,
) -> Iterator[list[int]]:
    """Token ids of every sample of a dataset, at least two each; see `load_calibration`.

    truncate: cut each row to `max_length` tokens; a plain text file is cut into windows of this length in any case.
    The source is opened now, so that what is wrong with it is said before the first sample is asked for.
    """
    parts = []
    for name in sources_of(source):
        if is_plain_text(name):
            samples = _windows(_text_ids(Path(name), tokenizer, option), max_length, seed)
        else:
            rows = open_rows(name, split, option)
            samples = _row_ids(rows, name, tokenizer, max_length if truncate else None, seed, option)
        parts.append(_usable(samples, name, vocabulary))
    return _in_turns(parts)


def _in_turns(parts: Sequence[Iterator[list[int]]]) -> Iterator[list[int]]:
    """A sample of each in turn; where one has no more, of the others."""
    left = list(parts)
    while left:
        for part in list(left):
            sample = next(part, None)
            if sample is None:
                left.remove(part)
            else:
                yield sample


def _usable(samples: Iterator[list[int]], source: str | Path, vocabulary: int | None) -> Iterator[list[int]]:
    """The samples of two tokens or more. Raises ValueError for a token that the model has no embedding of."""
    for ids in samples:
        if len(ids) < 2:  # one token predicts none
            continue
        if vocabulary is not None and max(ids) >= vocabulary:
            raise ValueError(
                f"the tokenizer gives {str(source)!r} the token {max(ids)}, but the model knows only {vocabulary}: "
                "it is the tokenizer of another model; put the right one beside the weights"
            )
        yield ids


def row_to_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one row of a dataset; see `load_calibration` for the fields.

    A tokenizer without a chat template gets the turns separated by blank lines. A row that holds nothing has no text.

    Raises:
        ValueError: the row has none of the fields, they hold something else, or the chat template refuses it.
    """
    messages = conversation_of(row)
    if messages is not None:
        return _conversation(messages, tokenizer)
    text = row.get("text")
    if isinstance(text, str):
        return text
    if text is not None:
        raise ValueError(f"its `text` is {_shown(text)}; it must be a text")
    if not {"text", *_CONVERSATION_FIELDS}.isdisjoint(row):  # null, or a conversation without turns
        return ""
    raise ValueError(f"it has the fields {', '.join(row)}; it needs `messages`, `conversations` or `text`")


def conversation_of(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The turns of a row's conversation, each with role and content; None where it holds none.

    Raises:
        ValueError: the field of a conversation holds something else.
    """
    name = _conversation_field(row)
    if name is None:
        return None
    turns = row[name]
    if not isinstance(turns, list):
        raise ValueError(f"its `{name}` is {_shown(turns)}; it must be a list of turns")
    return [_message(turn) for turn in turns]


def _conversation_field(row: Mapping[str, Any]) -> str | None:
    """The field that holds the conversation of a row, if it has one."""
    return next((name for name in _CONVERSATION_FIELDS if row.get(name)), None)


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The turns under the chat template of the tokenizer."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join([message["content"] for message in messages])
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is code of the model, which raises what it likes
        raise ValueError(f"the tokenizer's chat template refuses it: {first_line(error)}") from error


def _message(turn: Any) -> dict[str, str]:
    """A turn in the form of the chat templates, from either of the usual forms."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"one of its turns is {_shown(turn)}; it must have role and content, or from and value")

    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list):  # of parts, each a text, an image, ...
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "\n".join(texts) if texts else None
    if not isinstance(role, str) or not isinstance(content, str):
        fields = ", ".join(turn)
        raise ValueError(
            f"one of its turns has the fields {fields}; it needs the texts role and content, or from and value"
        )
    return {"role": _ROLES.get(role, role), "content": content}


def _shown(value: Any) -> str:
    """A value as it is shown in an error: not all of a long one."""
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def _text_ids(path: Path, tokenizer: PreTrainedTokenizerBase, option: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(tokens,) of a whole text file, which is read and tokenised piece by piece: four bytes a token are held."""

    def tokens_of(text: str) -> list[int]:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)  # no word on its length
        found: list[int] = encoded["input_ids"]
        return found

    # Some tokenizers mark the start of what they are given (SentencePiece). Each piece but the first is given with the
    # character before it, whose own tokens are left out again.
    ids = array("i")
    before = ""
    for piece in text_pieces(path, option):
        known = len(tokens_of(before)) if before else 0
        ids.extend(tokens_of(before + piece)[known:])
        before = piece[-1]
    return np.asarray(ids, dtype=np.int32)  # the same memory


def _windows(ids: np.ndarray[Any, np.dtype[np.int32]], max_length: int, seed: int) -> Iterator[list[int]]:
    """Consecutive windows of the tokens, in seeded order."""
    starts = np.arange(0, len(ids), max_length)
    np.random.default_rng(seed).shuffle(starts)
    for start in starts.tolist():
        yield ids[start : start + max_length].tolist()


def _row_ids(
    rows: Sequence[dict[str, Any]],
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int,
    option: str,
) -> Iterator[list[int]]:
    """Token ids of the rows of a dataset, in seeded order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    for i in order.tolist():
        row = rows[i]
        try:
            text = row_to_text(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {i + 1} of the data {str(source)!r}: {error} ({option})") from error

        # A chat template writes the special tokens itself.
        by_template = bool(getattr(tokenizer, "chat_template", None)) and _conversation_field(row) is not None
        encoded = tokenizer(
            text,
            truncation=max_length is not None,
            max_length=max_length,
            add_special_tokens=not by_template,
            verbose=False,  # the tokenizer's warning on length does not apply
        )
        yield encoded["input_ids"]
