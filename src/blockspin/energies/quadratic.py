"""Fits a quadratic form over the blocks to what removals cost: a Gaussian process whose mean is such a form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..problem import Block, Floats, block_of

ALIKE = 0.75  # the share of a coefficient that resembles those of the blocks around
PER_BLOCK = 0.6  # what is left of the resemblance with each block further away
RATIOS = 10.0 ** np.arange(-4, 4.25, 0.25)  # of signal to noise, among which the most likely is taken
SEARCH_ROWS = 400  # the ratio is found on at most so many of the measurements


@dataclass(frozen=True)
class QuadraticFit:
    """values ~ basis @ coefficients + x^T matrix x.

    matrix: (N, N), symmetric. coefficients: (number of columns of the basis,).
    ratio: how much of the values is signal: the variance of x^T Q x at the removals over that of the noise.
    """

    matrix: Floats
    coefficients: Floats
    ratio: float


def fit_quadratic(
    removed: NDArray[np.bool_],
    values: Floats,
    basis: Floats,
    *,
    noise: Floats | None = None,
    blocks: Sequence[Block] | None = None,
    ratio: float | None = None,
) -> QuadraticFit:
    """The most likely quadratic form behind noisy values of some removals.

    values = basis @ coefficients + x^T Q x + noise, where nothing is known of the coefficients, and Q is random with
    the covariance n (n + 1) / 2 of the forms of two removals x and y, n = x^T K y. With K the identity, n is the number
    of blocks that both take, and all entries of Q are independent and equally large. Here K also says that neighbours
    resemble each other (`resemblance`). The mean of this Gaussian process is again a quadratic form: the model of BOCS
    (Baptista and Poloczek 2018) with a Gaussian prior.

    removed: (K, N), one row for each value. values: (K,). basis: (K, B); columns may depend on each other.
    noise: (K,), the variances of the values relative to each other; None: they are equal.
    blocks: where they are of several kinds, only those of one kind resemble each other; sub-layers by their blocks.
    ratio: that of an earlier fit; None: the one of largest restricted likelihood.
    """
    x = removed.astype(np.float64)
    images = x @ resemblance(x.shape[1], blocks)  # (K, N)
    shared = images @ x.T
    kernel = shared * (shared + 1) / 2  # (K, K)
    kernel /= kernel.diagonal().mean()
    scales = np.ones(len(values)) if noise is None else noise / noise.mean()
    if ratio is None:
        ratio = _most_likely_ratio(kernel, values, basis, scales)

    # Generalised least squares: the weights are the inverse covariance times what the basis leaves.
    solved = np.linalg.solve(ratio * kernel + np.diag(scales), np.column_stack([values, basis]))
    y, columns = solved[:, 0], solved[:, 1:]
    coefficients = np.linalg.lstsq(basis.T @ columns, basis.T @ y, rcond=1e-10)[0]
    weights = y - columns @ coefficients

    # x^T matrix x = sum_k weights_k kernel(x, x_k), as x_i^2 = x_i.
    unit = (shared.diagonal() * (shared.diagonal() + 1) / 2).mean()
    weights *= ratio / unit
    matrix = ((images.T * weights) @ images + np.diag(weights @ images)) / 2
    return QuadraticFit((matrix + matrix.T) / 2, coefficients, ratio)


def resemblance(num_blocks: int, blocks: Sequence[Block] | None = None) -> Floats:
    """(N, N): the prior correlation between the coefficients of two blocks; positive definite, 1 on the diagonal."""
    place = np.arange(num_blocks) if blocks is None else np.array(list(map(block_of, blocks)))
    alike = ALIKE * PER_BLOCK ** np.abs(place[:, None] - place)
    if blocks is not None:
        kinds = np.array([block.kind for block in blocks])
        alike *= kinds[:, None] == kinds
    return np.asarray(alike + (1 - ALIKE) * np.eye(num_blocks))


def _most_likely_ratio(kernel: Floats, values: Floats, basis: Floats, scales: Floats) -> float:
    """The ratio of largest restricted likelihood, on an evenly spread part of the measurements."""
    some = np.linspace(0, len(values) - 1, min(len(values), SEARCH_ROWS)).astype(np.int64)
    root = np.sqrt(scales[some])
    whitened = kernel[np.ix_(some, some)] / (root[:, None] * root)
    y, columns = values[some] / root, basis[some] / root[:, None]

    # Where the basis can say anything, only the rest is left to the form and the noise.
    left, singular, _ = np.linalg.svd(columns)
    rank = int((singular > 1e-9 * singular[0]).sum())
    free = left[:, rank:]  # (rows, rows - rank), orthonormal
    if not free.shape[1]:
        return 1.0
    eigenvalues, vectors = np.linalg.eigh(free.T @ whitened @ free)
    rest = (vectors.T @ (free.T @ y)) ** 2  # (rows - rank,)

    # The variance of the noise that is most likely at each ratio is put in.
    likelihoods = []
    for ratio in RATIOS:
        variances = 1 + ratio * np.maximum(eigenvalues, 0)
        level = max(float((rest / variances).mean()), 1e-300)
        likelihoods.append(-len(rest) * np.log(level) - np.log(variances).sum())
    return float(RATIOS[int(np.argmax(likelihoods))])
