"""What every solver returns: the lowest removals in order, and what is proven about them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import replacing
from ..problem import Removal, RemovalProblem
from ..tables import Column, Table, ranges

Statistics = dict[str, float | int | str]


class SearchResult(NamedTuple):
    """A solver's raw outcome. Every allowed removal outside rows has at least energy bound (-inf: nothing proven)."""

    rows: NDArray[np.bool_]  # (K, n) over the reduced problem's variables, in any order, distinct
    bound: float
    statistics: Statistics


@dataclass(frozen=True)
class State:
    """A removal and its energy."""

    removed: Removal
    energy: float


@dataclass(frozen=True, repr=False)
class Spectrum:
    """The lowest-energy distinct removals, ascending in energy; equal energies in order of their block indices.

    num_proven: so many leading states are certified: no other removal lies below them (by more than resolution).
    lower_bound: no allowed removal has less energy than this; -inf where the solver proves nothing.
    resolution: energies closer than this are equal as far as float64 can tell.
    statistics: the search in numbers; "stopped" is there only if it ended early.
    """

    states: tuple[State, ...]
    num_proven: int
    lower_bound: float
    solver: str
    seconds: float
    resolution: float
    statistics: Statistics = field(default_factory=dict)

    def __repr__(self) -> str:
        """In one line: the lowest state, not all of them."""
        lowest, number = self.states[0], len(self.states)
        found = f"CBO:0 removes {ranges(lowest.removed)}, energy {lowest.energy:.6g}"
        return f"Spectrum({number} states, {self.num_proven} of them proven; {found})"

    @property
    def gap(self) -> float:
        """Best energy minus lower bound: 0 for a certified ground state."""
        return self.states[0].energy - self.lower_bound

    def summary(self) -> str:
        """One or two sentences: who searched, for how long, what is proven."""
        searched = f"{self.statistics['chosen']}," if "chosen" in self.statistics else self.solver
        took = f"{searched} took {self.seconds:.2f} s"
        if "stopped" in self.statistics:
            took += f" (stopped early: {self.statistics['stopped']})"

        if self.num_proven == len(self.states):
            proven = f"all {self.num_proven} states are proven to be the lowest"
        elif self.num_proven:
            proven = f"the first {self.num_proven} of {len(self.states)} states are proven to be the lowest"
        elif math.isfinite(self.lower_bound):
            proven = f"best found {self.states[0].energy:.6g}, no removal is below {self.lower_bound:.6g}"
        else:
            proven = "nothing is proven; the solver 'exact' would do it"
        return f"{took}; {proven}."

    def table(self, limit: int | None = None) -> Table:
        """The states in order, the first `limit` of them; None: all."""
        columns = [Column("state"), Column("energy"), Column("above 0"), Column("proven")]
        columns.append(Column("removed", words=True))

        rows = []
        for k, state in enumerate(self.states[:limit]):
            above = state.energy - self.states[0].energy
            proven = "yes" if k < self.num_proven else "no"
            rows.append([f"CBO:{k}", f"{state.energy:.6g}", f"{above:.3g}", proven, ranges(state.removed)])

        left_out = len(self.states) - len(rows)
        return Table(columns, rows, caption=f"... and {left_out} more states" if left_out else "")

    def render(self, limit: int | None = 20, width: int | None = None) -> str:
        """The table for a terminal of `width` characters, and below it the summary; limit=None prints every state."""
        return f"{self.table(limit).text(width)}\n{self.summary()}"

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all. Raises ValueError if the file cannot be written."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read what save wrote. Raises ValueError if the file is no spectrum."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold; an infinite lower bound is null."""
        values = asdict(self) | {"lower_bound": self.lower_bound if math.isfinite(self.lower_bound) else None}
        values["states"] = []
        for state in self.states:
            values["states"].append({"removed": list(state.removed), "energy": state.energy})
        return values

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.as_json(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Spectrum:
        """The inverse of to_json. Raises ValueError if the text is no spectrum."""
        try:
            values = json.loads(text)
            states = []
            for state in values.pop("states"):
                states.append(State(tuple(state["removed"]), state["energy"]))
            bound = values.pop("lower_bound")
            return cls(states=tuple(states), lower_bound=-math.inf if bound is None else bound, **values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a spectrum file ({error})") from None


def spectrum_of(problem: RemovalProblem, result: SearchResult, states: int, solver: str, seconds: float) -> Spectrum:
    """The spectrum of a solver's outcome: energies recomputed, sorted, cut to so many states, proofs counted."""
    removals = problem.blocks_of(result.rows)
    assert len(set(removals)) == len(removals), "a solver returned a removal twice"

    found = []
    for removed in removals:
        found.append((problem.energy(removed), removed))
    ranked = sorted(found)
    kept = [State(removed, energy) for energy, removed in ranked[:states]]

    # Proven is a state that nothing outside the list can lie below.
    bound = min(result.bound, ranked[states][0]) if len(ranked) > states else result.bound
    proven = 0
    for state in kept:
        if state.energy <= bound + problem.resolution:
            proven += 1
    return Spectrum(
        states=tuple(kept),
        num_proven=proven,
        lower_bound=kept[0].energy if proven else float(bound),
        solver=solver,
        seconds=seconds,
        resolution=problem.resolution,
        statistics=result.statistics,
    )
