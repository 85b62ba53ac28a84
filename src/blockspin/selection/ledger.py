"""What a selection has measured: the objective of every removal, sample by sample, and what that has cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from ..files import write_json
from ..model import fingerprint
from ..model.passes import num_passes, share_that_runs
from ..model.quality import kl, loss, measured
from ..model.tracing import skipped, trace_model
from ..problem import Removal

Floats = NDArray[np.float64]
# "kl" and "loss" are measured on samples; a function is given the model with the blocks bypassed. Lower is better.
Objective = Literal["kl", "loss"] | Callable[[nn.Module], float]


@dataclass
class Ledger:
    """Measures removals on the first samples of a list, and remembers.

    values: removal -> (number of samples it was measured on,) objective on each of the first samples.
    passes: forward passes of the whole model over all samples that would cost as much as what was measured.
    path: a file that keeps the values, so that the same selection continues where it was cut off.
    """

    model: nn.Module
    samples: Sequence[Tensor]
    objective: Objective = "kl"
    batch_size: int = 8
    path: Path | None = None
    values: dict[Removal, Floats] = field(default_factory=dict)
    passes: float = 0.0
    bar: tuple[Progress, TaskID] | None = None

    def __post_init__(self) -> None:
        if callable(self.objective):
            weights = [1.0]
        elif self.objective in ("kl", "loss"):
            weights = [float(len(sample) - 1) for sample in self.samples]
        else:
            raise ValueError(f"objective {self.objective!r}: must be kl, loss or a function of a model (--objective)")
        self.weights = np.array(weights)
        self._traced = trace_model(self.model)
        self._started = time.perf_counter()
        self._known: dict[Removal, Floats] = {}
        self._identity = fingerprint.of_results(self.model, self.samples, str(self.objective))
        if self.path is not None and self.path.is_file():
            stored = json.loads(self.path.read_text())
            if stored["fingerprint"] == self._identity:
                self._known = {tuple(json.loads(k)): np.array(v) for k, v in stored["values"].items()}

    @property
    def seconds(self) -> float:
        """Time since the ledger was opened."""
        return time.perf_counter() - self._started

    def extend(self, removals: Sequence[Removal], number: int) -> None:
        """Measure these removals on the first `number` samples, where that has not been done.

        Raises:
            ValueError: an objective is NaN or infinite.
        """
        for have in sorted({len(self.values.get(removed, ())) for removed in removals}):
            group = [r for r in dict.fromkeys(removals) if len(self.values.get(r, ())) == have]
            if have < number:
                self._measure(group, have, number)
        if self.bar is not None:
            self.bar[0].update(self.bar[1], completed=self.passes)

    def mean(self, removed: Removal, number: int | None = None) -> float:
        """The token mean of the objective over the first so many samples, or all that the removal was measured on."""
        values = self.values[removed][:number]
        return float(np.average(values, weights=self.weights[: len(values)]))

    def difference(self, removed: Removal, reference: Removal) -> tuple[float, float]:
        """(mean, standard error) of objective minus that of a reference, on the samples both have; inf with one."""
        number = min(len(self.values[removed]), len(self.values[reference]))
        return self._mean_and_error(self.values[removed][:number] - self.values[reference][:number])

    def standard_error(self, removed: Removal) -> float:
        """The standard error of `mean`, from the scatter between samples."""
        return self._mean_and_error(self.values[removed])[1]

    def best(self) -> Removal:
        """Of the removals that were measured on the most samples, the one of lowest objective."""
        most = max(map(len, self.values.values()))
        return min((self.mean(removed), removed) for removed, v in self.values.items() if len(v) == most)[1]

    def _mean_and_error(self, values: Floats) -> tuple[float, float]:
        weights = self.weights[: len(values)] / self.weights[: len(values)].sum()
        mean = float(weights @ values)
        if len(values) < 2:
            return mean, 0.0 if len(self.weights) == 1 else math.inf
        scatter = float(weights**2 @ (values - mean) ** 2)
        return mean, math.sqrt(scatter * len(values) / (len(values) - 1))

    def _measure(self, removals: Sequence[Removal], have: int, number: int) -> None:
        if callable(self.objective):
            self.passes += sum(share_that_runs(self._traced, removed) for removed in removals)
        else:
            share = float(self.weights[have:number].sum() / self.weights.sum())
            self.passes += share * num_passes(self._traced, [(), *removals])
        unknown = [removed for removed in removals if len(self._known.get(removed, ())) < number]
        if unknown:
            fresh = self._run(unknown, have, number)
            for removed, row in zip(unknown, fresh, strict=True):
                self._known[removed] = np.concatenate([self._known.get(removed, np.zeros(0))[:have], row])
            if self.path is not None:
                stored = {json.dumps(removed): row.tolist() for removed, row in self._known.items()}
                write_json(self.path, {"fingerprint": self._identity, "values": stored})
        for removed in removals:
            self.values[removed] = self._known[removed][:number]

    def _run(self, removals: Sequence[Removal], have: int, number: int) -> Floats:
        if not callable(self.objective):
            measure, part = {"kl": kl, "loss": loss}[self.objective], self.samples[have:number]
            return measured(self._traced, removals, part, measure, batch_size=self.batch_size)[..., 0]
        rows = []
        for removed in removals:
            with skipped(self._traced, removed):
                value = float(self.objective(self.model))
            if not math.isfinite(value):
                raise ValueError(f"the objective without the blocks {removed} is {value}; it must be a finite number")
            rows.append([value])
        return np.array(rows)
