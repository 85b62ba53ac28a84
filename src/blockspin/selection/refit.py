"""Corrects the energy by what was measured: a Gaussian process over removals whose mean is a quadratic form again."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..problem import RemovalProblem
from .ledger import Ledger


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
