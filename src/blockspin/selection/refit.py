"""Corrects the energy by what was measured: a Gaussian process over removals whose mean is a quadratic form again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..problem import RemovalProblem
from .ledger import Ledger

Floats = NDArray[np.float64]

# Sizes that are tried for the unknown part, relative to the scatter of what was measured.
_SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_TINY = 1e-300  # keeps variances above zero where everything measured is equal


def refit(ledger: Ledger, problem: RemovalProblem) -> RemovalProblem:
    """The problem with its energy corrected by what was measured: a quadratic form again, solved as before.

    The measured values are modelled as a + b E(x) + d(x), where d is a quadratic form of which nothing is known but
    that its entries are independent and equally large: a Gaussian process with the kernel c n(n + 1) / 2, n the number
    of blocks that both removals take. Its mean is sum_k w_k k(x, x_k), again a quadratic form. c is the one of largest
    likelihood.
    """
    removals = list(ledger.values)
    best = ledger.best()

    # Differences from the best are paired by samples, so their errors are much smaller than those of the values.
    differences = [ledger.difference(removed, best) for removed in removals]
    y = np.array([above for above, _ in differences])  # (num_removals,)
    errors = np.array([error for _, error in differences])
    known = np.isfinite(errors)
    errors[~known] = max([*errors[known], y.std()])  # measured on one sample only

    x = np.zeros((len(removals), problem.num_blocks))
    for row, removed in zip(x, removals, strict=True):
        row[list(removed)] = 1.0
    energies = np.array([problem.energy(removed) for removed in removals])

    noise = errors**2 + 1e-6 * y.var() + _TINY
    slope, weights = _regression(x, energies, y, noise)

    # n(n + 1) / 2 = (n^2 + n) / 2 with n = x^T x_k: a matrix of rank one and a diagonal for each measured removal.
    squares = (x.T * weights) @ x  # (num_blocks, num_blocks)
    linear = np.diag(weights @ x)
    correction = (squares + linear) / 2
    return problem.with_energy(slope * problem.hessian + correction, slope * problem.gradient)


@dataclass(frozen=True)
class _Fit:
    """A Gaussian process of one size c.

    coefficients: of the constant and of the energy. weights: (num_removals,) c w_k, of the kernel around each removal.
    """

    likelihood: float
    coefficients: Floats
    weights: Floats


def _regression(x: Floats, energies: Floats, y: Floats, noise: Floats) -> tuple[float, Floats]:
    """b >= 0 and the weights c w_k of the Gaussian process of `refit`, by generalised least squares.

    x: (num_removals, num_blocks). energies, y, noise: (num_removals,), the noise as variances.
    """
    common = x @ x.T  # (num_removals, num_removals): the number of blocks that both take
    kernel = common * (common + 1) / 2

    largest = np.abs(energies).max()
    unit = largest or 1.0
    basis = np.column_stack([np.ones(len(y)), energies / unit])  # (num_removals, 2)
    if np.ptp(energies) <= 1e-12 * largest:  # equal energies cannot be told from the constant
        basis = basis[:, :1]

    scale = max(y.var(), _TINY) / kernel.diagonal().max()
    fits = [_fit(scale * size, kernel, basis, y, noise) for size in _SIZES]
    best = max(fits, key=lambda fit: fit.likelihood)
    slope = best.coefficients[1] / unit if len(best.coefficients) > 1 else 0.0
    return float(slope), best.weights


def _fit(size: float, kernel: Floats, basis: Floats, y: Floats, noise: Floats) -> _Fit:
    """The fit with the covariance size * kernel + diag(noise)."""
    covariance = size * kernel + np.diag(noise)  # (num_removals, num_removals)
    inverse = np.linalg.pinv(covariance, hermitian=True)

    normal = basis.T @ inverse @ basis
    coefficients = np.linalg.lstsq(normal, basis.T @ inverse @ y, rcond=None)[0].astype(np.float64)
    if len(coefficients) > 1 and coefficients[1] < 0:  # an energy that misleads is left out
        constant = (inverse @ y).sum() / inverse.sum()
        coefficients = np.array([constant, 0.0])

    rest = y - basis @ coefficients
    likelihood = -(rest @ inverse @ rest) - np.linalg.slogdet(covariance)[1]
    return _Fit(float(likelihood), coefficients, size * (inverse @ rest))
