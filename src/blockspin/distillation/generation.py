"""What models go on with: the teacher's answers to prompts, and the student's own continuations of windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..journal import Journal
from ..model import fingerprint
from ..model.batches import frozen, input_device
from ..progress import track

AT_ONCE = 64  # texts that are continued side by side


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
    check_generates(model)
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


def continued(
    model: PreTrainedModel, rows: Sequence[Tensor], max_new_tokens: int, seed: int, batch_size: int = AT_ONCE
) -> list[list[int]]:
    """Each row of token ids with what the model draws after it, to its end token or for `max_new_tokens`."""
    result = []
    with frozen(model), torch.no_grad(), _seeded(seed, input_device(model)):
        for start in range(0, len(rows), batch_size):
            result += _continued(model, rows[start : start + batch_size], max_new_tokens)
    return result


def _continued(model: PreTrainedModel, rows: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
    """The rows side by side."""
    device, longest = input_device(model), max(map(len, rows))
    token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)  # padded on the left
    mask = torch.zeros_like(token_ids)
    for i, row in enumerate(rows):
        token_ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1

    end = end_tokens(model)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end or None,
        pad_token_id=end[0] if end else 0,
        use_cache=True,
    )
    found = model.generate(token_ids.to(device), attention_mask=mask.to(device), generation_config=settings)

    result = []
    for row, answer in zip(rows, found[:, longest:].tolist(), strict=True):
        ends = [position for position, token in enumerate(answer) if token in end]
        result.append([*row.tolist(), *(answer[: ends[0] + 1] if ends else answer)])
    return result


def check_generates(model: PreTrainedModel) -> None:
    """Refuse a model that cannot write text.

    Raises:
        ValueError: it cannot.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate text; leave out --self-generated and --on-policy")


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens after which a model's answer is whole."""
    found = model.generation_config.eos_token_id
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers depend on the seed alone; afterwards the generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
