"""Chooses a removal: a pool of distinct candidates, a race between them, and a polish of the winner.

The energy is a prediction, and its ground state is often not the best removal. What is measured here corrects it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from .. import baselines
from ..config import ChoosingSettings
from ..energies import Energies
from ..energies.fitted import Fitted
from ..energies.robustness import Robustness, robustness
from ..model.batches import BatchSize
from ..problem import Removal, RemovalProblem, Units
from ..progress import bar
from ..solvers import Spectrum
from ..solvers.candidates import Candidate, distinct, states_as_candidates
from ..surgery.feasible import Removable, keep_possible
from .expectation import expectation
from .ledger import Ledger, Objective
from .polish import polish
from .pool import cheap_choices, pool_of
from .race import race
from .refit import refit
from .repaired import choose_repaired, repaired_beside
from .result import Selection, trial_of

ACTIVATION_SAMPLES = 64  # calibration samples that the cheap baselines of the pool see


def select_with_energies(
    model: nn.Module,
    energies: Energies,
    problem: RemovalProblem,
    spectrum: Spectrum,
    samples: Sequence[Tensor],
    activation_samples: Sequence[Tensor],
    removable: Removable,
    settings: ChoosingSettings,
    *,
    repair_samples: Sequence[Tensor] = (),
    partial: Path | None = None,
    progress: bool = True,
) -> tuple[Selection, Robustness]:
    """The whole selection: bootstrap, pool with the cheap baselines' choices, race, polish, the last repaired.

    activation_samples: what the cheap baselines see, the first `ACTIVATION_SAMPLES` of them.
    removable: only what it allows is chosen; where it refuses candidates, others join the pool (`keep_possible`).
    settings: how the choice is made; its numbers of samples are not read.
    repair_samples: what the last candidates are repaired with, other ones than `samples`; none: the choice is made on
        plain removals.
    partial: of `run_selection`.

    Raises:
        ValueError: no removal that meets the goal and can be saved was found; or as `run_selection`.
    """
    batch_size, most = settings.batch_size, settings.max_candidates
    trust = robustness(energies, problem, seed=settings.seed)

    # What cheap baselines choose is always measured to the end: the outcome is never worse than theirs.
    seen = activation_samples[:ACTIVATION_SAMPLES]
    activations = baselines.measure_activations(model, seen, units=problem.units, batch_size=batch_size)
    cheap = cheap_choices(problem, activations)
    pool = pool_of(problem, spectrum, cheap, max_candidates=most, ground_states=trust.ground_states)

    # Where all of the pool can be saved, polishing need not ask either.
    last = baselines.last_blocks(problem).removed
    possible = keep_possible(pool, problem, removable, last, states=most, seed=settings.seed)
    selection = run_selection(
        model,
        possible,
        samples,
        problem=problem,
        fitted=energies if isinstance(energies, Fitted) else None,
        always=[candidate.removed for candidate in cheap if candidate in possible],
        removable=None if possible == pool else removable,
        objective=settings.objective,
        budget=settings.budget,
        batch_size=batch_size,
        partial=partial,
        progress=progress,
    )
    selection = _best_possible(selection, removable)
    if repair_samples:
        beside = None if partial is None else repaired_beside(partial)
        selection = choose_repaired(
            model, selection, samples, repair_samples, removable, settings, partial=beside, progress=progress
        )
    return selection, trust


def _best_possible(selection: Selection, removable: Removable) -> Selection:
    """With the best of the trials that can be saved as the choice: the one chosen, as good as always."""
    if removable(selection.chosen.removed):
        return selection
    best = next(trial for trial in selection.trials if removable(trial.removed))
    return replace(selection, chosen=Candidate(best.removed, best.source, best.energy, best.loss))


def select(
    model: nn.Module,
    spectrum_or_candidates: Spectrum | Sequence[Candidate],
    samples: Sequence[Tensor],
    *,
    problem: RemovalProblem | None = None,
    units: Units = "blocks",
    objective: Objective = "kl",
    budget: float = ChoosingSettings.budget,
    max_candidates: int = ChoosingSettings.max_candidates,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> Candidate:
    """The best removal on `samples`, which should not be those that the energies were computed from.

    As `run_selection`, of the distinct states of a spectrum or of any candidates.

    Raises:
        ValueError: there is no candidate, the samples are unusable, or an objective is NaN or infinite.
    """
    if isinstance(spectrum_or_candidates, Spectrum):
        pool = distinct(states_as_candidates(spectrum_or_candidates))[: max(0, max_candidates)]
    else:
        pool = list(spectrum_or_candidates)
    return run_selection(
        model,
        pool,
        samples,
        problem=problem,
        units=units,
        objective=objective,
        budget=budget,
        batch_size=batch_size,
        progress=progress,
    ).chosen


def run_selection(
    model: nn.Module,
    pool: Sequence[Candidate],
    samples: Sequence[Tensor],
    *,
    problem: RemovalProblem | None = None,
    fitted: Fitted | None = None,
    always: Sequence[Removal] = (),
    removable: Removable | None = None,
    units: Units = "blocks",
    objective: Objective = "kl",
    budget: float = ChoosingSettings.budget,
    batch_size: BatchSize = "auto",
    partial: Path | None = None,
    progress: bool = True,
) -> Selection:
    """Race the candidates of a pool on growing numbers of samples; with a problem, polish the winner.

    fitted: the energies of the problem, where one form can be fitted to them and to what is measured (`refit`).
    always: removals of the pool that are measured on all samples however the race goes, so that the outcome is
        certainly not worse than them there.
    removable: polishing proposes only what it allows; None: whatever the problem allows.
    units: what the numbers of a removal stand for; a problem that lists its units says so itself.
    objective: "kl" (to the whole model), "loss" (cross-entropy), or a function that takes the model with the blocks
        bypassed and returns a number, lower is better (for example minus a benchmark score).
    budget: polishing ends when so many forward passes over the samples were made, the race included.
    partial: a file that keeps what was measured, so that the same call continues.

    Raises:
        ValueError: there is no candidate, the samples are unusable, or an objective is NaN or infinite.
    """
    if not pool:
        raise ValueError("there are no candidates to select from")
    if problem is not None and problem.blocks is not None:
        units = problem.units
    ledger = Ledger(model, samples, objective, batch_size, partial, units)
    candidates: dict[Removal, Candidate] = {}  # everything that is measured, by whoever proposed it first
    for candidate in pool:
        candidates.setdefault(candidate.removed, candidate)

    with bar(progress) as display:
        task = display.add_task("Selecting", total=None if problem is None else budget)
        ledger.on_progress = lambda passes: display.update(task, completed=passes)
        logarithmic = fitted is not None and ledger.logarithmic  # the energy is in the units of what is measured
        race(ledger, list(candidates), problem if logarithmic else None)
        ledger.extend(always, len(ledger.weights))
        if problem is not None:
            for removed, source in polish(ledger, problem, budget, removable, fitted):
                candidates.setdefault(removed, Candidate(removed, source, problem.energy(removed)))

    best = ledger.best() if problem is None else expected_best(ledger, problem, always, fitted)
    chosen = replace(candidates[best], loss=ledger.mean(best))
    trials = [trial_of(ledger, candidate, best) for candidate in candidates.values()]
    trials.sort(key=lambda trial: (-trial.num_samples, trial.loss))
    name = objective if isinstance(objective, str) else getattr(objective, "__name__", "objective")
    allowed = None if problem is None else budget
    return Selection(chosen, tuple(trials), name, ledger.passes, ledger.seconds, allowed)


def expected_best(
    ledger: Ledger, problem: RemovalProblem, always: Sequence[Removal] = (), fitted: Fitted | None = None
) -> Removal:
    """Of the removals measured on the most samples, the one whose objective is expected to be lowest on other samples.

    None that measured higher than one of `always` is taken.
    """
    limit = min(map(ledger.mean, always), default=math.inf)
    allowed = [removed for removed in ledger.complete() if ledger.mean(removed) <= limit]

    values = expectation(ledger, allowed, refit(ledger, problem, fitted)).values
    expected = dict(zip(allowed, values.tolist(), strict=True))
    return min(allowed, key=lambda removed: (expected[removed], ledger.mean(removed), removed))
