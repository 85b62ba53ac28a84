"""Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import Block, find_blocks
    from .calibration import load_calibration
    from .candidates import Candidate
    from .config import DistillConfig
    from .distillation import distill, distill_checkpoint
    from .energies import estimate_energies
    from .evaluation import perplexity, text_perplexity
    from .hessian import Gradients, estimate_gradients
    from .interactions import Interactions, gauss_newton, load_energies, measure_pairs
    from .problem import RemovalProblem
    from .selection import select
    from .solvers import Spectrum, solve
    from .surgery import prune_checkpoint, remove_blocks
    from .tasks import evaluate

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import blockspin` does not wait for torch.
_HOME = {
    "Block": "blocks",
    "find_blocks": "blocks",
    "load_calibration": "calibration",
    "Candidate": "candidates",
    "DistillConfig": "config",
    "distill": "distillation",
    "distill_checkpoint": "distillation",
    "estimate_energies": "energies",
    "Interactions": "interactions",
    "gauss_newton": "interactions",
    "load_energies": "interactions",
    "measure_pairs": "interactions",
    "select": "selection",
    "perplexity": "evaluation",
    "text_perplexity": "evaluation",
    "Gradients": "hessian",
    "estimate_gradients": "hessian",
    "RemovalProblem": "problem",
    "Spectrum": "solvers",
    "solve": "solvers",
    "prune_checkpoint": "surgery",
    "remove_blocks": "surgery",
    "evaluate": "tasks",
}

__all__ = [
    "Block",
    "Candidate",
    "DistillConfig",
    "Gradients",
    "Interactions",
    "RemovalProblem",
    "Spectrum",
    "distill",
    "distill_checkpoint",
    "estimate_energies",
    "estimate_gradients",
    "evaluate",
    "find_blocks",
    "gauss_newton",
    "load_calibration",
    "load_energies",
    "measure_pairs",
    "perplexity",
    "prune_checkpoint",
    "remove_blocks",
    "select",
    "solve",
    "text_perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'blockspin' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
