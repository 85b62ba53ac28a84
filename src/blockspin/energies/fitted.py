"""Energies fitted to removals of many blocks, on a logarithmic scale: they hold at the depths where they are used.

What a removal of many blocks costs is far from the sum of what single blocks cost, and far from what gradients at the
whole model say. Its logarithm is close to a quadratic form. Removals are measured on one sample each, at first random
ones that spare the blocks without which the model breaks, then the lowest of the form that fits what is known so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..journal import Journal
from ..model import fingerprint
from ..model.batches import BatchSize
from ..model.known import FORMAT
from ..model.passes import num_passes
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Budget, Floats, Goal, Removal, RemovalProblem, Units, check_goal
from ..progress import bar
from .design import affordable, any_number, lowest_removals, problems_for, random_removals, unmeasured_lowest
from .energies import Energies
from .measurements import SINGLES_SAMPLES, Measurements, logarithms
from .quadratic import QuadraticFit, fit_quadratic

PASSES_PER_BLOCK = 24  # forward passes over one sample, for each block of the model and one for the whole
MOST_CHECKS = 8  # of the lowest states at the end; one or two are enough as a rule
LEAST_TURN = 16  # passes of a turn at least: what a sample costs before anything is removed is then a small part


@dataclass(frozen=True, repr=False)
class Fitted(Energies):
    """Removals that were measured, and the quadratic form that fits the logarithms of their KL divergences.

    removed: (K, N), one row of zeros and ones for each measurement. sample: (K,), the sample it was made on.
    divergence: (K,), KL divergence from the whole model, nats a token. singles: (N,), the same without each block.
    ratio: that of `fit_quadratic`, where it is known already; not kept in the file.
    weight: (K,), how many samples each divergence is the mean of; None: one. Not kept in the file.
    """

    shapes: ClassVar[dict[str, tuple[str, ...]]] = {
        "removed": ("samples", "blocks"),
        "sample": ("samples",),
        "divergence": ("samples",),
        "singles": ("blocks",),
    }

    removed: NDArray[np.uint8]
    sample: NDArray[np.uint32]
    divergence: Floats
    singles: Floats
    blocks: tuple[Block, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    ratio: float | None = None
    weight: Floats | None = None

    @property
    def hessian(self) -> Floats:
        """(N, N): x^T hessian x orders removals as their expected log KL does, whatever their sizes.

        The fit's columns are a constant for each sample, the sum of the logarithms of the single removals, the number
        of blocks and its square. Except for the constants, all are quadratic forms, and so is their sum.
        """
        of_singles, of_number, of_square = self._fit.coefficients[-3:]
        n = len(self.blocks)
        linear = of_singles * logarithms(self.singles) + of_number / n  # (N,), the diagonal, as x_i^2 = x_i
        return np.asarray(self._fit.matrix + np.diag(linear) + of_square / n**2)

    def resampled(self, generator: np.random.Generator) -> Fitted:
        """As many measurements, drawn with replacement: one bootstrap replicate."""
        rows = generator.integers(0, len(self.sample), len(self.sample))
        return replace(
            self,
            removed=self.removed[rows],
            sample=self.sample[rows],
            divergence=self.divergence[rows],
            weight=None if self.weight is None else self.weight[rows],
            ratio=self._fit.ratio,
        )

    def extended(self, removed: NDArray[np.bool_], divergence: Floats, number: Floats) -> Fitted:
        """With further measurements, on samples of their own that all of them share: the form fits both.

        removed: (K', N). divergence: (K',), means over `number` (K',) samples each, up to a common factor.
        """
        ones, further = np.ones(len(self.sample)), np.full(len(removed), self.sample.max() + 1, dtype=np.uint32)
        return replace(
            self,
            removed=np.concatenate([self.removed, removed.astype(np.uint8)]),
            sample=np.concatenate([self.sample, further]),
            divergence=np.concatenate([self.divergence, divergence]),
            weight=np.concatenate([ones if self.weight is None else self.weight, number]),
            ratio=None,
        )

    @cached_property
    def _fit(self) -> QuadraticFit:
        samples = self.sample[:, None] == np.unique(self.sample)  # (K, number of samples)
        singles = self.removed @ logarithms(self.singles)  # (K,)
        share = self.removed.mean(axis=1)  # (K,), of the blocks
        basis = np.column_stack([samples, singles, share, share**2]).astype(np.float64)

        removed, values = self.removed.astype(np.bool_), logarithms(self.divergence)
        noise = None if self.weight is None else 1 / self.weight
        return fit_quadratic(removed, values, basis, noise=noise, blocks=self.blocks, ratio=self.ratio)


def fit_removals(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    goal: Goal | None = None,
    budgets: Sequence[Budget] = (),
    protect: Iterable[int] = (),
    passes: float | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    units: Units = "blocks",
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Fitted:
    """Measure removals of many blocks and fit a quadratic form to log KL: Q with the energy x^T Q x.

    First each single block is removed, on two samples. Then every sample has two turns, so that what is special about
    it cancels. In the first ones random removals are measured, in the second ones the lowest states of the form that
    fits all measurements so far, and of one fitted to a bootstrap replicate of them, which explores what is uncertain.
    At last what is lowest is measured where it has not been: far from everything measured a form can be far too low.

    samples: as many of them are used as have turns of `LEAST_TURN` passes at least.
    goal, budgets, protect: the form is made for removals that meet the goal and all budgets (weights of the units) and
        are not deeper than that takes; with neither, for those of an eighth to a half of the units, and what is lowest
        beyond is measured too, since budgets allow it. Protected units are in none of them.
    passes: forward passes over one sample, but for the last few; by default `PASSES_PER_BLOCK` for each block and one
        for the whole.
    batch_size: of the single removals; the others are measured on one sample at a time.
    units: what one spin stands for: a block, or each of its residual branches.
    partial: a file that keeps what was measured, so that the same call continues it.

    Raises:
        ValueError: unusable samples, model or number of passes, a goal that no removal meets, a divergence that is NaN
            or infinite, or a partial file of something else.
    """
    traced, protect = trace_model(model, units), tuple(protect)
    if goal is not None or budgets:
        check_goal(traced.units, goal, protect, budgets)

    budget = PASSES_PER_BLOCK * (traced.num_units + 1) if passes is None else passes
    used = _affordable_samples(samples, budget, traced.num_units)

    settings = ("fitted", FORMAT, budget, seed, goal, budgets, protect, units)
    identity = fingerprint.of_results(model, used, *settings)
    known = Measurements(traced, used, Journal(partial, identity), batch_size)
    problems = problems_for(traced.units, known.singles, goal, protect, budgets)
    checked = [*problems]
    if goal is None and not budgets:
        checked.append(any_number(traced.units, known.singles, protect))

    turns = _Turns(traced, problems, checked, known, budget, len(used), np.random.default_rng(seed))
    turns.take(progress)
    turns.measure_lowest()
    return replace(turns.energies(), metadata=metadata or {})


@dataclass(frozen=True)
class _Turns:
    """The two turns of every sample: random removals, then the lowest of what fits all measurements so far.

    checked: the problems whose lowest states must have been measured in the end.
    budget: passes over one sample of all turns and of the single removals before them.
    """

    traced: TracedModel
    problems: Sequence[RemovalProblem]
    checked: Sequence[RemovalProblem]
    known: Measurements
    budget: float
    num_samples: int
    generator: np.random.Generator

    def take(self, progress: bool) -> None:
        """Measure the removals of every turn."""
        known = self.known
        with bar(progress) as display:
            task = display.add_task("Removals", total=round(self.budget), completed=round(known.passes))
            plans = self.random_removals()
            known.prepare(plans)
            for sample, removals in enumerate(plans):
                known.add(removals, sample)
                display.update(task, completed=round(known.passes))

            for sample in range(self.num_samples):
                known.add(self.lowest_removals(self.num_samples - sample), sample)
                display.update(task, completed=round(known.passes))
            display.update(task, total=round(known.passes))  # less than the budget, where little is left to measure

    def random_removals(self) -> list[list[Removal]]:
        """Those of each sample's first turn."""
        plans = []
        spent = self.known.passes
        for turn in range(self.num_samples):
            # What a turn spends too much or too little, the others share.
            share = (self.budget - spent) / (2 * self.num_samples - turn)
            wanted = random_removals(self.problems, self.known.singles, self.generator)
            plans.append(affordable(self.traced, wanted, share))
            spent += num_passes(self.traced, [(), *plans[-1]])
        return plans

    def lowest_removals(self, turns_left: int) -> list[Removal]:
        """Those of a second turn: low states of the form that fits all so far, and of a bootstrap replicate's form."""
        best = self.energies()
        forms = [best.hessian, best.resampled(self.generator).hessian]
        wanted = lowest_removals(self.problems, forms, self.known, self.generator)
        share = (self.budget - self.known.passes) / turns_left
        return affordable(self.traced, wanted, share)

    def measure_lowest(self) -> None:
        """Measure the lowest states that have not been measured, until there are none."""
        for check in range(MOST_CHECKS):
            unseen = unmeasured_lowest(self.checked, self.energies().hessian, self.known)
            if not unseen:
                break
            self.known.add(unseen, check % self.num_samples)

    def energies(self) -> Fitted:
        """What fits everything measured so far."""
        return Fitted(*self.known.arrays(), self.known.singles, self.traced.units)


def _affordable_samples(samples: Sequence[Tensor], passes: float, num_units: int) -> Sequence[Tensor]:
    """As many of the samples as can have two turns of `LEAST_TURN` passes each after the single removals.

    Raises:
        ValueError: not even one can.
    """
    for_singles = SINGLES_SAMPLES * (num_units + 1)
    most = int((passes - for_singles) / (2 * LEAST_TURN))
    if most < 1 or not samples:
        least = for_singles + 2 * LEAST_TURN
        raise ValueError(f"passes={passes:g}, {len(samples)} samples: give at least {least} passes and one sample")
    return samples[:most]
