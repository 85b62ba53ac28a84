"""What predicts the loss of a model without some blocks: the energies by name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..config import ENERGY_NAMES
from ..model.batches import BatchSize
from ..problem import Budget, Goal, Units, goal_name
from .energies import Energies, read_energies
from .fitted import Fitted, fit_removals
from .gradients import Gradients, estimate_gradients
from .removals import Interactions, gauss_newton, measure_pairs

__all__ = ["Energies", "estimate_energies", "load_energies"]

KINDS: tuple[type[Energies], ...] = (Fitted, Interactions, Gradients)  # what a file may hold
DERIVATIVE_STEP = 0.05  # of a gate, for the usual Gauss-Newton matrix


class Estimator(Protocol):
    """What makes energies, of whatever kind."""

    def __call__(
        self,
        model: nn.Module,
        samples: Sequence[Tensor],
        *,
        batch_size: BatchSize,
        units: Units,
        partial: str | Path | None,
        metadata: dict[str, str] | None,
        progress: bool,
    ) -> Energies: ...


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
    """The energies of a model by the name of their kind, one of `ENERGY_NAMES`.

    docs/choosing_an_energy.md compares them.

    units: what one spin stands for: a block, or each of its residual branches.
    goal, budgets, protect: what the energies are for. Only `fitted` ones need to know: for one goal they are more
        accurate than for all, and their metadata record it. With neither goal nor budgets: any number of blocks.
    gradient_checkpointing: of `estimate_gradients`; the other energies have no backward pass.

    Raises:
        ValueError: unknown name, unusable samples or model, or a partial file of something else.
    """
    about = {**(metadata or {}), "energy": energy}
    estimate: Estimator
    match energy:
        case "fitted":
            estimate = functools.partial(fit_removals, goal=goal, budgets=budgets, protect=protect)
            if goal is not None or budgets:
                about["goal"] = goal_name(goal, budgets)
        case "secant":
            estimate = gauss_newton
        case "pairwise":
            estimate = measure_pairs
        case "gauss-newton":
            estimate = functools.partial(gauss_newton, step=DERIVATIVE_STEP)
        case "fisher":
            estimate = functools.partial(
                estimate_gradients, labels="model", gradient_checkpointing=gradient_checkpointing
            )
        case "empirical-fisher":
            estimate = functools.partial(estimate_gradients, gradient_checkpointing=gradient_checkpointing)
        case _:
            raise ValueError(f"unknown energy {energy!r}; choose one of {', '.join(ENERGY_NAMES)} (--energy)")

    return estimate(
        model, samples, batch_size=batch_size, units=units, partial=partial, metadata=about, progress=progress
    )


def load_energies(path: str | Path) -> Energies:
    """The energies in a file, of whatever kind.

    Raises:
        ValueError: there is no such file, it is truncated, or it holds something else.
    """
    return read_energies(path, KINDS, "energies")
