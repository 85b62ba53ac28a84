"""What a comparison finds: choices, their measures, and the file that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..evaluation.scores import Score, mean_scores
from ..files import write_json
from ..problem import Goal, Removal, Units
from ..scatter import standard_error
from .cost import MethodCost

ORIGINAL = "original"  # the method that removes nothing
RANDOM = "random"  # the method with several draws
SELECTED = "CBO, selected"  # the whole method of this package, rather than a part of it or another's
AVERAGED = ("loss", "kl", "agreement", "num_parameters", "num_bytes", "tokens_per_second", "passes", "seconds")


def energy_key(energy: str, goal: str) -> str:
    """Under which energies and their cost are kept: with the goal where they are made for one."""
    return f"{energy}-{goal}" if energy == "fitted" else energy


def file_part(name: str) -> str:
    """A goal, or the key of energies, as a part of a file's name."""
    return name.replace("--", "").replace(", ", "+").replace(" ", "-")


def goal_title(goal: str) -> str:
    """What is to be done for a goal: "remove 8", "meet --target-size 5GB"."""
    return f"meet {goal}" if goal.startswith("--") else f"remove {goal}"


@dataclass(frozen=True)
class Asked:
    """What a goal asks for: what to remove, None where targets decide alone, and the targets by their settings."""

    remove: Goal | None
    targets: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """What a method removes for a goal ("8", "moe=2", "25%", "--target-size 5GB"), and what finding it cost.

    windows: of sliding-window merging, the (lowest, highest) blocks that were merged into one.
    """

    method: str
    goal: str
    removed: Removal
    energy: float | None
    windows: tuple[tuple[int, int], ...]
    passes: float
    seconds: float


@dataclass(frozen=True)
class Row(Choice):
    """A choice with its measures on the evaluation samples; see `quality.Quality` and `perplexity.Evaluation`.

    In a mean of several draws the errors are those of the mean, from the scatter between the draws.
    """

    loss: float
    kl: float
    agreement: float
    num_parameters: int
    num_bytes: int
    tokens_per_second: float
    scores: tuple[Score, ...] = ()
    above_error: float | None = None
    kl_error: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def is_ours(self) -> bool:
        """Whether it is of the whole method of this package."""
        return self.method == SELECTED

    def measured(self, objective: str, original: Row) -> tuple[float, float | None]:
        """The objective on the evaluation samples and its standard error: kl, or the loss above the original's."""
        if objective == "kl":
            return self.kl, self.kl_error
        return self.loss - original.loss, self.above_error

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class Repaired:
    """A removal after a repair, on the evaluation samples; see `quality.Quality`.

    repair: its name. seconds: that it took.
    """

    goal: str
    removed: Removal
    repair: str
    seconds: float
    loss: float
    kl: float
    agreement: float
    above_error: float | None = None
    kl_error: float | None = None


@dataclass(frozen=True)
class LandscapePoint:
    """A removal of the landscape: both energies of it, and what it does on the selection samples.

    drawn: the names of the energies whose low state it is, "random", or "original" for the whole model.
    """

    removed: Removal
    energies: dict[str, float]
    loss: float
    kl: float
    drawn: tuple[str, ...]


@dataclass
class Comparison:
    """Everything `comparison.json` holds.

    settings: of the run. costs: of what several methods share. choices: made so far. rows: the measured choices.
    repaired: removals after repairs. goals: what each asks for, by its name; of older files empty.
    landscape: by goal. left_out: "method, goal" -> why it has no result. about: machine, date, data, by heading.
    """

    settings: dict[str, Any]
    costs: dict[str, MethodCost] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    landscape: dict[str, list[LandscapePoint]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    repaired: list[Repaired] = field(default_factory=list)
    goals: dict[str, Asked] = field(default_factory=dict)

    @property
    def units(self) -> Units:
        """What the numbers of its removals stand for; older files hold blocks."""
        found: Units = self.settings.get("units", "blocks")
        return found

    def choices_for(self, goal: str) -> list[Choice]:
        return [choice for choice in self.choices if choice.goal == goal]

    def save(self, path: Path) -> None:
        """Write the file whole."""
        values = asdict(self)
        for row, written in zip(self.rows, values["rows"], strict=True):
            written["perplexity"] = row.perplexity
        write_json(path, values)

    @staticmethod
    def load(path: Path) -> Comparison:
        """What `save` wrote.

        Raises:
            ValueError: the file is no comparison.
        """
        try:
            values = json.loads(path.read_text())
            comparison = Comparison(values["settings"], left_out=values["left_out"], about=values.get("about", {}))
            for name, asked in values.get("goals", {}).items():
                comparison.goals[name] = Asked(**asked)
            for name, cost in values["costs"].items():
                comparison.costs[name] = MethodCost(**cost)
            for choice in values["choices"]:
                comparison.choices.append(Choice(**_typed(choice)))
            for row in values["rows"]:
                comparison.rows.append(_row(row))
            for row in values.get("repaired", []):
                comparison.repaired.append(Repaired(**{**row, "removed": tuple(row["removed"])}))
            for goal, points in values["landscape"].items():
                comparison.landscape[goal] = list(map(_point, points))
            return comparison
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a comparison of blockspin ({error})") from error


def averaged(rows: Sequence[Row], objective: str = "loss") -> list[Row]:
    """One row for each method and goal: several draws become their mean, with no blocks.

    objective: "kl" or "loss", whose lowest value comes first in a goal, after the original.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.goal, row.method), []).append(row)

    means = []
    for draws in groups.values():
        if len(draws) == 1:
            means += draws
            continue
        numbers = {}
        for name in AVERAGED:
            numbers[name] = sum(map(attrgetter(name), draws)) / len(draws)
        mean = replace(draws[0], **numbers, removed=(), energy=None, scores=mean_scores([row.scores for row in draws]))
        above_error, kl_error = standard_error([row.loss for row in draws]), standard_error([row.kl for row in draws])
        means.append(replace(mean, above_error=above_error, kl_error=kl_error))

    # Goals stay in the order in which they were asked for.
    goals = list(dict.fromkeys(row.goal for row in rows))
    return sorted(means, key=lambda row: (goals.index(row.goal), row.method != ORIGINAL, getattr(row, objective)))


def _row(values: dict[str, Any]) -> Row:
    known = {**values, "scores": tuple(map(Score.from_json, values["scores"]))}
    del known["perplexity"]  # a property
    return Row(**_typed(known))


def _point(values: dict[str, Any]) -> LandscapePoint:
    return LandscapePoint(**{**values, "removed": tuple(values["removed"]), "drawn": tuple(values["drawn"])})


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Lists of a file as the tuples of a choice."""
    return {**values, "removed": tuple(values["removed"]), "windows": tuple(map(tuple, values["windows"]))}
