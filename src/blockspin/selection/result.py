"""What a selection found: the choice, everything that was tried, and their file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..problem import Removal
from ..scatter import plus_minus
from ..solvers.candidates import Candidate
from ..tables import Column, Table, ranges
from .ledger import Ledger

SHOWN = 12  # trials in a table


@dataclass(frozen=True)
class Trial:
    """A removal that was measured.

    loss, standard_error: the objective, by default the KL divergence from the whole model in nats a token, on
    num_samples samples. above, above_error: how far it is above the best plain one on the samples that both have.
    Errors are None where there is only one sample. repaired: the objective after a repair, of the last candidates if
    the choice is made on it.
    """

    removed: Removal
    source: str
    energy: float | None
    loss: float
    standard_error: float | None
    num_samples: int
    above: float
    above_error: float | None
    repaired: float | None = None


@dataclass(frozen=True)
class Selection:
    """What was chosen, all that was tried (the best first), and what it cost.

    passes: forward passes of the whole model over the selection samples that would cost as much.
    budget: how many were allowed; a round that began within them is finished. None: nothing was polished.
    repair_passes: what the repairs of the last candidates cost on top, in the same unit.
    """

    chosen: Candidate
    trials: tuple[Trial, ...]
    objective: str
    passes: float
    seconds: float
    budget: float | None = None
    repair_passes: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(path: str | Path) -> Selection:
        """What a run wrote as candidates.json.

        Raises:
            ValueError: the file is something else.
        """
        try:
            values = json.loads(Path(path).read_text())
            trials = tuple(Trial(**_with_tuple(trial)) for trial in values["trials"])
            chosen = Candidate(**_with_tuple(values["chosen"]))
            return Selection(
                chosen,
                trials,
                values["objective"],
                values["passes"],
                values["seconds"],
                values.get("budget"),
                values.get("repair_passes", 0.0),
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a selection of blockspin ({error})") from error

    def table(self, limit: int = SHOWN) -> Table:
        """The best trials. What was removed comes first: a source may have several, and wide tables repeat it."""
        after_repair = any(trial.repaired is not None for trial in self.trials)
        above = "above the best" if after_repair else "above the chosen"
        columns = [Column("removed", words=True), Column("source", words=True)]
        columns += [Column(heading) for heading in ("energy", self.objective, above, "samples")]
        if after_repair:
            columns.append(Column("repaired"))

        rows = []
        for trial in self.trials[:limit]:
            cells = [
                ranges(trial.removed),
                trial.source,
                "" if trial.energy is None else f"{trial.energy:.4g}",
                f"{trial.loss:.4f}{plus_minus(trial.standard_error)}",
                f"{trial.above:.4f}{plus_minus(trial.above_error)}",
                str(trial.num_samples),
            ]
            if after_repair:
                cells.append("" if trial.repaired is None else f"{trial.repaired:.4f}")
            rows.append(cells)
        return Table(columns, rows)

    def summary(self) -> str:
        beyond = ""
        if self.budget is not None and self.passes > self.budget:
            beyond = f", where the budget was {self.budget:g}: a round that has begun is finished"
        repaired = {trial.removed: trial.repaired for trial in self.trials if trial.repaired is not None}
        after = ""
        if self.chosen.removed in repaired:
            after = f", {repaired[self.chosen.removed]:.4f} after a repair ({self.repair_passes:.1f} more passes)"
        return (
            f"{len(self.trials)} removals measured in {self.seconds:.0f} s ({self.passes:.1f} passes over the "
            f"selection samples{beyond}); chosen: {self.chosen.source}, {self.objective} {self.chosen.loss:.4f}{after}."
        )


def trial_of(ledger: Ledger, candidate: Candidate, best: Removal) -> Trial:
    """What the ledger says of a candidate, compared with the best."""
    removed = candidate.removed
    above, above_error = ledger.difference(removed, best)
    has_scatter = len(ledger.weights) > 1  # of a single sample, or a function's value, no error is known
    return Trial(
        removed=removed,
        source=candidate.source,
        energy=candidate.energy,
        loss=ledger.mean(removed),
        standard_error=_finite(ledger.standard_error(removed)) if has_scatter else None,
        num_samples=len(ledger.values[removed]),
        above=above,
        above_error=_finite(above_error) if has_scatter else None,
    )


def _with_tuple(values: dict[str, Any]) -> dict[str, Any]:
    """The list of blocks of a file as a removal."""
    return {**values, "removed": tuple(values["removed"])}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
