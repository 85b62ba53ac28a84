"""Corrects the energy by what was measured: a Gaussian process over removals whose mean is a quadratic form again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..energies.fitted import Fitted
from ..energies.quadratic import fit_quadratic
from ..problem import Floats, RemovalProblem, rows_of
from .expectation import changes, misfit_of, numbers_of_samples
from .ledger import Ledger

_TINY = 1e-12  # keeps variances above zero where everything measured is equal


def refit(ledger: Ledger, problem: RemovalProblem, fitted: Fitted | None = None) -> RemovalProblem:
    """The problem with its energy corrected by what was measured: a quadratic form again, solved as before.

    Its energies are in the units of `Ledger.change`, but for a constant: on a logarithmic scale where the objective
    allows it. A measurement is such a form plus the form's own misfit plus the noise of few samples.

    fitted: energies that are themselves fitted to the logarithms of KL divergences; one form is then fitted to what
        they were fitted to and to what was measured here. Of other energies E, what was measured is modelled as
        a + b E(x) + d(x) with a quadratic form d (`fit_quadratic`).
    """
    removals = list(ledger.values)
    x = rows_of(removals, problem.num_blocks)  # (K, num_blocks)
    y, errors = changes(ledger, removals)  # (K,) each
    if fitted is not None and ledger.logarithmic:
        number = numbers_of_samples(ledger, removals)
        divergence = ledger.mean(ledger.best()) * np.exp(y)  # (K,)
        return problem.with_energy(fitted.extended(x, divergence, number).hessian)

    return _corrected(problem, x, y, errors**2 + misfit_of(ledger) ** 2 + _TINY)


def _corrected(problem: RemovalProblem, x: NDArray[np.bool_], y: Floats, noise: Floats) -> RemovalProblem:
    """The problem with b E + d for its energy E, where a + b E(x) + d(x) fits the values y (K,) of x (K, N)."""
    basis, unit = _basis(problem.energies(x))
    fit = fit_quadratic(x, y, basis, noise=noise, blocks=problem.blocks)
    if fit.coefficients[-1] < 0 and basis.shape[1] > 1:  # an energy that misleads is left out
        basis = basis[:, :1]
        fit = fit_quadratic(x, y, basis, noise=noise, blocks=problem.blocks)

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
