"""The text that `real_model.py` measures on: what is held out, the samples of each draw, and what is repaired with."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockspin.data.calibration import tokenise
from blockspin.model.own_text import own_text

FIT_SAMPLES, CHOICE_SAMPLES = 16, 16
SHARE = FIT_SAMPLES + CHOICE_SAMPLES  # of a draw
HELD_OUT_LENGTH = 128  # tokens
WINDOWS = 8  # of one length, taken from one text
WRITTEN = 8  # times as many tokens as are wanted

Texts = dict[str, list[Tensor]]


def read(
    arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Texts, list[list[Tensor]], list[Tensor]]:
    """What is held out, the samples of each draw, and what is repaired with.

    Of the conversations the first are held out, each draw takes the next, and what comes after is for the repair.
    """
    number, share = arguments.held_out, SHARE * (1 + max(arguments.draws))
    more = arguments.repair_tokens // HELD_OUT_LENGTH if "repaired" in arguments.parts else 0
    chat = windows(arguments.chat, tokenizer, HELD_OUT_LENGTH, number + share + more)
    held_out = {"chat": chat[:number], "text": windows(arguments.text, tokenizer, HELD_OUT_LENGTH, number)}
    other = []
    if arguments.calibration_text:
        other = windows(arguments.calibration_text, tokenizer, HELD_OUT_LENGTH, share + more)

    mixtures = {"chat": [chat[number:]], "text": [other], "mix": [chat[number:], other], "own": [chat[number:]]}
    kinds = [[sample[: arguments.length] for sample in samples] for samples in mixtures[arguments.calibration]]
    if arguments.calibration == "own":
        kinds.append(written(model, share // 2, arguments.length))
    draws = draws_of(kinds, 1 + max(arguments.draws))

    left = [samples for samples in (chat[number + share :], other[share:]) if samples]
    each = arguments.repair_tokens // HELD_OUT_LENGTH // max(1, len(left))
    repairing = [sample for group in zip(*left, strict=False) for sample in group][: each * len(left)]
    return held_out, draws, repairing


def windows(source: str, tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> list[Tensor]:
    """(length,) token ids each: the beginnings of texts that are long enough, then later parts of the same texts."""
    cut: list[list[Tensor]] = []
    for ids in tokenise(source, tokenizer, length, seed=0, split="train", truncate=False):
        starts = np.linspace(0, len(ids) - length, WINDOWS).astype(np.int64) if len(ids) >= WINDOWS * length else [0]
        if len(ids) >= length:
            cut.append([torch.tensor(ids[start : start + length]) for start in starts])
    in_turn = [text[k] for k in range(WINDOWS) for text in cut if k < len(text)]
    return in_turn[:number]


def written(model: PreTrainedModel, number: int, length: int) -> list[Tensor]:
    """(length,) token ids each, that the model writes itself; of its texts many end earlier."""
    whole = [row for row in own_text(model, WRITTEN * number * length, length) if len(row) == length]
    return whole[:number]


def draws_of(kinds: list[list[Tensor]], number: int) -> list[list[Tensor]]:
    """The samples of each draw, as many of each kind, in turns."""
    each = SHARE // len(kinds)
    result = []
    for draw in range(number):
        parts = [samples[draw * each : (draw + 1) * each] for samples in kinds]
        result.append([sample for group in zip(*parts, strict=True) for sample in group])
    return result
