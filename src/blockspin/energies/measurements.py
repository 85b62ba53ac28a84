"""The KL divergences of removals that energies are fitted to: measured once, kept in a journal, counted in passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..journal import Journal
from ..model.batches import BatchSize
from ..model.known import KnownValues
from ..model.passes import num_passes
from ..model.quality import kl, measured_in_sweeps
from ..model.tracing import TracedModel
from ..problem import Floats, Removal, rows_of
from ..processes import num_processes

SINGLES_SAMPLES = 2  # on which every single block is removed
FLOOR = 1e-6  # KL divergences are not taken to be smaller than this share of the largest, so that all have a logarithm


class Measurements:
    """What has been measured, a removal on a sample at a time.

    removals, samples, divergences: of each measurement in order; the sample by its place in the list of samples, the KL
        divergence from the whole model in nats a token.
    singles: (N,) KL divergence without each block, the mean over the first samples.
    passes: what it has cost, in passes of the whole model over one sample; what the journal holds counts too.
    batch_size: of the single removals; the others are measured on one sample at a time.

    Raises:
        ValueError: unusable samples, or a divergence that is NaN or infinite.
    """

    def __init__(self, traced: TracedModel, samples: Sequence[Tensor], journal: Journal, batch_size: BatchSize) -> None:
        self.removals: list[Removal] = []
        self.samples: list[int] = []
        self.divergences: list[float] = []
        self.passes = 0.0

        self._traced = traced
        self._tokens = samples
        self._known = KnownValues(traced, samples, kl, journal, batch_size)

        first = list(range(min(SINGLES_SAMPLES, len(samples))))
        each = [(block,) for block in range(traced.num_units)]
        self.singles: Floats = self._measured(each, first).mean(axis=1)

    def prepare(self, plans: Sequence[Sequence[Removal]]) -> None:
        """Measure what will be added of the first samples, in one sweep where the weights of blocks are offloaded.

        plans: for each sample the removals. Elsewhere nothing is gained, and `add` measures them; several processes
            share what it measures.
        """
        if not (self._traced.is_offloaded and self._traced.shares_passes) or num_processes() > 1:
            return

        wanted: dict[int, list[Removal]] = {}
        for sample, removals in enumerate(plans):
            unknown = self._known.unknown(removals, [sample])
            if unknown:
                wanted[sample] = unknown

        jobs = [(unknown, self._tokens[sample]) for sample, unknown in wanted.items()]
        for (sample, unknown), values in zip(wanted.items(), measured_in_sweeps(self._traced, jobs, kl), strict=True):
            self._known.keep(unknown, [sample], values)

    def add(self, removals: Sequence[Removal], sample: int) -> None:
        """Measure these removals on one sample.

        Raises:
            ValueError: a divergence is NaN or infinite.
        """
        values = self._measured(removals, [sample])[:, 0]
        self.removals += removals
        self.samples += [sample] * len(removals)
        self.divergences += values.tolist()

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32], Floats]:
        """The removals as rows of zeros and ones (K, N), the samples (K,), the divergences (K,)."""
        removed = rows_of(self.removals, self._traced.num_units).astype(np.uint8)
        return removed, np.array(self.samples, dtype=np.uint32), np.array(self.divergences)

    def times(self) -> Counter[Removal]:
        """How often each removal was measured."""
        return Counter(self.removals)

    def _measured(self, removals: Sequence[Removal], samples: Sequence[int]) -> Floats:
        """(number of removals, number of samples): the divergences, which cost as much where they were known."""
        self.passes += num_passes(self._traced, [(), *removals]) * len(samples)
        return self._known.of(removals, samples)


def logarithms(divergences: Floats) -> Floats:
    """Natural logarithms; of what is zero or nearly so, that of a small share of the largest."""
    smallest = max(FLOOR * float(divergences.max()), float(np.finfo(np.float64).tiny))
    return np.asarray(np.log(np.maximum(divergences, smallest)))
