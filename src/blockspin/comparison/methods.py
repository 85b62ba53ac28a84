"""The methods of a comparison: what each of them is given, and what it removes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import baselines
from ..config import CompressConfig
from ..energies import Energies
from ..model.batches import BatchSize
from ..model.quality import shared_losses
from ..model.tracing import TracedModel
from ..pipeline.stages import Samples
from ..problem import Budget, RemovalProblem, Units
from ..processes import from_main
from ..selection.select import ACTIVATION_SAMPLES, select_with_energies
from ..solvers import Spectrum
from ..solvers.candidates import Candidate, random_candidate, states_as_candidates
from ..surgery.feasible import Removable
from .cost import MethodCost, counted
from .known import Known
from .results import RANDOM, SELECTED

RANDOM_DRAWS = 5
STATES = 3  # states of the paper's energy that are methods of their own
PAPER = "empirical-fisher"  # the energy of CBO:k; ours is that of the settings
TO_BE_REPAIRED = "CBO, selected for repair"

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Chosen = Candidate | Sequence[Candidate] | baselines.Merged  # one removal, several draws, or merged windows


class Measure(Protocol[T_co]):
    """What measures a statistic of the whole model."""

    def __call__(
        self, model: nn.Module, samples: Sequence[Tensor], *, units: Units, batch_size: BatchSize, progress: bool
    ) -> T_co: ...


class Search(Protocol):
    """A baseline that searches by measuring shortened models."""

    def __call__(
        self,
        model: nn.Module,
        samples: Sequence[Tensor],
        problem: RemovalProblem,
        *,
        batch_size: BatchSize,
        progress: bool,
    ) -> Chosen: ...


@dataclass(frozen=True)
class Statistic(Generic[T]):
    """Something of the whole model that several methods read, so that it is measured once.

    name: under which its cost is kept. on_selection: measured on the selection samples, not the calibration samples.
    """

    name: str
    measure: Measure[T]
    on_selection: bool = False


def weight_importance(
    model: nn.Module, samples: Sequence[Tensor], *, units: Units, batch_size: BatchSize, progress: bool
) -> NDArray[np.float64]:
    """By the main process alone where there are several: its sums are as large as the model."""
    assert units == "blocks", "methods that read it are of whole blocks"
    return from_main(lambda: baselines.weight_importance(model, samples, batch_size=batch_size, progress=progress))


ACTIVATIONS = Statistic("activations", baselines.measure_activations)
LOSSES_WITHOUT_EACH = Statistic("losses without each", baselines.losses_without_each, on_selection=True)
WEIGHT_IMPORTANCE = Statistic("weight importance", weight_importance)


@dataclass
class Setup:
    """The model that the methods are compared on, and what they share.

    budgets: what the targets ask for, besides every goal. energies: by name. costs: of the energies and of the
        statistics, by their names.
    """

    traced: TracedModel
    samples: Samples
    config: CompressConfig
    removable: Removable
    costs: dict[str, MethodCost]
    budgets: Sequence[Budget] = ()
    energies: dict[str, Energies] = field(default_factory=dict)
    _statistics: dict[str, Any] = field(default_factory=dict)

    def counting(self, keep: Callable[[MethodCost], None] | None = None) -> AbstractContextManager[MethodCost]:
        """A context that counts what runs inside, in passes over the calibration samples.

        keep: is given what was counted so far, every few seconds.
        """
        tokens = sum(len(sample) for sample in self.samples.calibration)
        return counted(self.traced.model, tokens, keep)

    def read(self, statistic: Statistic[T]) -> T:
        """A statistic, measured now if this is the first time that it is read."""
        if statistic.name not in self._statistics:
            samples = self.samples.selection if statistic.on_selection else self.samples.calibration
            with self.counting() as cost:
                self._statistics[statistic.name] = statistic.measure(
                    self.traced.model,
                    samples,
                    units=self.config.units,
                    batch_size=self.config.batch_size,
                    progress=True,
                )
            self.costs[statistic.name] = cost
        value: T = self._statistics[statistic.name]
        return value


@dataclass(frozen=True)
class Case:
    """One goal of a comparison: what every method is given.

    problems, spectra: by the name of the energy. costs: of estimating and solving it.
    """

    setup: Setup
    goal: str
    problems: Mapping[str, RemovalProblem]
    spectra: Mapping[str, Spectrum]
    costs: Mapping[str, MethodCost]

    @property
    def problem(self) -> RemovalProblem:
        """The problem as the paper poses it: what may go, and how much."""
        return self.problems[PAPER]


@dataclass(frozen=True)
class Method:
    """One way to choose what goes.

    energy: the one whose spectrum it reads; statistic: what it reads besides. Both are part of its cost, as if no
        other method shared them.
    of_blocks: why it cannot remove sub-layers; empty where it can.
    """

    name: str
    choose: Callable[[Case], Chosen]
    energy: str | None = None
    statistic: Statistic[Any] | None = None
    of_blocks: str = ""

    def check(self, case: Case) -> None:
        """Raise ValueError where the method cannot remove what is to be removed."""
        if self.of_blocks and case.problem.units == "sublayers":
            raise ValueError(f"{self.of_blocks}, and here sub-layers go")

    def shared_cost(self, case: Case) -> MethodCost:
        """The cost of what it reads; a statistic that no method has read is measured now."""
        cost = MethodCost()
        if self.energy is not None:
            cost += case.costs[self.energy]
        if self.statistic is not None:
            case.setup.read(self.statistic)
            cost += case.setup.costs[self.statistic.name]
        return cost


def methods(config: CompressConfig) -> list[Method]:
    """Every method, in the order in which they run: cheap ones first.

    Some were proposed again for sub-layers, and have that name there.
    """
    of_blocks = config.units == "blocks"
    found = [Method(SELECTED, selected, energy=config.energy)]
    if config.repair and config.choose_repaired:
        found.append(Method(TO_BE_REPAIRED, selected_for_repair, energy=config.energy))
    if config.energy != PAPER:
        found.append(Method(f"CBO:0, {config.energy}", state(config.energy, 0), energy=config.energy))
    for k in range(min(STATES, config.states)):
        found.append(Method(f"CBO:{k}", state(PAPER, k), energy=PAPER))

    found += [
        Method(f"CBO, best of {config.max_candidates}", best_state, energy=PAPER),
        Method("last blocks" if of_blocks else "last sub-layers", lambda case: baselines.last_blocks(case.problem)),
        Method(RANDOM, random_draws),
        by_activations("block influence" if of_blocks else "LLM-Drop", baselines.block_influence),
        by_activations("norm ratio", baselines.norm_ratio),
        by_activations("angular distance", baselines.angular_distance),
        Method("iterative block influence", iterative_block_influence),
        shortened_llama("Shortened LLaMA PPL", LOSSES_WITHOUT_EACH),
        shortened_llama("Shortened LLaMA PPL+", LOSSES_WITHOUT_EACH, plus=True),
        shortened_llama("Shortened LLaMA Taylor", WEIGHT_IMPORTANCE),
        shortened_llama("Shortened LLaMA Taylor+", WEIGHT_IMPORTANCE, plus=True),
        replace(
            by_search("sliding-window merging", baselines.sliding_window_merging, alone=True),
            of_blocks="it merges whole blocks",
        ),
        by_search("SLEB" if of_blocks else "BlockPruner", baselines.sleb),
        *([] if of_blocks else [by_search("FinerCut", baselines.finercut)]),
        by_search("EvoPress", partial(baselines.evopress, budget=config.budget)),
    ]
    return found


def known_methods(known: Known, problem: RemovalProblem) -> list[Method]:
    """Removals that were chosen elsewhere, those that meet the goal of the problem."""
    found = []
    for name, removals in known.items():
        for removed in filter(problem.allows, removals):
            candidate = Candidate(tuple(sorted(removed)), name, problem.energy(removed))
            found.append(Method(name, partial(_given, candidate)))
    return found


def _given(candidate: Candidate, case: Case) -> Candidate:
    return candidate


def selected(case: Case) -> Candidate:
    """`blockspin select --no-choose-repaired`: the race of a pool and the polish of its winner."""
    return _selected(case, repair_samples=())


def selected_for_repair(case: Case) -> Candidate:
    """`blockspin select`: the same, and the last candidates are compared as a repair leaves them."""
    return _selected(case, repair_samples=case.setup.samples.calibration)


def _selected(case: Case, repair_samples: Sequence[Tensor]) -> Candidate:
    setup, config = case.setup, case.setup.config
    selection, _ = select_with_energies(
        setup.traced.model,
        setup.energies[config.energy],
        case.problems[config.energy],
        case.spectra[config.energy],
        setup.samples.selection,
        setup.samples.calibration,
        setup.removable,
        config,
        repair_samples=repair_samples,
    )
    return selection.chosen


def state(energy: str, k: int) -> Callable[[Case], Candidate]:
    """State k of the spectrum of an energy."""

    def choose(case: Case) -> Candidate:
        states = states_as_candidates(case.spectra[energy])
        if k >= len(states):
            raise ValueError(f"there are only {len(states)} states")
        return states[k]

    return choose


def best_state(case: Case) -> Candidate:
    """What the paper does by hand: the best of the first states, by their losses on the selection samples."""
    setup, config = case.setup, case.setup.config
    states = states_as_candidates(case.spectra[PAPER])[: config.max_candidates]
    losses = shared_losses(
        setup.traced,
        [candidate.removed for candidate in states],
        setup.samples.selection,
        batch_size=config.batch_size,
        progress=True,
    )
    k = losses.index(min(losses))
    return replace(states[k], loss=losses[k])


def random_draws(case: Case) -> list[Candidate]:
    """Several, of which the tables show the mean."""
    seed = case.setup.config.seed
    return [random_candidate(case.problem, seed + k) for k in range(RANDOM_DRAWS)]


def iterative_block_influence(case: Case) -> Candidate:
    """The one search that only reads activations: on some calibration samples, as it runs them for every removal."""
    setup = case.setup
    return baselines.iterative_block_influence(
        setup.traced.model,
        setup.samples.calibration[:ACTIVATION_SAMPLES],
        case.problem,
        batch_size=setup.config.batch_size,
        progress=True,
    )


def by_search(name: str, search: Search, alone: bool = False) -> Method:
    """A baseline that measures shortened models on the selection samples.

    alone: it does so in one process, where there are several.
    """

    def choose(case: Case) -> Chosen:
        setup = case.setup
        return search(
            setup.traced.model, setup.samples.selection, case.problem, batch_size=setup.config.batch_size, progress=True
        )

    def choose_alone(case: Case) -> Chosen:
        return from_main(lambda: choose(case))

    return Method(name, choose_alone if alone else choose)


def by_activations(name: str, baseline: Callable[[RemovalProblem, baselines.Activations], Candidate]) -> Method:
    """A baseline that scores the blocks by their activations."""
    return Method(name, lambda case: baseline(case.problem, case.setup.read(ACTIVATIONS)), statistic=ACTIVATIONS)


def shortened_llama(name: str, statistic: Statistic[NDArray[np.float64]], plus: bool = False) -> Method:
    """Shortened LLaMA by one of its scores; plus: its variant that protects the first and the last blocks."""

    def choose(case: Case) -> Candidate:
        return baselines.shortened_llama(case.problem, case.setup.read(statistic), "Shortened LLaMA", plus=plus)

    # Of single sub-layers there is the loss without each, but no share of the gradients, and no ends to protect.
    of_blocks = "its score is of whole blocks" if plus or statistic is WEIGHT_IMPORTANCE else ""
    return Method(name, choose, statistic=statistic, of_blocks=of_blocks)
