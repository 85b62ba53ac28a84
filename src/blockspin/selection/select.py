"""Chooses a removal: a pool of distinct candidates, a race between them, and a polish of the winner.

The energy is a prediction, and its ground state is often not the best removal. What is measured here corrects it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import Tensor, nn

from .. import baselines
from ..energies.estimate import Robustness, robustness
from ..energies.removals import Energies
from ..problem import Removal, RemovalProblem
from ..progress import bar
from ..solvers import Spectrum, solve
from ..solvers.candidates import Candidate, distinct, states_as_candidates, swaps
from ..surgery.feasible import Removable, aligned
from .ledger import Ledger, Objective

BUDGET = 64.0  # passes over the selection samples
PROPOSALS = 32  # removals that enter the race of a polishing round; most leave it after an eighth of the samples
ACTIVATION_SAMPLES = 64  # calibration samples that the cheap baselines of the pool see


@dataclass(frozen=True)
class Trial:
    """A removal that was measured.

    loss, standard_error: the objective, by default the KL divergence from the whole model in nats a token, on
    num_samples samples. above, above_error: how far it is above the chosen one on the samples that both have.
    """

    removed: Removal
    source: str
    energy: float | None
    loss: float
    standard_error: float | None
    num_samples: int
    above: float
    above_error: float | None


@dataclass(frozen=True)
class Selection:
    """What was chosen, all that was tried (the best first), and what it cost.

    passes: forward passes of the whole model over the selection samples that would cost as much.
    """

    chosen: Candidate
    trials: tuple[Trial, ...]
    objective: str
    passes: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(path: str | Path) -> Selection:
        """What a run wrote as candidates.json. Raises ValueError where the file is something else."""
        try:
            values = json.loads(Path(path).read_text())
            trials = tuple(Trial(**{**t, "removed": tuple(t["removed"])}) for t in values["trials"])
            chosen = Candidate(**{**values["chosen"], "removed": tuple(values["chosen"]["removed"])})
            return Selection(chosen, trials, values["objective"], values["passes"], values["seconds"])
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a selection of blockspin ({error})") from error

    def table(self, limit: int = 12) -> Table:
        """The best trials as a terminal table."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in ("source", "removed blocks", "energy", self.objective, "above the chosen", "samples"):
            table.add_column(column, justify="left" if column in ("source", "removed blocks") else "right")
        for t in self.trials[:limit]:
            table.add_row(
                t.source,
                ",".join(map(str, t.removed)),
                "" if t.energy is None else f"{t.energy:.4g}",
                f"{t.loss:.4f}{_plus_minus(t.standard_error)}",
                f"{t.above:.4f}{_plus_minus(t.above_error)}",
                str(t.num_samples),
            )
        return table

    def summary(self) -> str:
        return (
            f"{len(self.trials)} removals measured in {self.seconds:.0f} s ({self.passes:.1f} passes over the "
            f"selection samples); chosen: {self.chosen.source}, {self.objective} {self.chosen.loss:.4f}."
        )


def cheap_choices(problem: RemovalProblem, activations: baselines.Activations) -> list[Candidate]:
    """What the baselines that cost next to nothing would remove."""
    return [
        baselines.last_blocks(problem),
        baselines.block_influence(problem, activations),
        baselines.norm_ratio(problem, activations),
        baselines.angular_distance(problem, activations),
    ]


def pool_of(
    problem: RemovalProblem,
    spectrum: Spectrum,
    others: Sequence[Candidate] = (),
    *,
    max_candidates: int = 20,
    ground_states: Sequence[Removal] = (),
) -> list[Candidate]:
    """Candidates worth a race: distinct low states, others, and the ground states of resampled energies."""
    states = distinct(states_as_candidates(spectrum))[:max_candidates]
    resampled = [Candidate(removed, "resampled", problem.energy(removed)) for removed in ground_states]
    unique = {candidate.removed: candidate for candidate in reversed([*states, *others, *resampled])}
    return list(reversed(unique.values()))


def select_with_energies(
    model: nn.Module,
    energies: Energies,
    problem: RemovalProblem,
    spectrum: Spectrum,
    samples: Sequence[Tensor],
    activation_samples: Sequence[Tensor],
    removable: Removable,
    *,
    seed: int = 0,
    max_candidates: int = 20,
    batch_size: int = 8,
    **options: Any,
) -> tuple[Selection, Robustness]:
    """The whole selection: bootstrap, pool with the cheap baselines' choices, race, polish.

    activation_samples: what the cheap baselines see. options: of `run_selection`.
    removable: only what it allows is chosen; where it refuses candidates, removals of a possible make join the pool.

    Raises:
        ValueError: no removal that meets the goal and can be saved was found; or as `run_selection`.
    """
    trust = robustness(energies, problem, seed=seed)
    activations = baselines.measure_activations(model, activation_samples, batch_size=batch_size)
    cheap = cheap_choices(problem, activations)
    pool = pool_of(problem, spectrum, cheap, max_candidates=max_candidates, ground_states=trust.ground_states)
    possible = [candidate for candidate in pool if removable(candidate.removed)]
    restricted = len(possible) < len(pool)
    if restricted:
        known = {candidate.removed for candidate in possible}
        others = aligned(problem, removable, cheap[0].removed, states=max_candidates, seed=seed)
        possible += [candidate for candidate in others if candidate.removed not in known]
    if not possible:
        raise ValueError(
            f"no removal was found that meets the goal and that the configuration of {type(model).__name__} can "
            "express; try another number of blocks, or see what `blockspin prune --blocks` says of some"
        )
    always = [candidate.removed for candidate in cheap if candidate in possible]
    options |= {"always": always, "removable": removable if restricted else None}
    selection = run_selection(model, possible, samples, problem=problem, batch_size=batch_size, **options)
    return _best_possible(selection, removable), trust


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
    objective: Objective = "kl",
    budget: float = BUDGET,
    max_candidates: int = 20,
    batch_size: int = 8,
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
    always: Sequence[Removal] = (),
    removable: Removable | None = None,
    objective: Objective = "kl",
    budget: float = BUDGET,
    batch_size: int = 8,
    partial: Path | None = None,
    progress: bool = True,
) -> Selection:
    """Race the candidates of a pool on growing numbers of samples; with a problem, polish the winner.

    always: removals of the pool that are measured on all samples however the race goes, so that the outcome is
        certainly not worse than them there.
    removable: polishing proposes only what it allows; None: whatever the problem allows.
    objective: "kl" (to the whole model), "loss" (cross-entropy), or a function that takes the model with the blocks
        bypassed and returns a number, lower is better (for example minus a benchmark score).
    budget: polishing ends when so many forward passes over the samples were made, the race included.
    partial: a file that keeps what was measured, so that the same call continues.

    Raises:
        ValueError: there is no candidate, the samples are unusable, or an objective is NaN or infinite.
    """
    if not pool:
        raise ValueError("there are no candidates to select from")
    ledger = Ledger(model, samples, objective, batch_size, partial)
    sources = {candidate.removed: candidate for candidate in reversed(pool)}
    with bar(progress) as display:
        ledger.bar = display, display.add_task("Selecting", total=budget if problem else None)
        race(ledger, [candidate.removed for candidate in pool])
        ledger.extend(always, len(ledger.weights))
        if problem is not None:
            for removed, source in polish(ledger, problem, budget, removable):
                sources.setdefault(removed, Candidate(removed, source, problem.energy(removed)))
    best = ledger.best()
    trials = sorted((_trial(ledger, c, best) for c in sources.values()), key=lambda t: (-t.num_samples, t.loss))
    name = objective if isinstance(objective, str) else getattr(objective, "__name__", "objective")
    chosen = replace(sources[best], loss=ledger.mean(best))
    return Selection(chosen, tuple(trials), name, ledger.passes, ledger.seconds)


def race(ledger: Ledger, removals: Sequence[Removal]) -> None:
    """Successive halving: measure all on an eighth of the samples, those still promising on a quarter, and so on.

    A removal leaves when it is worse than the best by more than two standard errors of the difference on the same
    samples, or when it is in the worse half.
    """
    number = len(ledger.weights)
    alive = list(dict.fromkeys(removals))
    for rung in sorted({max(1, number // share) for share in (8, 4, 2, 1)}):
        ledger.extend(alive, rung)
        ranked = sorted(alive, key=lambda removed: (ledger.mean(removed, rung), removed))
        apart = [ledger.difference(removed, ranked[0]) for removed in ranked]
        promising = [removed for removed, (mean, error) in zip(ranked, apart, strict=True) if mean <= 2 * error]
        alive = promising[: max(2, math.ceil(len(ranked) / 2))] if rung < number else alive


def polish(
    ledger: Ledger, problem: RemovalProblem, budget: float, removable: Removable | None = None
) -> list[tuple[Removal, str]]:
    """Refit the energy to what was measured, propose its lowest removals and swaps of the best, race them; repeat.

    Returns the removals that were measured on the way, with the round that proposed them.
    """
    tried: list[tuple[Removal, str]] = []
    round_ = 0
    while ledger.passes < budget:
        fitted, best, round_ = refit(ledger, problem), ledger.best(), round_ + 1
        low = [state.removed for state in solve(fitted, states=len(ledger.values) + PROPOSALS, solver="tabu").states]
        low = [removed for removed in low if removed not in ledger.values]
        new = (low if removable is None else removable.some(low))[: PROPOSALS // 2]
        near = [removed for removed in swaps(fitted, best) if removed not in ledger.values and removed not in new]
        new += (near if removable is None else removable.some(near))[: PROPOSALS - len(new)]
        if not new:
            break
        race(ledger, [best, *new])
        tried += [(removed, f"polish:{round_}") for removed in new]
    return tried


def refit(ledger: Ledger, problem: RemovalProblem) -> RemovalProblem:
    """The problem with its energy corrected by what was measured: a quadratic form again, solved as before.

    The measured values are modelled as a + b E(x) + d(x), where d is a quadratic form of which nothing is known but
    that its entries are independent and equally large: a Gaussian process with the kernel c n(n + 1) / 2, n the number
    of blocks that both removals take. Its mean is sum_k w_k k(x, x_k), again a quadratic form. c is the one of largest
    likelihood.
    """
    removals = list(ledger.values)
    best = ledger.best()
    apart = [ledger.difference(removed, best) for removed in removals]
    y = np.array([mean for mean, _ in apart])
    finite = [error for _, error in apart if math.isfinite(error)]
    noise = np.array([error if math.isfinite(error) else max([*finite, y.std()]) for _, error in apart]) ** 2
    x = np.zeros((len(removals), problem.num_blocks))
    for row, removed in zip(x, removals, strict=True):
        row[list(removed)] = 1.0
    energies = np.array([problem.energy(removed) for removed in removals])
    slope, weights = _regression(x, energies, y, noise + 1e-6 * y.var() + 1e-300)
    correction = (x.T * weights) @ x
    correction = (correction + np.diag(weights @ x)) / 2
    return problem.with_energy(slope * problem.hessian + correction, slope * problem.gradient)


def _regression(
    x: NDArray[np.float64], energies: NDArray[np.float64], y: NDArray[np.float64], noise: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """b >= 0 and the weights c w_k of the Gaussian process of `refit`, by generalised least squares."""
    common = x @ x.T
    kernel = common * (common + 1) / 2
    basis = np.column_stack([np.ones(len(y)), energies / (np.abs(energies).max() or 1.0)])
    if np.ptp(energies) <= 1e-12 * np.abs(energies).max():
        basis = basis[:, :1]

    def fitted(c: float) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        covariance = c * kernel + np.diag(noise)
        inverse = np.linalg.pinv(covariance, hermitian=True)
        coefficients = np.linalg.lstsq(basis.T @ inverse @ basis, basis.T @ inverse @ y, rcond=None)[0]
        if len(coefficients) > 1 and coefficients[1] < 0:  # an energy that misleads is left out
            coefficients = np.array([(inverse @ y).sum() / inverse.sum(), 0.0])
        rest = y - basis @ coefficients
        likelihood = -(rest @ inverse @ rest) - np.linalg.slogdet(covariance)[1]
        return float(likelihood), coefficients, c * (inverse @ rest)

    scale = max(y.var(), 1e-300) / kernel.diagonal().max()
    _, coefficients, weights = max((fitted(scale * 10.0**e) for e in range(-4, 2)), key=lambda found: found[0])
    slope = coefficients[1] / (np.abs(energies).max() or 1.0) if len(coefficients) > 1 else 0.0
    return float(slope), weights


def _trial(ledger: Ledger, candidate: Candidate, best: Removal) -> Trial:
    removed = candidate.removed
    above, above_error = ledger.difference(removed, best)
    return Trial(
        removed=removed,
        source=candidate.source,
        energy=candidate.energy,
        loss=ledger.mean(removed),
        standard_error=_finite(ledger.standard_error(removed)),
        num_samples=len(ledger.values[removed]),
        above=above,
        above_error=_finite(above_error),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
