"""A few tokens on which models are compared: whether one computes what another does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import frozen, input_device

PROBE = (1, 2, 3, 4, 5, 6)  # token ids; any will do


def probe_ids(model: nn.Module) -> Tensor:
    """(1, 6) int64: the tokens, where the model takes them."""
    return torch.tensor([PROBE], device=input_device(model))


def probe_logits(model: nn.Module) -> Tensor:
    """(6, vocabulary) float32 on the host: what a model predicts for the tokens."""
    with frozen(model), torch.no_grad():
        logits: Tensor = model(input_ids=probe_ids(model), use_cache=False).logits[0]
    return logits.float().cpu()


def agree(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits are those that are expected, to a share of the largest; what is no number may be none in both."""
    rounding = tolerance * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=rounding, equal_nan=True)
