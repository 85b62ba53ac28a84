"""D-Wave's classical samplers as solvers, on the QUBO view, to compare with. They prove nothing, and take no budgets.

`SOLVERS | DWAVE` are all that `benchmarks/solvers.py` compares; they need dwave-samplers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from blockspin.problem import RemovalProblem
from blockspin.solvers.spectrum import SearchResult, Statistics

READS = 100


def dwave_tabu(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The allowed removals among the samples of dwave.samplers.TabuSampler."""
    milliseconds = 10 if time_limit is None else max(1, int(1000 * time_limit / READS))
    return _allowed(problem, _samplers().TabuSampler(), seed, timeout=milliseconds)


def dwave_anneal(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The same with SimulatedAnnealingSampler, whose fixed number of sweeps a time limit does not shorten."""
    return _allowed(problem, _samplers().SimulatedAnnealingSampler(), seed)


def _samplers() -> Any:
    try:
        import dwave.samplers
    except ImportError:
        raise ValueError("this solver needs dwave-samplers: pip install 'blockspin[solvers]'") from None
    return dwave.samplers


def _allowed(problem: RemovalProblem, sampler: Any, seed: int, **options: Any) -> SearchResult:
    """Sample the QUBO view and keep each allowed removal once."""
    samples = sampler.sample(problem.to_bqm(), num_reads=READS, seed=seed, **options)

    # The sampler has an order of the variables of its own.
    order = list(map(list(samples.variables).index, problem.reduced.block.tolist()))
    rows = np.unique(np.asarray(samples.record.sample, dtype=bool)[:, order], axis=0)  # (K, n)

    allowed = []
    for row, removed in zip(rows, problem.blocks_of(rows), strict=True):
        if problem.allows(removed):
            allowed.append(row)
    if not allowed:
        raise RuntimeError(f"none of the {READS} samples removes the right number of blocks")

    statistics: Statistics = {"samples": READS, "distinct": len(rows), "allowed": len(allowed)}
    return SearchResult(np.array(allowed), -np.inf, statistics)


DWAVE = {"dwave-tabu": dwave_tabu, "dwave-anneal": dwave_anneal}
