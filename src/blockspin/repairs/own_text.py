"""Text that a model writes itself: it is of all the kinds that the model knows, and no data set is needed for it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..journal import Journal
from ..model import fingerprint
from ..model.generation import AT_ONCE, continued
from ..model.offload import is_offloaded

OWN_SHARE = 1 / 3  # of all text that a repair is fitted to
_TOKENS_AT_ONCE = 2**14  # whose keys and values are in memory


def own_share(model: nn.Module, wanted: float | None) -> float:
    """The share of the text for a repair that a model writes itself: `OWN_SHARE` by default, where it can."""
    if wanted is not None:
        return float(wanted)
    writes = isinstance(model, PreTrainedModel) and model.can_generate() and not is_offloaded(model)
    return OWN_SHARE if writes else 0.0


def own_text(
    model: PreTrainedModel,
    tokens: int,
    length: int,
    seed: int = 0,
    *,
    batch_size: int | None = None,
    partial: str | Path | None = None,
) -> list[Tensor]:
    """Samples of at least so many tokens in all, (tokens,) int64 each, that begin with a random token.

    Every further token is drawn from what the model predicts, at temperature 1, until it ends the text or has `length`
    tokens, two or more. Costs one to three forward passes over the tokens.

    seed: of the draws; on the same machine the same text comes out.
    batch_size: texts that are written side by side, whose keys and values are in memory; None: 16,384 tokens' at most.
    partial: a file that keeps what is written, so that the same call continues.

    Raises:
        ValueError: the file holds something else.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    journal = Journal(partial, fingerprint.of_results(model, [], "own text", tokens, length, seed, batch_size))
    together = batch_size or min(AT_ONCE, max(1, _TOKENS_AT_ONCE // length))
    written: list[list[int]] = []
    rounds = 0
    for entry in journal.entries():
        written += entry["rows"]
        rounds += 1

    while (missing := tokens - sum(map(len, written))) > 0:
        at_once = min(together, math.ceil(missing / length))
        drawn = seed + rounds
        starts = torch.randint(vocabulary, (at_once, 1), generator=torch.Generator().manual_seed(drawn))

        rows = continued(model, list(starts), length - 1, drawn, at_once)
        journal.append({"rows": rows})
        written += rows
        rounds += 1
    return list(map(torch.tensor, written))
