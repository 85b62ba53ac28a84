"""The teacher's answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..journal import Journal
from ..model import fingerprint
from ..model.generation import AT_ONCE, check_generates, continued
from ..progress import track


def generate_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = AT_ONCE,
    partial: str | Path | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """Each prompt and the model's answer to it, drawn from its own distribution: text to distil on that the teacher
    itself would write (arXiv 1606.07947, section 3.2).

    prompts: token ids. An answer ends with the model's end token, or after `max_new_tokens`.
    partial: a file that keeps finished answers, so that the same call continues; the answers are the same.

    Raises:
        ValueError: the model does not generate, or the file holds something else.
    """
    check_generates(model, "leave out --self-generated")
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    journal = Journal(partial, fingerprint.of_results(model, rows, "answers", max_new_tokens, seed, batch_size))

    # Prompts of similar length side by side, the longest first, so that memory runs out early.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = [entry["rows"] for entry in journal.entries()]
    rest = range(len(done), len(groups))
    for number in track(rest, "Answering", len(groups), done=len(done), show=progress):
        found = continued(model, [rows[i] for i in groups[number]], max_new_tokens, seed + number, batch_size)
        journal.append({"rows": found})
        done.append(found)

    answers: list[list[int]] = [[]] * len(rows)
    for group, found in zip(groups, done, strict=True):
        for i, row in zip(group, found, strict=True):
            answers[i] = row
    return answers
