"""Corrects the energy by what was measured: a Gaussian process over removals whose mean is a quadratic form again."""

from __future__ import annotations

import numpy as np

from ..energies.quadratic import fit_quadratic
from ..problem import Floats, RemovalProblem
from .ledger import Ledger

# The standard error of a quadratic form at removals that are measured without any, on a logarithmic scale; where the
# scale is not logarithmic, as a share of the scatter of what was measured.
MISFIT = 0.03
_TINY = 1e-12  # keeps variances above zero where everything measured is equal


def refit(ledger: Ledger, problem: RemovalProblem) -> RemovalProblem:
    """The problem with its energy corrected by what was measured: a quadratic form again, solved as before.

    What was measured is modelled as a + b E(x) + d(x) with a quadratic form d (`fit_quadratic`), on a logarithmic scale
    where the objective allows it (`Ledger.change`): the KL divergence of many removals is far from the sum of single
    ones, its logarithm is not.
    """
    removals = list(ledger.values)
    best = ledger.best()

    # Changes from the best are paired by samples, so their errors are much smaller than those of the values.
    changes = np.array([ledger.change(removed, best) for removed in removals])
    y, errors = changes.T.copy()  # (num_removals,) each
    known = np.isfinite(errors)
    errors[~known] = max([*errors[known], y.std()])  # measured on one sample only
    misfit = MISFIT * (1.0 if ledger.logarithmic else y.std())
    noise = errors**2 + misfit**2 + _TINY

    x = np.zeros((len(removals), problem.num_blocks), dtype=np.bool_)
    for row, removed in zip(x, removals, strict=True):
        row[list(removed)] = True
    basis, unit = _basis(problem.energies(x))

    fit = fit_quadratic(x, y, basis, noise=noise, blocks=problem.blocks)
    if fit.coefficients[-1] < 0 and basis.shape[1] > 1:  # an energy that misleads is left out
        fit = fit_quadratic(x, y, basis[:, :1], noise=noise, blocks=problem.blocks)
    slope = fit.coefficients[1] / unit if len(fit.coefficients) > 1 else 0.0
    return problem.with_energy(slope * problem.hessian + fit.matrix, slope * problem.gradient)


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
