"""How much of the text for a repair the original writes itself."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..model.offload import is_offloaded

OWN_SHARE = 1 / 3  # of all text that a repair is fitted to


def own_share(model: nn.Module, wanted: float | None) -> float:
    """The share of the text for a repair that a model writes itself: `OWN_SHARE` by default, where it can."""
    if wanted is not None:
        return float(wanted)
    writes = isinstance(model, PreTrainedModel) and model.can_generate() and not is_offloaded(model)
    return OWN_SHARE if writes else 0.0
