"""Energies fitted to removals of many blocks, on a logarithmic scale: they hold at the depths where they are used.

What a removal of many blocks costs is far from the sum of what single blocks cost, and far from what gradients at the
whole model say. Its logarithm is close to a quadratic form. Removals are measured on one sample each, at first random
ones that spare the blocks without which the model breaks, then the lowest of the form that fits what is known so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..journal import Journal
from ..model import fingerprint
from ..model.passes import num_passes
from ..model.quality import kl, measured
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Floats, Goal, Removal, RemovalProblem, check_goal
from ..progress import bar
from ..solvers import solve
from ..solvers.candidates import fill
from .energies import Energies
from .quadratic import QuadraticFit, fit_quadratic

PASSES_PER_BLOCK = 24  # forward passes over one sample, for each block of the model
SINGLES_SAMPLES = 2  # on which every single block is removed first
LEAST_TURN = 16  # passes of a turn at least: what a sample costs before anything is removed is then a small part
LOWEST = 20  # low states among which the next removals are chosen
BIASES = (0.5, 1.0, 2.0)  # how strongly random removals avoid blocks whose removal alone costs much
FLOOR = 1e-6  # KL divergences are not taken to be smaller than this share of the largest, so that all have a logarithm


@dataclass(frozen=True)
class Fitted(Energies):
    """Removals that were measured, and the quadratic form that fits the logarithms of their KL divergences.

    removed: (K, N) bool, one row for each measurement.
    sample: (K,) int64, the sample on which it was measured.
    divergence: (K,) float64, KL divergence from the whole model, nats a token.
    singles: (N,) float64, the KL divergence without each block.
    ratio: (1,) float64, of signal to noise, where it is known already; else empty.
    """

    removed: NDArray[np.bool_]
    sample: NDArray[np.int64]
    divergence: Floats
    singles: Floats
    blocks: tuple[Block, ...]
    ratio: Floats = field(default_factory=lambda: np.zeros(0))
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hessian(self) -> Floats:
        """(N, N): x^T hessian x orders removals as their expected log KL does, whatever their sizes.

        The fit's columns are a constant for each sample, the sum of the logarithms of the single removals, the number
        of blocks and its square. Except for the constants, all are quadratic forms, and so is their sum.
        """
        n = len(self.blocks)
        of_singles, of_number, of_square = self._fit.coefficients[-3:]
        prior = np.diag(of_singles * _logarithms(self.singles) + of_number / n) + of_square / n**2
        return np.asarray(self._fit.matrix + prior)

    def resampled(self, generator: np.random.Generator) -> Fitted:
        """As many measurements, drawn with replacement: one bootstrap replicate."""
        rows = generator.integers(0, len(self.sample), len(self.sample))
        drawn = {name: getattr(self, name)[rows] for name in ("removed", "sample", "divergence")}
        return replace(self, ratio=np.array([self._fit.ratio]), **drawn)

    @cached_property
    def _fit(self) -> QuadraticFit:
        samples = self.sample[:, None] == np.unique(self.sample)  # (K, number of samples)
        share = self.removed.mean(axis=1)  # (K,) of the blocks
        prior = self.removed @ _logarithms(self.singles)
        basis = np.column_stack([samples, prior, share, share**2]).astype(np.float64)
        ratio = float(self.ratio[0]) if len(self.ratio) else None
        return fit_quadratic(self.removed, _logarithms(self.divergence), basis, blocks=self.blocks, ratio=ratio)


def fit_removals(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    goal: Goal | None = None,
    protect: Iterable[int] = (),
    passes: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Fitted:
    """Measure removals of many blocks and fit a quadratic form to log KL: Q with the energy x^T Q x.

    First each single block is removed, on two samples. Then every sample has two turns, so that what is special about
    it cancels. In the first ones random removals are measured, in the second ones the lowest states of the form that
    fits all measurements so far, and of one fitted to a bootstrap replicate of them, which explores what is uncertain.

    samples: as many of them are used as have turns of `LEAST_TURN` passes at least.
    goal, protect: the form is made for removals that meet the goal; by default for those of an eighth to a half of the
        blocks. Protected blocks are in none of them.
    passes: forward passes over one sample, in all; by default `PASSES_PER_BLOCK` for each block and one for the whole.
    batch_size: of the single removals; the others are measured on one sample at a time.
    partial: a file that keeps what was measured, so that the same call continues it.

    Raises:
        ValueError: unusable samples, model or number of passes, a loss that is NaN or infinite, or a partial file of
            something else.
    """
    traced, protect = trace_model(model), tuple(protect)
    if goal is not None:
        check_goal(traced.blocks, goal, protect)
    budget = PASSES_PER_BLOCK * (traced.depth + 1) if passes is None else passes
    for_singles = SINGLES_SAMPLES * (traced.depth + 1)
    used = samples[: int((budget - for_singles) / (2 * LEAST_TURN))]
    if not used:
        least = for_singles + 2 * LEAST_TURN
        raise ValueError(
            f"passes={budget:g}: must be at least {least} for {traced.depth} blocks, and there must be samples"
        )

    identity = fingerprint.of_results(model, used, "fitted", budget, seed, goal, protect)
    known = _Measurements(traced, used, Journal(partial, identity), batch_size)
    problems = _problems(traced.blocks, known.singles, goal, protect)
    generator = np.random.default_rng(seed)
    turns = 2 * len(used)
    with bar(progress) as display:
        task = display.add_task("Removals", total=round(budget), completed=round(known.passes))
        for turn in range(turns):
            if turn < len(used):
                wanted = _random_removals(problems, known.singles, generator)
            else:
                wanted = _lowest_removals(problems, known, generator)
            share = (budget - known.passes) / (turns - turn)
            known.measure(_affordable(traced, wanted, share), turn % len(used))
            display.update(task, completed=round(known.passes))
    return replace(known.energies(), metadata=metadata or {})


class _Measurements:
    """What has been measured, and what it has cost, in passes of the whole model over one sample."""

    def __init__(self, traced: TracedModel, samples: Sequence[Tensor], journal: Journal, batch_size: int) -> None:
        self.passes = 0.0
        self._traced, self._samples = traced, samples
        self._journal, self._batch_size = journal, batch_size
        self._rows: list[tuple[Removal, int, float]] = []
        self._finished: dict[tuple[int, Removal], float] = {}
        for entry in journal.entries():
            self._remember([tuple(removed) for removed in entry["removals"]], entry["samples"], entry["kl"])

        each = [(block,) for block in range(traced.depth)]
        first = range(min(SINGLES_SAMPLES, len(samples)))
        self.singles = np.asarray(self._divergences(each, first).mean(axis=1))  # (N,)

    def measure(self, removals: Sequence[Removal], sample: int) -> None:
        """Add the KL divergences of these removals on one sample."""
        divergences = self._divergences(removals, [sample])[:, 0]
        self._rows += [(removed, sample, value) for removed, value in zip(removals, divergences, strict=True)]

    def energies(self) -> Fitted:
        """The form that fits all measurements."""
        removed = np.zeros((len(self._rows), self._traced.depth), dtype=np.bool_)
        for row, (blocks, _, _) in zip(removed, self._rows, strict=True):
            row[list(blocks)] = True
        sample = np.array([sample for _, sample, _ in self._rows])
        divergence = np.array([value for _, _, value in self._rows])
        return Fitted(removed, sample, divergence, self.singles, self._traced.blocks)

    def times_measured(self) -> Counter[Removal]:
        """On how many samples each removal was measured."""
        return Counter(removed for removed, _, _ in self._rows)

    def _divergences(self, removals: Sequence[Removal], samples: Sequence[int]) -> Floats:
        """(number of removals, number of samples): KL without the blocks, measured where the journal lacks it."""
        self.passes += num_passes(self._traced, [(), *removals]) * len(samples)
        missing = [removed for removed in removals if any((s, removed) not in self._finished for s in samples)]
        if missing:
            tokens = [self._samples[s] for s in samples]
            values = measured(self._traced, missing, tokens, kl, batch_size=self._batch_size)[..., 0]
            self._remember(missing, samples, values.tolist())
            self._journal.append({"samples": list(samples), "removals": missing, "kl": values.tolist()})
        return np.array([[self._finished[s, removed] for s in samples] for removed in removals])

    def _remember(self, removals: Sequence[Removal], samples: Sequence[int], values: list[list[float]]) -> None:
        for removed, row in zip(removals, values, strict=True):
            for s, value in zip(samples, row, strict=True):
                self._finished[s, removed] = value


def _problems(
    blocks: Sequence[Block], singles: Floats, goal: Goal | None, protect: Sequence[int]
) -> list[RemovalProblem]:
    """The goal as a problem, whose energy is the sum of the logarithms of the single removals.

    Without a goal one for every number of blocks from an eighth to a half of them.
    """
    form, n = np.diag(_logarithms(singles)), len(blocks)
    if isinstance(goal, float):
        return [RemovalProblem(form, blocks=blocks, protect=protect, remove_parameters=goal)]
    if goal is not None:
        return [RemovalProblem(form, goal, blocks=blocks, protect=protect)]
    most = min(max(1, n // 2), n - len(set(protect)))
    sizes = range(min(max(1, round(n / 8)), most), most + 1)
    return [RemovalProblem(form, size, blocks=blocks, protect=protect) for size in sizes]


def _random_removals(
    problems: Sequence[RemovalProblem], singles: Floats, generator: np.random.Generator
) -> Iterator[Removal]:
    """Removals that meet the goal of one of the problems, drawn without end; blocks of small KL are likelier to go.

    The chance that a block is the next to go is proportional to its single KL to the power of minus the bias (the
    Gumbel-max trick).
    """
    costs = _logarithms(singles)
    while True:
        problem = problems[int(generator.integers(len(problems)))]
        bias = float(generator.choice(BIASES))
        order = np.argsort(bias * costs - generator.gumbel(size=len(costs)))
        yield fill(problem, order.tolist())


def _lowest_removals(
    problems: Sequence[RemovalProblem], known: _Measurements, generator: np.random.Generator
) -> Iterator[Removal]:
    """Low states of the problems, least measured first, of the form that fits and of a bootstrap replicate."""
    energies = known.energies()
    forms = [energies.hessian, energies.resampled(generator).hessian]
    times = known.times_measured()
    low: dict[tuple[int, int], list[Removal]] = {}  # the low states of each problem with each form
    while True:
        place = int(generator.integers(len(problems)))
        for k, form in enumerate(forms):
            if (place, k) not in low:
                states = solve(problems[place].with_energy(form), states=LOWEST, solver="tabu").states
                low[place, k] = [state.removed for state in states]
            removed = min(low[place, k], key=lambda removed: times[removed])  # the lowest of those measured least
            times[removed] += 1
            yield removed


def _affordable(traced: TracedModel, wanted: Iterator[Removal], passes: float) -> list[Removal]:
    """The first of the wanted removals, each once, that can be measured on one sample in so many passes."""
    taken: dict[Removal, None] = {}
    for _ in range(int(2 * passes) + 1):
        taken[next(wanted)] = None
        if num_passes(traced, [(), *taken]) > passes:
            break
    return list(taken)


def _logarithms(divergences: Floats) -> Floats:
    """Natural logarithms; of what is zero or nearly so, that of a small share of the largest."""
    smallest = max(FLOOR * float(divergences.max()), np.finfo(np.float64).tiny)
    return np.asarray(np.log(np.maximum(divergences, smallest)))
