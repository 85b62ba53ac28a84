"""What a selection has measured: the objective of every removal, sample by sample, and what that has cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor, nn

from ..journal import Journal
from ..model import fingerprint
from ..model.batches import BatchSize
from ..model.known import FORMAT, KnownValues
from ..model.passes import num_passes, share_that_runs
from ..model.quality import MEASURES
from ..model.tracing import skipped, trace_model
from ..problem import Floats, Removal, Units
from ..scatter import standard_error

# "kl" and "loss" are measured on samples; a function is given the model with the blocks bypassed. Lower is better.
Objective = Literal["kl", "loss"] | Callable[[nn.Module], float]

_TINY = 1e-30  # KL divergences are not taken to be smaller, so that they have logarithms


class Ledger:
    """Measures removals on the first samples of a list, and remembers.

    partial: a file that keeps what was measured, so that the same selection continues where it was cut off. What a
        function returns is not kept: whether the next process has the same function cannot be known.

    units: what the numbers of a removal stand for.

    values: removal -> (number of samples it was measured on,) objective on each of the first samples.
    weights: (num_samples,) what each sample counts in a mean: its predicted tokens. A function has one value, and so
        one weight.
    logarithmic: whether changes are those of the logarithm: of KL divergences, which are positive and spread widely.
    passes: forward passes of the whole model over all samples that would cost as much as what was measured, whether
        it was measured now or is remembered.
    on_progress: is given `passes` whenever something was measured.

    Raises:
        ValueError: unknown objective, unusable model, or a partial file of another selection.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Tensor],
        objective: Objective = "kl",
        batch_size: BatchSize = "auto",
        partial: Path | None = None,
        units: Units = "blocks",
    ) -> None:
        if not callable(objective) and objective not in MEASURES:
            raise ValueError(f"objective {objective!r}: must be kl, loss or a function of a model (--objective)")
        self.values: dict[Removal, Floats] = {}
        self.weights = np.array([1.0] if callable(objective) else [len(sample) - 1.0 for sample in samples])
        self.logarithmic = objective == "kl"
        self.passes = 0.0
        self.on_progress: Callable[[float], None] | None = None

        self._traced = trace_model(model, units)
        self._started = time.perf_counter()
        self._objective = objective
        if not callable(objective):
            journal = Journal(partial, fingerprint.of_results(model, samples, objective, FORMAT, units))
            self._known = KnownValues(self._traced, samples, MEASURES[objective], journal, batch_size)

    @property
    def seconds(self) -> float:
        """Time since the ledger was opened."""
        return time.perf_counter() - self._started

    def extend(self, removals: Sequence[Removal], number: int) -> None:
        """Measure these removals on the first `number` samples, where that has not been done.

        Raises:
            ValueError: an objective is NaN or infinite.
        """
        # Those that were measured on as many samples so far are measured together, so that they share passes.
        groups: dict[int, list[Removal]] = {}
        for removed in dict.fromkeys(removals):
            groups.setdefault(len(self.values.get(removed, ())), []).append(removed)
        for have in sorted(groups):
            if have < number:
                self._measure(groups[have], have, number)

        if self.on_progress is not None:
            self.on_progress(self.passes)

    def mean(self, removed: Removal, number: int | None = None) -> float:
        """The token mean of the objective over the first so many samples, or all that the removal was measured on."""
        values = self.values[removed][:number]
        return float(np.average(values, weights=self.weights[: len(values)]))

    def difference(self, removed: Removal, reference: Removal) -> tuple[float, float]:
        """(mean, standard error) of objective minus that of a reference, on the samples both have; inf with one."""
        number = min(len(self.values[removed]), len(self.values[reference]))
        return self._mean_and_error(self.values[removed][:number] - self.values[reference][:number])

    def change(self, removed: Removal, reference: Removal) -> tuple[float, float]:
        """(change, standard error) from a reference to a removal, on the samples both have; inf with one.

        The difference of the objectives; of the KL divergences that of the logarithms of their means.
        """
        if not self.logarithmic:
            return self.difference(removed, reference)
        number = min(len(self.values[removed]), len(self.values[reference]))
        ours, theirs = (max(self.mean(blocks, number), _TINY) for blocks in (removed, reference))
        shares = self.values[removed][:number] / ours - self.values[reference][:number] / theirs
        return math.log(ours / theirs), self._mean_and_error(shares)[1]

    def standard_error(self, removed: Removal) -> float:
        """The standard error of `mean`, from the scatter between samples."""
        return self._mean_and_error(self.values[removed])[1]

    def best(self) -> Removal:
        """Of the removals that were measured on the most samples, the one of lowest objective."""
        return min(self.complete(), key=lambda removed: (self.mean(removed), removed))

    def complete(self) -> list[Removal]:
        """The removals that were measured on the most samples."""
        most = max(map(len, self.values.values()))
        return [removed for removed, values in self.values.items() if len(values) == most]

    def _mean_and_error(self, values: Floats) -> tuple[float, float]:
        """The weighted mean of the first samples' values, (number,), and its standard error."""
        weights = self.weights[: len(values)]
        error = standard_error(values, weights)
        if error is None:  # a function's value is exact, one of several samples says nothing of the others
            error = 0.0 if len(self.weights) == 1 else math.inf
        return float(np.average(values, weights=weights)), error

    def _measure(self, removals: Sequence[Removal], have: int, number: int) -> None:
        """Extend removals that all were measured on the first `have` samples."""
        if callable(self._objective):
            self.passes += sum(share_that_runs(self._traced, removed) for removed in removals)
            found = self._called(self._objective, removals)
        else:
            share = float(self.weights[have:number].sum() / self.weights.sum())
            self.passes += share * num_passes(self._traced, [(), *removals])
            found = self._known.of(removals, range(have, number))

        for removed, row in zip(removals, found, strict=True):
            before = self.values.get(removed, np.zeros(0))
            self.values[removed] = np.concatenate([before, row])

    def _called(self, objective: Callable[[nn.Module], float], removals: Sequence[Removal]) -> Floats:
        """(number of removals, 1): what a function returns for the model without each."""
        rows = []
        for removed in removals:
            with skipped(self._traced, removed):
                value = float(objective(self._traced.model))
            if not math.isfinite(value):
                raise ValueError(f"the objective without the blocks {removed} is {value}; it must be a finite number")
            rows.append([value])
        return np.array(rows)
