"""The methods that block removal by binary optimisation is compared with, each written from its paper.

Every method returns a `Candidate` for a `RemovalProblem`, whose constraints (kinds, protected blocks, budgets) it
meets; the problem's energy plays no part in the choice and is only noted. The methods in `linear` choose nothing: they
repair a removal.
"""

from __future__ import annotations

from .linear import ghosted_layers, linear_patch, replaceme
from .merging import Merged, merge_windows, sliding_window_merging
from .scores import (
    Activations,
    angular_distance,
    block_influence,
    consecutive_run,
    iterative_block_influence,
    last_blocks,
    measure_activations,
    norm_ratio,
)
from .search import evopress, finercut, sleb
from .shortened import losses_without_each, shortened_llama, weight_importance

__all__ = [
    "Activations",
    "Merged",
    "angular_distance",
    "block_influence",
    "consecutive_run",
    "evopress",
    "finercut",
    "ghosted_layers",
    "iterative_block_influence",
    "last_blocks",
    "linear_patch",
    "losses_without_each",
    "measure_activations",
    "merge_windows",
    "norm_ratio",
    "replaceme",
    "shortened_llama",
    "sleb",
    "sliding_window_merging",
    "weight_importance",
]
