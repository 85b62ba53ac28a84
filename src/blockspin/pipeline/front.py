"""The least energy for every budget: one solve for each point of a front, from energies that were computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..config import SolvingSettings
from ..energies import Energies
from ..files import replacing, write_json
from ..page import BLUE, LINE
from ..problem import Budget, Goal, Removal
from ..progress import console, track
from ..tables import Column, Table, ranges
from .stages import find_states, note_goal, problem_of

DEEPEST = 0.5  # the share of what the units have together that the last point takes away


@dataclass(frozen=True)
class Point:
    """The lowest removal that leaves at most so much: `left` of what is counted, and its energy.

    lower_bound: no allowed removal has less energy. It is the energy itself where that is proven.
    """

    at_most: int
    left: int
    energy: float
    lower_bound: float
    removed: Removal


def pareto_front(
    energies: Energies,
    remove: Goal | None,
    settings: SolvingSettings,
    budgets: Sequence[Budget],
    swept: Budget,
    points: int,
) -> list[Point]:
    """The lowest removal for budgets from nothing to half of what the units have; fewer points where no more can go.

    swept: what is counted. remove, budgets: goals that every point keeps besides. Energies rise from point to point,
    because what one point allows, all before it allow too.

    Raises:
        ValueError: the other goals are out of reach, or even the first point is.
    """
    note_goal(energies, "any budget")
    found: list[Point] = []
    most = DEEPEST * sum(swept.weight)
    for number in track(range(1, points + 1), "Front", points):
        least = max(1, round(most * number / points))
        budget = replace(swept, goal=f"{swept.goal}, point {number}", least=least)
        try:
            problem = problem_of(energies, remove, settings, [*budgets, budget])
        except ValueError as error:
            if not found:
                raise
            console.print(f"The front ends before {swept.text(swept.total - least)}: {error}.", soft_wrap=True)
            break

        spectrum = find_states(problem, replace(settings, states=1))
        (state,) = spectrum.states
        left = swept.total - sum(swept.weight[i] for i in state.removed)
        found.append(Point(swept.total - least, left, state.energy, spectrum.lower_bound, state.removed))
    return found


def front_table(points: Sequence[Point], swept: Budget) -> Table:
    """A row for each point."""
    rows = []
    for point in points:
        proven = "yes" if point.lower_bound == point.energy else f"above {point.lower_bound:.6g}"
        left = f"{swept.text(point.left)} {point.left / swept.total:.1%}"
        energy = f"{point.energy:.6g}"
        rows.append([swept.text(point.at_most), left, energy, proven, str(len(point.removed)), ranges(point.removed)])
    columns = [Column("at most"), Column("left"), Column("energy"), Column("proven"), Column("removed")]
    return Table([*columns, Column("which", words=True)], rows, caption=f"of {swept.text(swept.total)} ({swept.goal})")


def front_figure(points: Sequence[Point], swept: Budget) -> Figure:
    """Energy against what is left; steps, because a budget between two points needs the removal of the second."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    left = [100 * point.left / swept.total for point in points]
    axes.plot(left, [point.energy for point in points], "o-", color=BLUE, ms=5, drawstyle="steps-pre")
    axes.invert_xaxis()
    axes.set(xlabel=f"left, % of {swept.text(swept.total)} ({swept.goal})", ylabel="energy: what the removal costs")
    axes.grid(color=LINE, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_front(points: Sequence[Point], swept: Budget, out: Path) -> Path:
    """Write the front as JSON to `out` and its figure beside it; returns the path of the figure."""
    write_json(out, front_json(points, swept))
    picture = out.with_suffix(".svg")
    with replacing(picture) as temporary:
        front_figure(points, swept).savefig(temporary, format="svg")
    return picture


def front_json(points: Sequence[Point], swept: Budget) -> dict[str, Any]:
    """For programs: what is counted, and the points; times in nanoseconds."""
    unit = "ns" if swept.unit == "s" else swept.unit
    return {"counted": swept.goal, "unit": unit, "whole": swept.total, "points": [asdict(point) for point in points]}
