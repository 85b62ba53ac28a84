"""D-Wave's classical samplers on the QUBO view, for comparison. They prove nothing, and take no budgets."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..problem import RemovalProblem
from .spectrum import Found, Statistics

READS = 100


def dwave_tabu(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> Found:
    """The allowed removals among the samples of dwave.samplers.TabuSampler; needs the extra 'solvers'."""
    milliseconds = 10 if time_limit is None else max(1, int(1000 * time_limit / READS))
    return _allowed(problem, _samplers().TabuSampler(), seed, timeout=milliseconds)


def dwave_anneal(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> Found:
    """The same with SimulatedAnnealingSampler, whose fixed number of sweeps a time limit does not shorten."""
    return _allowed(problem, _samplers().SimulatedAnnealingSampler(), seed)


def _samplers() -> Any:
    try:
        import dwave.samplers
    except ImportError:
        raise ValueError("this solver needs dwave-samplers: pip install 'blockspin[solvers]'") from None
    return dwave.samplers


def _allowed(problem: RemovalProblem, sampler: Any, seed: int, **options: Any) -> Found:
    """Sample the QUBO view and keep each allowed removal once."""
    blocks = problem.reduced.block.tolist()
    samples = sampler.sample(problem.to_bqm(), num_reads=READS, seed=seed, **options)
    order = [list(samples.variables).index(block) for block in blocks]
    rows = np.unique(np.asarray(samples.record.sample, dtype=bool)[:, order], axis=0)
    allowed = [row for row, removed in zip(rows, problem.blocks_of(rows), strict=True) if problem.allows(removed)]
    if not allowed:
        raise RuntimeError(f"none of the {READS} samples removes the right number of blocks")
    statistics: Statistics = {"samples": READS, "distinct": len(rows), "allowed": len(allowed)}
    return Found(np.array(allowed), -np.inf, statistics)
