"""Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.calibration import load_calibration
    from .distillation.run import distill, distill_checkpoint
    from .energies import estimate_energies, load_energies
    from .energies.gradients import Gradients, estimate_gradients
    from .energies.removals import Interactions, gauss_newton, measure_pairs
    from .evaluation.perplexity import perplexity, text_perplexity
    from .evaluation.tasks import evaluate
    from .model.blocks import find_blocks
    from .model.tracing import find_units
    from .problem import Block, Budget, RemovalProblem, Sublayer
    from .repairs.checkpoint import repair_checkpoint
    from .repairs.run import repair
    from .selection.select import select
    from .solvers import Spectrum, solve
    from .solvers.candidates import Candidate
    from .surgery.checkpoint import prune_checkpoint
    from .surgery.memory import remove_blocks
    from .surgery.sublayer_checkpoint import prune_sublayers
    from .training import DistillConfig

__version__ = "0.1.0"

# Where each public name lives; imported on first use, so that `import blockspin` does not wait for torch.
_HOME = {
    "Block": "problem",
    "Budget": "problem",
    "Sublayer": "problem",
    "find_blocks": "model.blocks",
    "find_units": "model.tracing",
    "load_calibration": "data.calibration",
    "Candidate": "solvers.candidates",
    "DistillConfig": "training",
    "distill": "distillation.run",
    "distill_checkpoint": "distillation.run",
    "estimate_energies": "energies",
    "Interactions": "energies.removals",
    "gauss_newton": "energies.removals",
    "load_energies": "energies",
    "measure_pairs": "energies.removals",
    "select": "selection.select",
    "perplexity": "evaluation.perplexity",
    "text_perplexity": "evaluation.perplexity",
    "Gradients": "energies.gradients",
    "estimate_gradients": "energies.gradients",
    "RemovalProblem": "problem",
    "Spectrum": "solvers",
    "solve": "solvers",
    "prune_checkpoint": "surgery.checkpoint",
    "prune_sublayers": "surgery.sublayer_checkpoint",
    "repair": "repairs.run",
    "repair_checkpoint": "repairs.checkpoint",
    "remove_blocks": "surgery.memory",
    "evaluate": "evaluation.tasks",
}

__all__ = [
    "Block",
    "Budget",
    "Candidate",
    "DistillConfig",
    "Gradients",
    "Interactions",
    "RemovalProblem",
    "Spectrum",
    "Sublayer",
    "distill",
    "distill_checkpoint",
    "estimate_energies",
    "estimate_gradients",
    "evaluate",
    "find_blocks",
    "find_units",
    "gauss_newton",
    "load_calibration",
    "load_energies",
    "measure_pairs",
    "perplexity",
    "prune_checkpoint",
    "prune_sublayers",
    "remove_blocks",
    "repair",
    "repair_checkpoint",
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
