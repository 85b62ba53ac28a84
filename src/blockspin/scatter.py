"""How far a mean may be off, from the scatter of what it is the mean of, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def standard_error(
    values: Sequence[float] | NDArray[np.float64], weights: Sequence[float] | NDArray[np.float64] | None = None
) -> float | None:
    """The standard error of the mean of independent values, from their scatter; None for a single value.

    Of a weighted mean it is that of a ratio of two means (Cochran, Sampling Techniques, eq. 2.47): the weights are
    drawn with the values.

    values: (number,). weights: (number,) of each in the mean, up to a common factor; None: they are equal.
    """
    number = len(values)
    if number < 2:
        return None
    shares = np.ones(number) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    apart = np.asarray(values) - shares @ np.asarray(values)
    return float(np.sqrt(shares**2 @ apart**2 * number / (number - 1)))


def plus_minus(error: float | None, digits: int = 4) -> str:
    """A standard error behind a number: " ±0.0123"; where it is not known, as of a single value, a dash."""
    return " ±–" if error is None else f" ±{error:.{digits}f}"
