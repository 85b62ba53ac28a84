"""What removals can be expected to cost on other samples: what was measured, and what a form says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..problem import Floats, Removal, RemovalProblem, rows_of
from .ledger import Ledger

# The standard error of a quadratic form on a logarithmic scale; on others, as a share of the scatter of all removals
# that were measured.
MISFIT = 0.05
PRIOR_DEGREES = 2.0  # degrees of freedom that the scatter of all removals is worth beside a removal's own


@dataclass(frozen=True)
class Expectation:
    """How far the objective of each removal is expected to be above a common reference, and the standard errors.

    values, errors: (K,), of KL divergences the logarithms.
    """

    values: Floats
    errors: Floats

    def ranked(self) -> list[int]:
        """Places in the list of removals, that of the lowest first."""
        return [int(k) for k in np.argsort(self.values, kind="stable")]

    def num_promising(self, clearly: float) -> int:
        """How many are not above the lowest by more than so many standard errors of the difference."""
        lowest = int(self.values.argmin())
        above = self.values - self.values[lowest]
        return int((above <= clearly * np.hypot(self.errors, self.errors[lowest])).sum())


def expectation(ledger: Ledger, removals: Sequence[Removal], form: RemovalProblem | None) -> Expectation:
    """What was measured, drawn towards a form by as much as it is noise.

    A measurement is the form, plus its misfit, plus the noise of few samples. Of what a removal differs from the form
    by, the misfit's share of the variance is there on other samples too: the lowest of many measurements is often only
    the luckiest.

    form: its energies are in the units of `Ledger.change`, but for a constant; None: nothing is known but what was
        measured.
    """
    y, errors = changes(ledger, removals)
    if form is None:
        return Expectation(y, errors)

    energies = form.energies(rows_of(removals, form.num_blocks))  # (K,)
    energies += np.average(y - energies, weights=numbers_of_samples(ledger, removals))

    misfit = misfit_of(ledger)
    lasting = misfit**2 / np.maximum(errors**2 + misfit**2, np.finfo(np.float64).tiny)  # (K,)
    return Expectation(energies + lasting * (y - energies), errors * np.sqrt(lasting))


def misfit_of(ledger: Ledger) -> float:
    """The standard error of a form at removals that are measured without any, in the units of `Ledger.change`."""
    if ledger.logarithmic:
        return MISFIT
    best = ledger.best()
    return MISFIT * float(np.std([ledger.change(removed, best)[0] for removed in ledger.values]))


def changes(ledger: Ledger, removals: Sequence[Removal]) -> tuple[Floats, Floats]:
    """Changes from the best measured removal, and what each removal's few samples add to their errors, (K,) each.

    Changes are paired by samples, so their errors are much smaller than those of the values. Half of the variance of a
    difference is that of the best, whose difference from itself says nothing of it: it counts as measured on as many
    samples as the others.

    The scatter of a removal on two samples can be tiny by chance. Here it counts for its degrees of freedom, beside
    the mean of all (the moderated variance of Smyth, 2004).
    """
    best = ledger.best()
    y, errors = np.array([ledger.change(removed, best) for removed in removals]).T.copy()  # (K,) each
    number = numbers_of_samples(ledger, removals)
    of_best = np.array([removed == best for removed in removals])
    number[of_best] = np.median(number)

    shows_scatter = np.isfinite(errors) & ~of_best & (number > 1)
    if not shows_scatter.any():  # exact values of a function, or one sample each
        errors[~np.isfinite(errors)] = y.std()
        return y, errors

    degrees = np.where(shows_scatter, number - 1, 0.0)  # (K,)
    scatter = np.where(shows_scatter, errors, 0.0) ** 2 * number / 2  # (K,), variances of one sample
    of_all = np.average(scatter, weights=degrees)
    moderated = (PRIOR_DEGREES * of_all + degrees * scatter) / (PRIOR_DEGREES + degrees)
    return y, np.sqrt(moderated / number)


def numbers_of_samples(ledger: Ledger, removals: Sequence[Removal]) -> Floats:
    """(K,): on how many samples each removal was measured."""
    return np.array([len(ledger.values[removed]) for removed in removals], dtype=np.float64)
