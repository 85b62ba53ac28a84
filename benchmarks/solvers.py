"""All solvers side by side: time, what is proven, and how far from the best known answer.

    python benchmarks/solvers.py                          # the problems of the documentation's table
    python benchmarks/solvers.py --families flat --sizes 80x24 --solvers exact --time-limit 120
    python benchmarks/solvers.py --hessian H.npy --sizes 24x6
    python benchmarks/solvers.py --goals count,size,size+cache --sizes 80x20 126x32 160x40 252x63 --solvers exact

Every solver is run once on a small problem before the clock starts, so that nothing is compiled within a measurement.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from dwave_solvers import DWAVE
from numpy.typing import NDArray

import blockspin as bs
from blockspin.solvers import SOLVERS

Floats = NDArray[np.float64]
SAMPLES = 2048


def scales(n: int, rng: np.random.Generator) -> Floats:
    """One shared factor, and scales that decay with depth."""
    a = (rng.normal(size=(SAMPLES, n)) + 1.5 * rng.normal(size=(SAMPLES, 1))) * np.exp(-3 * np.arange(n) / n)
    return a.T @ a / SAMPLES


def neighbours(n: int, rng: np.random.Generator) -> Floats:
    """Neighbouring blocks correlated at 0.9, scales spread at random."""
    a = rng.normal(size=(SAMPLES, n))
    for i in range(1, n):
        a[:, i] = 0.9 * a[:, i - 1] + np.sqrt(1 - 0.9**2) * a[:, i]
    a *= np.exp(0.5 * rng.normal(size=n))
    return a.T @ a / SAMPLES


def factors(n: int, rng: np.random.Generator) -> Floats:
    """Six strong factors with loadings of both signs, samples with heavy tails, scales spread at random."""
    a = rng.standard_t(2.5, size=(SAMPLES, 6)) @ rng.normal(size=(6, n)) + rng.standard_t(2.5, size=(SAMPLES, n))
    a *= np.exp(0.7 * rng.normal(size=n))
    return a.T @ a / SAMPLES


def flat(n: int, rng: np.random.Generator) -> Floats:
    """Independent equal blocks: nothing to hold on to but sampling noise."""
    a = rng.normal(size=(SAMPLES, n))
    return a.T @ a / SAMPLES


FAMILIES: dict[str, Callable[[int, np.random.Generator], Floats]] = {
    "scales": scales,
    "neighbours": neighbours,
    "factors": factors,
    "flat": flat,
}


def goal_of(name: str, blocks: int, removals: int) -> dict[str, Any]:
    """What removes about as much as so many blocks, of which every second is of another sort, as attention and MLP.

    count: so many blocks. size: their share of what attention (4 each) and MLP (11) have; sizes: of sizes all unlike.
    cache: that share of what attention has alone. Several with a plus.
    """
    unlike = np.random.default_rng(7).integers(100, 1000, size=blocks).tolist()
    weights = {"size": [(4, 11)[i % 2] for i in range(blocks)], "sizes": unlike}
    weights["cache"] = [(10, 0)[i % 2] for i in range(blocks)]

    goal: dict[str, Any] = {"remove": None, "budgets": []}
    for part in name.split("+"):
        if part == "count":
            goal["remove"] = removals
            continue
        total = sum(weights[part])
        goal["budgets"].append(bs.Budget(part, tuple(weights[part]), -(-total * removals // blocks), total))
    return goal


def measure(
    problem: bs.RemovalProblem, solvers: Iterable[str], states: int, time_limit: float | None
) -> dict[str, tuple[float, bs.Spectrum | None, str]]:
    """Wall seconds of the whole call and the spectrum, or why there is none, by solver."""
    results: dict[str, tuple[float, bs.Spectrum | None, str]] = {}
    for solver in solvers:
        started = time.perf_counter()
        try:
            spectrum = bs.solve(problem, states=states, solver=solver, time_limit=time_limit)
            results[solver] = time.perf_counter() - started, spectrum, ""
        except (ValueError, RuntimeError) as error:
            results[solver] = time.perf_counter() - started, None, str(error).split(";")[0]
        except Exception as error:  # an outside solver's own, such as a licence that is too small
            results[solver] = time.perf_counter() - started, None, f"{type(error).__name__}: {error}"
    return results


def removals_of(spectrum: bs.Spectrum) -> set[tuple[int, ...]]:
    return {state.removed for state in spectrum.states}


def rows(name: str, size: str, results: dict[str, tuple[float, bs.Spectrum | None, str]]) -> list[str]:
    """The table's lines for one problem."""
    known = [spectrum for _, spectrum, _ in results.values() if spectrum is not None]
    energies = [spectrum.states[0].energy for spectrum in known]
    best = min(energies, default=np.nan)

    # The removals of the solver that proved the most, if any did.
    reference = max(known, key=lambda spectrum: spectrum.num_proven, default=None)
    truth = removals_of(reference) if reference is not None and reference.num_proven else set()

    lines = []
    for solver, (seconds, spectrum, why) in results.items():
        if spectrum is None:
            lines.append(f"| {name} | {size} | {solver} | {seconds:.2f} | | | | {why} |")
            continue

        gap = "" if not np.isfinite(spectrum.gap) else f"{100 * spectrum.gap / abs(spectrum.states[0].energy):.2g} %"
        above = 100 * (spectrum.states[0].energy - best) / abs(best)
        found = f"{len(truth & removals_of(spectrum))}/{len(truth)}" if truth else ""
        proven = f"{spectrum.num_proven}/{len(spectrum.states)}"
        lines.append(f"| {name} | {size} | {solver} | {seconds:.2f} | {proven} | {gap} | {above:.2g} % | {found} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--hessian", type=Path, help="a .npy file with a Hessian, instead of the families")
    parser.add_argument("--sizes", nargs="+", default=["80x8", "80x24", "80x40"], help="blocks x removals")
    parser.add_argument("--goals", default="count", help="count, size, sizes, cache; several at once: size+cache")
    parser.add_argument("--solvers", nargs="+", default=["exact", "tabu", "anneal"])
    parser.add_argument("--states", type=int, default=100)
    parser.add_argument("--time-limit", type=float)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    # Once on a small problem, so that nothing is compiled within a measurement.
    SOLVERS.update(DWAVE)
    warm = bs.RemovalProblem(flat(24, np.random.default_rng(1)), remove=10)
    measure(warm, [solver for solver in chosen.solvers if solver != "gurobi"], 5, None)

    load = f"load {os.getloadavg()[0]:.1f}"  # of other work too, which makes times longer
    print(f"{os.cpu_count()} cores, {platform.machine()}, {load}; {chosen.states} states; seed {chosen.seed}\n")
    print("| problem | blocks x removals | solver | seconds | proven | gap | above best | of the proven states |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    for name in [chosen.hessian.stem] if chosen.hessian else chosen.families:
        for size in chosen.sizes:
            blocks, removals = map(int, size.split("x"))
            if chosen.hessian:
                h = np.load(chosen.hessian)
            else:
                h = FAMILIES[name](blocks, np.random.default_rng(chosen.seed))
            for goal in chosen.goals.split(","):
                problem = bs.RemovalProblem(h, **goal_of(goal, blocks, removals))
                results = measure(problem, chosen.solvers, chosen.states, chosen.time_limit)
                said = size if goal == "count" else f"{size}, {goal}"
                print("\n".join(rows(name, said, results)), flush=True)


if __name__ == "__main__":
    main()
