"""Finds the lowest-energy removals of a problem, and says what it has proven about them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import numpy as np

from ..problem import Budget, RemovalProblem
from ..progress import console
from .anneal import anneal
from .enumerate import enumerate_all
from .exact import exact
from .gurobi import gurobi
from .spectrum import SearchResult, Spectrum, State, spectrum_of
from .tabu import tabu

__all__ = ["SOLVERS", "Spectrum", "State", "solve"]

SOLVERS: dict[str, Callable[[RemovalProblem, int, float | None, int], SearchResult]] = {
    "exact": exact,
    "enumerate": enumerate_all,
    "tabu": tabu,
    "anneal": anneal,
    "gurobi": gurobi,
}
FEW = 10**6  # so many candidates are enumerated at once

_SMALL = 12  # blocks of the problems whose solution compiles the kernels
_LONG = 10**9  # numbers from here on are shown as powers of ten
_NOTICED = 3.0  # seconds of compilation that are worth a line


def solve(
    problem: RemovalProblem, states: int = 20, solver: str = "auto", time_limit: float | None = None, seed: int = 0
) -> Spectrum:
    """The lowest-energy removals of a problem, in order: as many as asked for, or all if there are fewer.

    solver: a name in SOLVERS, or "auto", which certifies its answer if given the time.
    time_limit: seconds; the best found by then is returned, with what is proven about it.

    Raises ValueError for an unknown solver, and where a solver cannot take the problem.
    """
    if isinstance(states, bool) or not isinstance(states, (int, np.integer)) or states < 1:
        raise ValueError(f"states={states!r}: must be a whole number, at least 1")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit={time_limit}: must be a positive number of seconds, or None")
    if solver != "auto" and solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: must be auto or one of {', '.join(SOLVERS)} (--solver)")

    name = solver
    if solver == "auto":
        name = "enumerate" if problem.num_candidates <= FEW else "exact"

    if name != "gurobi":
        compile_kernels(name, problem.reduced.exactly)
    started = time.perf_counter()
    if len(problem.reduced.block):
        result = SOLVERS[name](problem, min(int(states), problem.num_candidates), time_limit, seed)
    else:  # only one removal is allowed
        result = SearchResult(np.zeros((1, 0), dtype=bool), math.inf, {})

    if solver == "auto":
        number = problem.num_candidates
        shown = f"{number:,}" if number < _LONG else f"{number:.1e}"
        result.statistics["chosen"] = f"{name}, for {shown} candidates"
    return spectrum_of(problem, result, states, name, time.perf_counter() - started)


@cache
def compile_kernels(solver: str, exactly: bool) -> None:
    """Solve a small problem, so that no solver's time counts how long its kernels take to compile, or to load again.

    Of random columns the bounds are loose, so that branch and bound reaches all of its kernels.

    exactly: whether an exact number of blocks goes, rather than what meets a budget.
    """
    started = time.perf_counter()
    columns = np.random.default_rng(0).normal(size=(_SMALL, _SMALL))
    hessian = columns.T @ columns
    weight = tuple(1 + i % 3 for i in range(_SMALL))  # of few sorts, whose numbers are roots of their own
    budget = Budget("a third", weight, sum(weight) // 3, sum(weight))
    problem = RemovalProblem(hessian, remove=_SMALL // 2 if exactly else None, budgets=[budget])
    SOLVERS[solver](problem, 2, None, 0)

    seconds = time.perf_counter() - started
    if seconds > _NOTICED:
        console.print(
            f"Compiled the kernels of {solver} in {seconds:.0f} s, once on this machine; it does not count as solving.",
            highlight=False,
            soft_wrap=True,
        )
