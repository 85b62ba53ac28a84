"""What predicts the loss of a model without some blocks: the energies by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial as with_arguments
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import GRADIENT_ENERGIES
from ..model.batches import BatchSize
from ..problem import Budget, Goal, Units, goal_name
from .energies import Energies
from .fitted import fit_removals
from .gradients import estimate_gradients
from .removals import gauss_newton, measure_pairs

__all__ = ["ENERGIES", "Energies", "estimate_energies", "load_energies"]

# What the quadratic form of the energy is made of; docs/choosing_an_energy.md compares them.
ENERGIES: dict[str, Callable[..., Energies]] = {
    "fitted": fit_removals,
    "secant": gauss_newton,
    "pairwise": measure_pairs,
    "gauss-newton": with_arguments(gauss_newton, step=0.05),
    "fisher": with_arguments(estimate_gradients, labels="model"),
    "empirical-fisher": estimate_gradients,
}


def estimate_energies(
    energy: str,
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    batch_size: BatchSize = "auto",
    units: Units = "blocks",
    goal: Goal | None = None,
    budgets: Sequence[Budget] = (),
    protect: Iterable[int] = (),
    gradient_checkpointing: bool = False,
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Energies:
    """The energies of a model by the name of their kind, one of `ENERGIES`.

    units: what one spin stands for: a block, or each of its residual branches.
    goal, budgets, protect: what the energies are for. Only `fitted` ones need to know: for one goal they are more
        accurate than for all, and their metadata record it. With neither goal nor budgets: any number of blocks.

    Raises:
        ValueError: unknown name, unusable samples or model, or a partial file of something else.
    """
    if energy not in ENERGIES:
        raise ValueError(f"unknown energy {energy!r}; choose one of {', '.join(ENERGIES)} (--energy)")

    # Only gradients have a backward pass, in which memory can be saved; only fitted forms are made for a goal.
    options: dict[str, Any] = {}
    about = {**(metadata or {}), "energy": energy}
    if energy in GRADIENT_ENERGIES:
        options["gradient_checkpointing"] = gradient_checkpointing
    elif energy == "fitted" and (goal is not None or budgets):
        options |= {"goal": goal, "budgets": budgets, "protect": protect}
        about["goal"] = goal_name(goal, budgets)
    return ENERGIES[energy](
        model,
        samples,
        batch_size=batch_size,
        units=units,
        partial=partial,
        metadata=about,
        progress=progress,
        **options,
    )


def load_energies(path: str | Path) -> Energies:
    """The energies in a file, of whatever kind.

    Raises:
        ValueError: there is no such file, it is truncated, or it holds something else.
    """
    return Energies.load(path)
