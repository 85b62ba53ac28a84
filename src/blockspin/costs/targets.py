"""Goals in what the user counts, as budgets of the removal problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..problem import Block, Budget, Removal
from ..settings import flag
from ..tables import Column, Table, short
from ..targets import OF_TIME, TargetSettings, target_text
from .timing import TimeTable, check_table
from .units import UnitCosts, unit_costs

NANO = 1e-9  # times are counted in whole nanoseconds
NO_TIMES = "measure them with `blockspin profile MODEL --out table.json`, and give --profile table.json"


def quantity(name: str, costs: UnitCosts | None, times: TimeTable | None, batch: int, units: Sequence[Block]) -> Budget:
    """What a target counts, as a budget that asks for nothing yet; `name` is the setting of the target.

    Raises:
        ValueError: the cache of the model is not known.
    """
    if name in OF_TIME:
        assert times is not None, "times were read or measured"
        part = 1 if name == "target_speedup" else 0
        weight = tuple([round(times.kinds[unit.kind][part] / NANO) for unit in units])
        return Budget(flag(name), weight, 0, round(times.whole[part] / NANO), "s", NANO)

    assert costs is not None, "costs were looked up"
    if name == "target_params":
        return Budget(flag(name), costs.parameters, 0, costs.all_parameters)
    if name == "target_active_params":
        return Budget(flag(name), costs.active, 0, costs.all_active)
    if name == "target_size":
        return Budget(flag(name), costs.num_bytes, 0, costs.all_bytes, "B")

    if costs.cache_bytes is None:
        raise ValueError("--target-memory: the cache of this model cannot be told without running it")
    both = []
    for size, cache in zip(costs.num_bytes, costs.cache_bytes, strict=True):
        both.append(size + batch * cache)
    return Budget(flag(name), tuple(both), 0, costs.all_bytes + batch * sum(costs.cache_bytes), "B")


def budgets_for(
    targets: TargetSettings, units: Sequence[Block], costs: UnitCosts | None, times: TimeTable | None
) -> list[Budget]:
    """A budget for each target that is given; without times, for those of time none.

    costs, times: of these units.

    Raises:
        ValueError: the cache of the model is not known.
    """
    budgets = []
    for name, target in targets.targets.items():
        of_time = name in OF_TIME
        if of_time and times is None:
            continue
        whole = quantity(name, costs, times, targets.batch, units)
        if of_time:
            most = whole.total / target
        elif target < 1:
            most = target * whole.total
        else:
            most = target
        least = whole.total - math.floor(most)
        budgets.append(replace(whole, goal=target_text(name, target), least=least))
    return budgets


def goals_of(
    targets: TargetSettings,
    source: str | Path,
    units: Sequence[Block],
    times: TimeTable | None = None,
    *,
    trust_remote_code: bool = False,
) -> list[Budget]:
    """The budgets of a model's targets; what its units take is looked up.

    times: those that targets of time are stated in; without them such targets are left out.

    Raises:
        ValueError: times of another model, or a model that cannot be looked at.
    """
    costs = None
    if targets.needs_costs:
        costs = unit_costs(source, units, context=targets.context, trust_remote_code=trust_remote_code)
    if times is not None:
        check_table(times, units, targets.profile or "the table of times")
    return budgets_for(targets, units, costs, times)


def quantity_of(
    name: str, targets: TargetSettings, source: str | Path, units: Sequence[Block], times: TimeTable | None
) -> Budget:
    """What a target counts, of the units of a model, as a budget that asks for nothing.

    Raises:
        ValueError: as `goals_of` says.
    """
    costs = None
    if name not in OF_TIME:
        costs = unit_costs(source, units, context=targets.context)
    elif times is not None:
        check_table(times, units, targets.profile or "the table of times")
    return quantity(name, costs, times, targets.batch, units)


def read_times(targets: TargetSettings) -> TimeTable | None:
    """The table of --profile. Raises ValueError where it is not readable, or a target needs it and there is none."""
    if targets.profile is None and not targets.needs_times:
        return None
    if targets.profile is None:
        raise ValueError(f"--target-speedup needs times: {NO_TIMES}")
    return TimeTable.load(targets.profile)


@dataclass(frozen=True)
class Met:
    """A goal: what the whole model has of what it counts, what may be left, and what is left. Times are in seconds."""

    goal: str
    unit: str
    whole: float
    at_most: float
    left: float


def what_is_left(budgets: Sequence[Budget], removed: Removal) -> list[Met]:
    """For every goal what the model keeps without these units."""
    found = []
    for budget in budgets:
        left = budget.total - sum(budget.weight[i] for i in removed)
        at_most, scale = budget.total - budget.least, budget.scale
        found.append(Met(budget.goal, budget.unit, budget.total * scale, at_most * scale, left * scale))
    return found


def goals_table(met: Sequence[Met]) -> Table:
    """Goals down: what the model has, what may be left, what is left."""
    rows = []
    for one in met:
        left = f"{short(one.left, one.unit)} {one.left / one.whole:.1%}"
        rows.append([one.goal, short(one.whole, one.unit), short(one.at_most, one.unit), left])
    columns = [Column("goal", words=True), Column("whole model"), Column("at most"), Column("left")]
    return Table(columns, rows)


def asked_table(budgets: Sequence[Budget]) -> Table:
    """Goals down: what the model has, what may be left, what must go."""
    rows = []
    for budget in budgets:
        must_go = f"{budget.text(budget.least)} {budget.least / budget.total:.1%}"
        rows.append([budget.goal, budget.text(budget.total), budget.text(budget.total - budget.least), must_go])
    return Table([Column("goal", words=True), Column("whole model"), Column("at most"), Column("must go")], rows)
