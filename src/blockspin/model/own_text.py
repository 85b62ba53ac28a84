"""Text that a model writes itself: it is of all the kinds that the model knows, and no data set is needed for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import replacing
from ..journal import Journal
from ..progress import bar
from . import fingerprint
from .generation import AT_ONCE, continued

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS_AT_ONCE = 2**14  # whose keys and values are in memory


def own_text(
    model: PreTrainedModel,
    tokens: int,
    length: int,
    seed: int = 0,
    *,
    batch_size: int | None = None,
    partial: str | Path | None = None,
    progress: bool = False,
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

    with bar(progress) as shown:
        task = shown.add_task("Writing tokens", total=tokens, completed=sum(map(len, written)))
        while (missing := tokens - sum(map(len, written))) > 0:
            at_once = min(together, math.ceil(missing / length))
            drawn = seed + rounds
            starts = torch.randint(vocabulary, (at_once, 1), generator=torch.Generator().manual_seed(drawn))

            rows = continued(model, list(starts), length - 1, drawn, at_once)
            journal.append({"rows": rows})
            written += rows
            rounds += 1
            shown.advance(task, sum(map(len, rows)))
    return list(map(torch.tensor, written))


def write_own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    tokens: int,
    length: int,
    seed: int = 0,
    *,
    progress: bool = True,
) -> int:
    """Write `own_text` to a file of JSON lines, a row with a `text` each, as `load_calibration` reads them.

    Until the file is whole, what is written is beside it, from which the same call continues.

    Returns:
        How many rows the file has; texts of which nothing is left without special tokens have none.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial.jsonl")
    samples = own_text(model, tokens, length, seed, partial=partial, progress=progress)

    texts = tokenizer.batch_decode([sample.tolist() for sample in samples], skip_special_tokens=True)
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts if text.strip()]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    partial.unlink()
    return len(rows)
