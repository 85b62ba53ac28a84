"""Text that a model writes itself: it is of all the kinds that the model knows, and no data set is needed for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..model.batches import frozen, input_device

_AT_ONCE = 64  # samples


def own_text(model: PreTrainedModel, tokens: int, length: int, seed: int = 0) -> list[Tensor]:
    """Samples of at least so many tokens in all, (tokens,) int64 each, that begin with a random token.

    Every further token is drawn from what the model predicts, at temperature 1, until it ends the text or has `length`
    tokens. Costs about one forward pass over the tokens.

    seed: of the draws; on the same machine the same text comes out.
    """
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_length=length,
        eos_token_id=ends,
        pad_token_id=0,
    )

    # Text after text until there is enough; they are drawn by a generator of their own.
    vocabulary = model.get_input_embeddings().num_embeddings
    samples: list[Tensor] = []
    with torch.random.fork_rng(), frozen(model), torch.no_grad():
        torch.manual_seed(seed)
        while sum(map(len, samples)) < tokens:
            start = torch.randint(vocabulary, (_AT_ONCE, 1)).to(input_device(model))
            written = model.generate(start, attention_mask=torch.ones_like(start), generation_config=how)
            for row in written.cpu():
                sample = row[: _end(row, ends)]
                if len(sample) > 1:  # one token predicts none
                    samples.append(sample)
    return samples


def _end(row: Tensor, ends: int | list[int] | None) -> int:
    """How many tokens of a sample are text, the one that ends it included. row: (length,)"""
    if ends is None:
        return len(row)
    found = torch.isin(row[1:], torch.tensor(ends)).nonzero()
    return int(found[0]) + 2 if len(found) else len(row)
