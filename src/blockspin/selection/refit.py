"""Corrects the energy by what was measured: a Gaussian process over removals whose mean is a quadratic form again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..energies.fitted import Fitted
from ..energies.quadratic import fit_quadratic
from ..problem import Floats, Removal, RemovalProblem, rows_of
from .ledger import Ledger

# The standard error of a quadratic form at removals that are measured without any, on a logarithmic scale; where the
# scale is not logarithmic, as a share of the scatter of what was measured.
MISFIT = 0.03
_TINY = 1e-12  # keeps variances above zero where everything measured is equal


@dataclass(frozen=True)
class Refit:
    """The problem with its energy corrected by what was measured, and what the correction makes of the measurements.

    problem: a quadratic form again, solved as before.
    expected: for every measured removal how far its objective is expected to be above the best measured one on samples
        that nobody has seen; of KL divergences the logarithm.
    """

    problem: RemovalProblem
    expected: dict[Removal, float]


def refit(ledger: Ledger, problem: RemovalProblem, fitted: Fitted | None = None) -> Refit:
    """Correct the energy by what was measured, on a logarithmic scale where the objective allows it (`Ledger.change`).

    fitted: energies that are themselves fitted to the logarithms of KL divergences; one form is then fitted to what
        they were fitted to and to what was measured here. Of other energies E, what was measured is modelled as
        a + b E(x) + d(x) with a quadratic form d (`fit_quadratic`).

    A measurement is such a form plus the form's own misfit plus the noise of few samples. Of what it differs from the
    form by, the misfit's share of the variance is expected to be there on other samples too: the lowest of many
    measurements is often only the luckiest.
    """
    removals = list(ledger.values)
    best = ledger.best()

    # Changes from the best are paired by samples, so their errors are much smaller than those of the values.
    changes = np.array([ledger.change(removed, best) for removed in removals])
    y, errors = changes.T.copy()  # (num_removals,) each
    known = np.isfinite(errors)
    errors[~known] = max([*errors[known], y.std()])  # measured on one sample only

    # Half of the variance of a difference is that of the best, whose difference from itself says nothing of it.
    compared = [k for k, removed in enumerate(removals) if known[k] and removed != best]
    errors[removals.index(best)] = np.median(errors[compared]) if compared else 0.0
    errors /= np.sqrt(2)

    x = rows_of(removals, problem.num_blocks)  # (num_removals, num_blocks)
    misfit = MISFIT * (1.0 if ledger.logarithmic else y.std())
    if fitted is not None and ledger.logarithmic:
        number = np.array([len(ledger.values[removed]) for removed in removals], dtype=np.float64)
        joint = fitted.extended(x, ledger.mean(best) * np.exp(y), number)
        corrected = problem.with_energy(joint.hessian)
        formed = corrected.energies(x)  # (num_removals,), but for a constant
        formed += np.average(y - formed, weights=number)
    else:
        corrected, formed = _corrected(problem, x, y, errors**2 + misfit**2 + _TINY)

    lasting = misfit**2 / (errors**2 + misfit**2 + _TINY)  # (num_removals,)
    expected = formed + lasting * (y - formed)
    return Refit(corrected, dict(zip(removals, expected.tolist(), strict=True)))


def _corrected(
    problem: RemovalProblem, x: NDArray[np.bool_], y: Floats, noise: Floats
) -> tuple[RemovalProblem, Floats]:
    """The problem with b E + d for its energy E, and a + b E(x) + d(x), (K,), which fits the values y of x (K, N)."""
    basis, unit = _basis(problem.energies(x))
    fit = fit_quadratic(x, y, basis, noise=noise, blocks=problem.blocks)
    if fit.coefficients[-1] < 0 and basis.shape[1] > 1:  # an energy that misleads is left out
        basis = basis[:, :1]
        fit = fit_quadratic(x, y, basis, noise=noise, blocks=problem.blocks)

    slope = fit.coefficients[1] / unit if len(fit.coefficients) > 1 else 0.0
    corrected = problem.with_energy(slope * problem.hessian + fit.matrix, slope * problem.gradient)
    formed = basis @ fit.coefficients + np.einsum("ki,ij,kj->k", x, fit.matrix, x)
    return corrected, formed


def _basis(energies: Floats) -> tuple[Floats, float]:
    """A constant and the energies in units of the largest, (num_removals, 2), and the unit.

    The constant alone where the energies are equal, as they cannot be told from it.
    """
    largest = float(np.abs(energies).max())
    unit = largest or 1.0
    basis = np.column_stack([np.ones(len(energies)), energies / unit])
    if np.ptp(energies) <= 1e-12 * largest:
        basis = basis[:, :1]
    return basis, unit
