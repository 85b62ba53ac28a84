"""The selection against every method it is compared with, at the same cost, on the embedded model.

For each number of removals and each seed of the calibration data: the held-out KL divergence of what each method chose.
SLEB and EvoPress, which search by measuring, get as many forward passes as the energies and the selection together:
EvoPress as its budget, SLEB as more samples. The others cost less. Run it with

    python benchmarks/selection.py --out selection.json

and again to continue; it takes about half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from blockspin import baselines
from blockspin.config import ChoosingSettings
from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, MODEL, VALIDATION
from blockspin.energies import estimate_energies
from blockspin.files import write_json
from blockspin.model.batches import token_mean
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.passes import passes_of_walk
from blockspin.model.quality import Quality, measured, quality
from blockspin.model.tracing import trace_model
from blockspin.problem import RemovalProblem
from blockspin.scatter import standard_error
from blockspin.selection.select import select_with_energies
from blockspin.solvers import solve
from blockspin.solvers.candidates import Candidate, states_as_candidates
from blockspin.surgery.feasible import Removable

BATCH = 16
STATES = 100  # of the spectrum that the selection starts from
KL = 1  # the column of `quality`


@dataclass
class Setting:
    """The samples of one seed: 128 tokens each; energies and selection share none with each other."""

    model: nn.Module
    energy: list[Tensor]
    selection: list[Tensor]
    held_out: list[Tensor]
    budget: float  # passes over the selection samples, for the selection alone


def choices(setting: Setting, energy: str, remove: int) -> tuple[list[Candidate], dict[str, float]]:
    """What each method removes; and the cost of those that search, in passes over one sample."""
    s = setting
    found = estimate_energies(energy, s.model, s.energy, batch_size=BATCH, progress=False)
    problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
    spectrum = solve(problem, states=STATES)
    ours, _ = select_with_energies(
        s.model,
        found,
        problem,
        spectrum,
        s.selection,
        s.energy,
        Removable(s.model.config),
        ChoosingSettings(seed=0, budget=s.budget, batch_size=BATCH),
        progress=False,
    )

    # Our cost: the selection, and for the energies the model without each block and the whole model once more.
    depth = problem.num_blocks
    singles = [(i,) for i in range(depth)]
    spent = ours.passes * len(s.selection) + (passes_of_walk([(), *singles], depth) + 1) * len(s.energy)

    # SLEB gets as many samples as this pays for.
    everything = [*s.selection, *s.energy]
    sleb_samples = everything[: max(1, round(spent / sleb_passes(depth, remove)))]

    activations = baselines.measure_activations(s.model, s.energy, batch_size=BATCH)
    losses = baselines.losses_without_each(s.model, s.selection, batch_size=BATCH)
    candidates = [
        Candidate(ours.chosen.removed, "blockspin", None),
        states_as_candidates(spectrum)[0],
        baselines.sleb(s.model, sleb_samples, problem, batch_size=BATCH),
        baselines.evopress(s.model, s.selection, problem, budget=spent / len(s.selection), batch_size=BATCH),
        baselines.shortened_llama(problem, losses, "Shortened LLaMA PPL"),
        baselines.shortened_llama(problem, losses, "Shortened LLaMA PPL+", plus=True),
        baselines.block_influence(problem, activations),
        baselines.norm_ratio(problem, activations),
        baselines.angular_distance(problem, activations),
        baselines.iterative_block_influence(s.model, s.energy, problem, batch_size=BATCH),
    ]
    return candidates, {"blockspin": spent, "SLEB samples": len(sleb_samples)}


def sleb_passes(depth: int, remove: int) -> float:
    """What SLEB costs on one sample, in passes of the whole model, where the blocks that go are those from 4 on."""
    total = 0.0
    for step in range(remove):
        gone = range(4, 4 + step)
        tried = [tuple({*gone, i}) for i in range(depth)]
        total += passes_of_walk(tried, depth)
    return total


def held_out(setting: Setting, candidates: list[Candidate]) -> dict[str, dict[str, object]]:
    """Method -> its blocks, KL and loss on the held-out samples, and how far its KL is above ours."""
    removals = [candidate.removed for candidate in candidates]
    values = measured(trace_model(setting.model), removals, setting.held_out, quality, batch_size=BATCH)
    ours = values[0][:, KL]  # (num_samples,)

    rows: dict[str, dict[str, object]] = {}
    for candidate, row in zip(candidates, values, strict=True):
        above = row[:, KL] - ours
        means = Quality(*token_mean(row.T, setting.held_out).tolist())
        rows[candidate.source] = {
            "removed": candidate.removed,
            **vars(means),
            "above": float(above.mean()),
            "error": standard_error(above),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("selection.json"))
    parser.add_argument("--energy", default="secant")
    parser.add_argument("--budget", type=float, default=48.0)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    text = load_calibration(VALIDATION, tokenizer, num_samples=96, max_length=128, seed=0)

    for seed in range(arguments.seeds):
        drawn = load_calibration(CALIBRATION, tokenizer, num_samples=96, max_length=128, seed=seed)
        setting = Setting(model, drawn[:32], drawn[32:64], text, arguments.budget)
        for remove in (4, 8, 12):
            name = f"{arguments.energy} M={remove} seed={seed}"
            if name in results:
                continue
            candidates, cost = choices(setting, arguments.energy, remove)
            results[name] = {"methods": held_out(setting, candidates), "cost": cost}
            write_json(arguments.out, results)
            kls = {method: round(row["kl"], 4) for method, row in results[name]["methods"].items()}
            print(name, cost, kls, flush=True)


if __name__ == "__main__":
    main()
