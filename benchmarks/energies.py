"""Which energy predicts best what a removal does? On the embedded model, with what each energy costs.

For each energy and number of removals M: Spearman's correlation with the measured KL divergence over random removals
and over the energy's own ten lowest states, and the KL of its ground state. Energies see calibration text, the measures
are made on another novel. Cost in forward passes over one sample of 128 tokens (a backward pass counts as another). Run

    python benchmarks/energies.py --out energies.json

It takes about ten minutes on a core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockspin.comparison.cost import counted
from blockspin.comparison.figures import spearman
from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, MODEL, VALIDATION
from blockspin.energies import Energies
from blockspin.energies.gradients import estimate_gradients
from blockspin.energies.removals import gauss_newton, measure_pairs
from blockspin.files import write_json
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.quality import shared_qualities
from blockspin.model.tracing import trace_model
from blockspin.problem import Removal, RemovalProblem
from blockspin.solvers import solve
from blockspin.solvers.candidates import random_candidate

Matrix = NDArray[np.float64]
REMOVE = (3, 4, 6, 8, 10, 12)


def forms(model: torch.nn.Module, samples: list[torch.Tensor]) -> dict[str, tuple[Matrix, float, float]]:
    """name -> (matrix of the energy, passes over one sample, seconds)."""
    costs: dict[str, tuple[float, float]] = {}

    def run(name: str, estimate: Callable[..., Energies], number: int, **options: Any) -> Energies:
        started = time.perf_counter()
        with counted(model, len(samples[0])) as cost:
            found = estimate(model, samples[:number], batch_size=16, progress=False, **options)
        costs[f"{name}, {number}"] = cost.passes, time.perf_counter() - started
        print(name, number, cost.passes, flush=True)
        return found

    text = run("empirical-fisher", estimate_gradients, 256)
    fisher = run("fisher", estimate_gradients, 256, labels="model")
    derivative = run("gauss-newton", gauss_newton, 32, step=0.05, positions=128)
    secant, pairs = {}, {}  # by the number of samples
    for m in (8, 32, 64):
        secant[m] = run("secant", gauss_newton, m, positions=128)
    for m in (4, 16, 32):
        pairs[m] = run("pairwise", measure_pairs, m)
    loss = run("pairwise of the loss", measure_pairs, 32, objective="loss")
    costs["singles, 32"] = costs["secant, 32"]

    # The first-order term on the diagonal is the same energy, because x_i^2 = x_i.
    assert text.mean_gradient is not None
    first = 2 * np.diag(text.mean_gradient)
    matrices = {
        "empirical-fisher, 256": text.hessian,
        "empirical-fisher, 256, beta 1": text.hessian + first,
        "empirical-fisher, 256, beta -1": text.hessian - first,
        "fisher, 256": fisher.hessian,
        "gauss-newton, 32": derivative.hessian,
        "singles, 32": np.diag(np.diag(pairs[32].hessian)),
    }
    for m, energies in secant.items():
        matrices[f"secant, {m}"] = energies.hessian
    for m, energies in pairs.items():
        matrices[f"pairwise, {m}"] = energies.hessian
    matrices["pairwise of the loss, 32"] = loss.hessian
    matrices["mean of secant and pairwise, 32"] = (secant[32].hessian + pairs[32].hessian) / 2

    # What needs no run of its own costs what it is made of.
    costs["empirical-fisher, 256, beta 1"] = costs["empirical-fisher, 256, beta -1"] = costs["empirical-fisher, 256"]
    costs["mean of secant and pairwise, 32"] = (
        costs["secant, 32"][0] + costs["pairwise, 32"][0],
        costs["secant, 32"][1] + costs["pairwise, 32"][1],
    )

    found = {}
    for name, matrix in matrices.items():
        found[name] = (matrix, *costs[name])
    return found


def prediction(
    problem: RemovalProblem, drawn: list[Removal], lowest: list[Removal], kl: dict[Removal, float]
) -> dict[str, object]:
    """How well an energy predicts the measured divergences: over random removals, and over its own lowest states."""

    def correlation(removals: list[Removal]) -> float:
        return spearman(list(map(problem.energy, removals)), list(map(kl.__getitem__, removals)))

    return {
        "random": correlation(drawn),
        "low": correlation(lowest),
        "ground state": kl[lowest[0]],
        "best of ten": min(map(kl.__getitem__, lowest)),
        "removed": lowest[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("energies.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    calibration = load_calibration(CALIBRATION, tokenizer, num_samples=256, max_length=128)
    text = load_calibration(VALIDATION, tokenizer, num_samples=32, max_length=128)

    found = forms(model, calibration)
    rows: dict[str, dict[str, object]] = {}
    for name, (_, passes, seconds) in found.items():
        rows[name] = {"passes": passes, "seconds": seconds}

    for remove in REMOVE:
        problems, lowest = {}, {}
        for name, (matrix, _, _) in found.items():
            problems[name] = RemovalProblem(matrix, remove)
            lowest[name] = [state.removed for state in solve(problems[name], states=10).states]

        # Measure every removal once: random ones, and the ten lowest states of each energy.
        any_problem = next(iter(problems.values()))
        drawn = [random_candidate(any_problem, seed).removed for seed in range(40)]
        removals = sorted({*drawn, *chain.from_iterable(lowest.values())})
        measured = shared_qualities(trace_model(model), removals, text, batch_size=16)
        kl = {}
        for removed, quality in zip(removals, measured, strict=True):
            kl[removed] = quality.kl

        for name, problem in problems.items():
            rows[name][str(remove)] = prediction(problem, drawn, lowest[name], kl)
            print(remove, name, f"{kl[lowest[name][0]]:.4f}", flush=True)
        write_json(arguments.out, rows)


if __name__ == "__main__":
    main()
