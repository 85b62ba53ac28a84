"""What a measure says of removals, sample by sample: measured once, and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..journal import Journal
from ..problem import Floats, Removal
from .batches import BatchSize
from .quality import Measure, measured
from .tracing import TracedModel

FORMAT = 2  # of the entries of a journal; belongs to its identity


class KnownValues:
    """The value of a measure for each removal on each sample, measured when it is first asked for.

    samples: 1-D token ids; below, a sample is named by its place in this list.
    measure: of the values it gives a token, the first counts.
    journal: keeps what was measured, so that the next process knows it.
    """

    def __init__(
        self, traced: TracedModel, samples: Sequence[Tensor], measure: Measure, journal: Journal, batch_size: BatchSize
    ) -> None:
        self._traced = traced
        self._samples = samples
        self._measure = measure
        self._journal = journal
        self._batch_size = batch_size

        self._values: dict[tuple[Removal, int], float] = {}
        for entry in journal.entries():
            removals = [tuple(removed) for removed in entry["removals"]]
            self._remember(removals, entry["samples"], np.array(entry["values"]))

    def of(self, removals: Sequence[Removal], samples: Sequence[int]) -> Floats:
        """(number of removals, number of samples): what is not known is measured.

        Raises:
            ValueError: unusable samples or removals, or a value that is NaN or infinite.
        """
        unknown = self.unknown(removals, samples)
        if unknown:
            tokens = [self._samples[sample] for sample in samples]
            found = measured(self._traced, unknown, tokens, self._measure, batch_size=self._batch_size)
            self.keep(unknown, samples, found[..., 0])

        values = np.zeros((len(removals), len(samples)))
        for row, removed in zip(values, removals, strict=True):
            row[:] = [self._values[removed, sample] for sample in samples]
        return values

    def unknown(self, removals: Sequence[Removal], samples: Sequence[int]) -> list[Removal]:
        """The removals that were not measured on all of these samples."""
        return [removed for removed in removals if any((removed, sample) not in self._values for sample in samples)]

    def keep(self, removals: Sequence[Removal], samples: Sequence[int], values: Floats) -> None:
        """Add what was measured elsewhere. values: (number of removals, number of samples)."""
        self._remember(removals, samples, values)
        self._journal.append({"removals": removals, "samples": list(samples), "values": values.tolist()})

    def _remember(self, removals: Sequence[Removal], samples: Sequence[int], values: Floats) -> None:
        for removed, row in zip(removals, values.tolist(), strict=True):
            for sample, value in zip(samples, row, strict=True):
                self._values[removed, sample] = value
