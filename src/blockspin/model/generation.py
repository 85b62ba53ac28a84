"""What a model goes on with: text drawn from its own predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .batches import frozen, input_device

AT_ONCE = 64  # texts that are continued side by side


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
        repetition_penalty=1.0,
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


def check_generates(model: PreTrainedModel, remedy: str) -> None:
    """Refuse a model that cannot write text.

    Raises:
        ValueError: it cannot; says what to do instead.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate text; {remedy}")


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
