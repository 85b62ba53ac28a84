"""Turns conversations into prompts: the turns that an assistant is to answer, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import first_line
from ..sources import sources_of
from .calibration import conversation_of
from .reading import is_plain_text, open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    seed: int,
    split: str = "train",
    leave_out: range = range(0),
) -> Iterator[list[int]]:
    """Token ids of the turns of each conversation up to the last one of the user, and the beginning of an answer.

    Conversations come in the order of `load_calibration` with the same seed. One whose prompt has more than
    `max_length` tokens, or that no user takes part in, is passed over, and so are those whose number is in `leave_out`.

    Raises:
        ValueError: the source cannot be read or holds no conversations, or the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, which prompts are made with; leave out --self-generated")
    if len(sources_of(source)) > 1:
        raise ValueError(f"{source} is a mixture; --self-generated needs one source of conversations (--data)")
    if is_plain_text(source):
        raise ValueError(f"{source} is a text without prompts; --self-generated needs conversations (--data)")
    return _prompts_of(open_rows(source, split, "--data"), str(source), tokenizer, max_length, seed, leave_out)


def _prompts_of(
    rows: Sequence[dict[str, Any]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    leave_out: range,
) -> Iterator[list[int]]:
    order = np.random.default_rng(seed).permutation(len(rows))
    for number, i in enumerate(order.tolist()):
        if number in leave_out:
            continue
        try:
            text = _prompt(rows[i], tokenizer)
        except ValueError as error:
            raise ValueError(f"row {i + 1} of {source!r}: {error} (--self-generated, --data)") from error
        if text is None:
            continue

        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= max_length:
            yield ids


def _prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The turns up to the last one of the user, under the chat template; None where there is none."""
    messages = conversation_of(row)
    if messages is None:
        raise ValueError(f"it has the fields {', '.join(row)}, and prompts are made of `messages` or `conversations`")

    # Everything after the last question is left out: it is the answer that was given.
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is code of the model, which raises what it likes
        raise ValueError(f"the tokenizer's chat template refuses it: {first_line(error)}") from error
