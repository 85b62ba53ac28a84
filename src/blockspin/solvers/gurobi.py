"""Gurobi, for those who have a licence: its mixed-integer quadratic solver, with the solution pool for the spectrum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import RemovalProblem
from .spectrum import SearchResult, Statistics


def gurobi(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest removals, proven to Gurobi's own tolerances; needs the extra 'solvers' and a licence for the size.

    Raises:
        ValueError: it is not installed, has no licence, or found nothing in the time it had.
    """
    try:
        import gurobipy as gp
    except ImportError:
        raise ValueError("solver='gurobi' needs gurobipy: pip install 'blockspin[solvers]'") from None
    try:
        return _optimised(gp, problem, states, time_limit, seed)
    except gp.GurobiError as error:
        raise ValueError(f"solver='gurobi' failed ({error}); choose another (--solver)") from error


def _optimised(gp: Any, problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    # Scaled to about 1, because Gurobi's tolerances are absolute.
    r = problem.reduced
    scale = max(float(np.abs(r.quadratic).max()), float(np.abs(r.linear).max())) or 1.0
    with gp.Env(params={"OutputFlag": 0}) as environment, gp.Model(env=environment) as model:
        model.Params.Seed, model.Params.MIPGap, model.Params.MIPGapAbs = seed, 0.0, 1e-9
        model.Params.PoolSearchMode, model.Params.PoolSolutions = 2, states
        model.Params.TimeLimit = math.inf if time_limit is None else time_limit

        x = model.addMVar(len(r.block), vtype="B")
        model.setObjective(x @ (r.quadratic / scale) @ x + (r.linear / scale) @ x)
        for g, count in enumerate(r.quota):
            number = (r.group == g).astype(float) @ x
            model.addConstr(number == count if r.exactly else number <= count)
        for weight, least in zip(r.weight, r.least, strict=True):
            largest = max(float(weight.max()), 1.0)
            model.addConstr((weight / largest) @ x >= least / largest)

        model.optimize()
        solutions = [_solution(model, x, k) for k in range(model.SolCount)]
        rows = np.array(solutions)  # (number of solutions, n)
        least, done = float(model.ObjBound) * scale, model.Status == gp.GRB.OPTIMAL
        statistics: Statistics = {"nodes": float(model.NodeCount), "pool": int(model.SolCount)}

    if not len(rows):
        raise ValueError(f"Gurobi found no removal within {time_limit} s; give it longer (--time-limit)")
    if not done:
        return SearchResult(rows, least + r.constant, statistics | {"stopped": "time limit"})

    worst = max(map(problem.energy, problem.blocks_of(rows)))
    return SearchResult(rows, worst if len(rows) == states else np.inf, statistics)


def _solution(model: Any, x: Any, number: int) -> NDArray[np.bool_]:
    model.Params.SolutionNumber = number
    return np.asarray(x.Xn) > 0.5
