"""Sub-layers against whole blocks at equal bytes, and against the methods that choose sub-layers: KL from the original.

    python benchmarks/sublayers.py --chat conversations.jsonl.gz --text valid.jsonl.xz --device cuda
    python benchmarks/sublayers.py --table sublayers.jsonl

Bytes are those of the weights, in 16 bits, and of the key-value cache of 8 sequences of 4,096 tokens: what the whole
blocks hold, a tenth to four tenths of the model, is what the sub-layers must reach. Every method may take as many
forward passes over one sample: ours for the energies and the choice, BlockPruner's and FinerCut's greedy searches as
many samples as that allows, EvoPress as its budget; LLM-Drop's scores take one. Our energies are made for each share,
for blocks and for sub-layers with as many passes. Everything is measured on held-out conversations and on text of three
other kinds, before and after the repair, also where --choose-in has the methods choose in another dtype. A row is kept
as soon as it is there, and what has one is not run again; the most important rows come first, and none begins after
--seconds.

--tiny tries the script itself: a random model of ten blocks, short samples, two shares, one draw.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repair import divergences, read
from rows import Row, add_seconds, load, make_missing
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockspin import baselines
from blockspin.baselines.scores import from_scores
from blockspin.energies.fitted import Fitted, fit_removals
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.tracing import find_units
from blockspin.problem import Block, Budget, RemovalProblem, Units
from blockspin.repairs.run import repair
from blockspin.selection.pool import cheap_choices, pool_of
from blockspin.selection.select import run_selection
from blockspin.solvers import solve
from blockspin.solvers.candidates import Candidate
from blockspin.surgery.memory import remove_blocks
from blockspin.tables import ranges

CONTEXT, SEQUENCES = 4096, 8  # of the cache whose bytes count
ITEM = 2  # bytes of a weight and of a number in the cache
FITTING = 6  # passes over one sample for the energies, for each of the units and one for the whole, of sub-layers
ALL_PASSES = 1000.0  # over one sample: of the energies and the choice together, for each share
FIT_SAMPLES, CHOICE_SAMPLES = 16, 16
KINDS = ("chat", "novel", "pep", "code")
SHARES = (20, 30, 10, 40)  # per cent of the blocks


def bytes_of(model: PreTrainedModel, unit: Block) -> int:
    """What a unit holds of weights and cache."""
    config: Any = model.config
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    attends = "attention" in unit.kind.split("+")
    cache = 2 * heads * width * CONTEXT * SEQUENCES if attends else 0  # keys and values
    return ITEM * (unit.num_parameters + cache)


@dataclass
class Setup:
    """The model that methods choose on, and the text of one draw.

    samples: to fit energies to, and to choose on. repairing: to repair with. passes: over one sample, of each method.
    partial: beside this file the energies are kept.
    """

    model: PreTrainedModel
    samples: list[Tensor]
    repairing: list[Tensor]
    passes: float
    seed: int
    partial: Path

    @property
    def fitting_passes(self) -> float:
        """Passes over one sample for the energies of a share, as many for blocks as for sub-layers."""
        number = FITTING * (len(find_units(self.model, "sublayers")) + 1)
        return min(number, self.passes)

    def energies(self, share: int, units: Units) -> Fitted:
        """Fitted to removals that meet the budget of a share."""
        count, budgets = self.goal(share, units)
        return fit_removals(
            self.model,
            self.samples[:FIT_SAMPLES],
            goal=count,
            budgets=budgets,
            units=units,
            passes=self.fitting_passes,
            seed=self.seed,
            partial=self.partial.with_name(f"{self.partial.stem}-{units}-{share}-{self.seed}.jsonl"),
            progress=False,
        )

    def goal(self, share: int, units: Units) -> tuple[int | None, list[Budget]]:
        """So many per cent of the blocks, or sub-layers of as many bytes."""
        blocks = find_units(self.model)
        count = round(share / 100 * len(blocks))
        if units == "blocks":
            return count, []
        weight = tuple([bytes_of(self.model, unit) for unit in find_units(self.model, units)])
        return None, [Budget("bytes", weight, math.ceil(count / len(blocks) * sum(weight)), sum(weight), "B")]

    def problem(self, share: int, units: Units, hessian: Any = None) -> RemovalProblem:
        """The removals that meet the budget of a share; without energies for methods that read none."""
        count, budgets = self.goal(share, units)
        found = find_units(self.model, units)
        return RemovalProblem(np.eye(len(found)) if hessian is None else hessian, count, blocks=found, budgets=budgets)


def ours(setup: Setup, share: int, units: Units) -> Candidate:
    """Energies, their lowest states, and a choice among them and what cheap scores choose."""
    found = setup.energies(share, units)
    problem = setup.problem(share, units, found.hessian)
    spectrum = solve(problem, states=100, time_limit=20, seed=setup.seed)
    samples = setup.samples[FIT_SAMPLES:]
    activations = baselines.measure_activations(setup.model, samples, units=units)
    return run_selection(
        setup.model,
        pool_of(problem, spectrum, cheap_choices(problem, activations)),
        samples,
        problem=problem,
        fitted=found,
        budget=max(4.0, (setup.passes - setup.fitting_passes) / len(samples)),
        progress=False,
    ).chosen


def greedy(search: Callable[..., Candidate], setup: Setup, share: int) -> Candidate:
    """A greedy search with the samples that the passes allow: about half a pass for each unit in each step."""
    problem = setup.problem(share, "sublayers")
    n, steps = problem.num_blocks, round(1.3 * share / 100 * problem.num_blocks / 2)
    passes = sum(0.5 * (n - step) for step in range(steps))
    return search(setup.model, setup.samples[: max(1, round(setup.passes / passes))], problem)


def llm_drop(setup: Setup, share: int, attention_only: bool) -> Candidate:
    """LLM-Drop (arXiv 2406.15786): the sub-layers whose inputs and outputs are most alike, at once."""
    problem = setup.problem(share, "sublayers")
    scores = 1 - baselines.measure_activations(setup.model, setup.samples, units="sublayers").cosine
    assert problem.blocks is not None
    for unit in problem.blocks if attention_only else ():
        if unit.kind != "attention":
            scores[unit.index] += 2  # after all attention
    return from_scores(problem, scores, "LLM-Drop")


def evolution(setup: Setup, share: int) -> Candidate:
    samples = setup.samples[:CHOICE_SAMPLES]
    budget = setup.passes / len(samples)
    return baselines.evopress(setup.model, samples, setup.problem(share, "sublayers"), budget=budget, seed=setup.seed)


METHODS: dict[str, Callable[[Setup, int], Candidate]] = {
    "blocks": lambda setup, share: ours(setup, share, "blocks"),
    "sub-layers": lambda setup, share: ours(setup, share, "sublayers"),
    "LLM-Drop": lambda setup, share: llm_drop(setup, share, attention_only=False),
    "LLM-Drop, attention": lambda setup, share: llm_drop(setup, share, attention_only=True),
    "BlockPruner": lambda setup, share: greedy(baselines.sleb, setup, share),
    "FinerCut": lambda setup, share: greedy(baselines.finercut, setup, share),
    "EvoPress": evolution,
}
OURS = ("blocks", "sub-layers")  # whose rows come first


def key_of(draw: int, share: int, method: str) -> str:
    """What a row is found by."""
    return f"{draw} | {share} | {method}"


def row_of(
    setup: Setup, original: PreTrainedModel, method: str, share: int, held_out: Mapping[str, Sequence[Tensor]]
) -> Row:
    """What a method chooses, and how far the model without it is from the original, before and after the repair."""
    units: Units = "blocks" if method == "blocks" else "sublayers"
    start = time.perf_counter()
    removed = METHODS[method](setup, share).removed
    seconds = time.perf_counter() - start

    found = find_units(original, units)
    gone = [found[i] for i in removed]
    shortened = remove_blocks(original, removed, units=units, copy=False)
    row: Row = {
        "draw": setup.seed,
        "share": share,
        "method": method,
        "removed": ranges(removed),
        "kinds": {kind: sum(unit.kind == kind for unit in gone) for kind in {unit.kind for unit in gone}},
        "bytes": sum(bytes_of(original, unit) for unit in gone),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if original.device.type == "cuda" else "CPU",
        "dtype": str(original.dtype),
        "chosen in": str(setup.model.dtype),
    }
    row["kl"] = {kind: divergences(shortened, original, samples, 8) for kind, samples in held_out.items()}
    repair(shortened, original, setup.repairing)
    row["repaired"] = {kind: divergences(shortened, original, samples, 8) for kind, samples in held_out.items()}
    return row


def small_model(vocabulary: int) -> PreTrainedModel:
    """Random weights of a Llama of ten blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config)


def jobs(draws: int, shares: Sequence[int], methods: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(draw, share, method), ours first."""
    ours = [name for name in methods if name in OURS]
    others = [name for name in methods if name not in OURS]
    for draw in range(draws):
        for group in (ours, others):
            for share in shares:
                for method in group:
                    yield draw, share, method


def run(arguments: argparse.Namespace) -> None:
    """Every row that is missing, until the time is up."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(arguments.model)
    model = small_model(len(tokenizer)) if arguments.tiny else load_model(arguments.model, dtype=arguments.dtype)
    model = model.to(arguments.device)
    choosing = deepcopy(model).to(getattr(torch, arguments.choose_in)) if arguments.choose_in else model
    arguments.calibration_text = os.devnull
    texts, others = read(arguments, tokenizer)
    held_out = {kind: others.first(kind, arguments.held_out) for kind in KINDS}

    each = FIT_SAMPLES + CHOICE_SAMPLES
    drawn = texts.first("chat", arguments.draws * each)
    repairing = texts.tokens(["chat"], arguments.tokens)
    wanted = {}
    for draw, share, method in jobs(arguments.draws, arguments.shares, arguments.methods):
        samples = drawn[draw * each : (draw + 1) * each]
        setup = Setup(choosing, samples, repairing, arguments.passes, draw, arguments.out)
        wanted[key_of(draw, share, method)] = partial(row_of, setup, model, method, share, held_out)
    make_missing(wanted, arguments.out, started, arguments.seconds)


def table(path: Path) -> str:
    """KL before and after the repair by share and method, means over kinds and draws; and relative to whole blocks."""
    rows = load(path)
    mean = {row["key"]: [float(np.mean(list(row[state].values()))) for state in ("kl", "repaired")] for row in rows}
    lines = ["| share | method | draws | KL | of blocks | repaired | of blocks |", "|---|---|---|---|---|---|---|"]
    for share in sorted({row["share"] for row in rows}):
        for method in METHODS:
            draws = [row["draw"] for row in rows if row["share"] == share and row["method"] == method]
            paired = [draw for draw in draws if key_of(draw, share, "blocks") in mean]
            if not paired:
                continue
            own = np.array([mean[key_of(draw, share, method)] for draw in paired])  # (draws, 2)
            blocks = np.array([mean[key_of(draw, share, "blocks")] for draw in paired])
            (plain, repaired), ratios = own.mean(axis=0), own / blocks
            cells = [f"{share} %", method, str(len(paired)), f"{plain:.3f}", f"{ratios[:, 0].mean():.2f}"]
            lines.append(f"| {' | '.join([*cells, f'{repaired:.3f}', f'{ratios[:, 1].mean():.2f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="hub id, folder, or smollm2")
    parser.add_argument("--chat", help="conversations; one of eight is held out")
    parser.add_argument("--text", help="held-out text of other kinds: rows with text and source")
    parser.add_argument("--shares", type=int, nargs="+", default=list(SHARES), help="per cent of the blocks")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="whose rows to make")
    parser.add_argument("--passes", type=float, default=ALL_PASSES, help="over one sample, of each method")
    parser.add_argument("--tokens", type=int, default=65_536, help="to repair with")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample at most")
    parser.add_argument("--held-out", type=int, default=16, help="samples of each held-out kind")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--choose-in", choices=("float32", "bfloat16"), help="for the choices (default: --dtype)")
    add_seconds(parser)
    parser.add_argument("--tiny", action="store_true", help="a small random model, to try the script")
    parser.add_argument("--out", type=Path, default=Path("sublayers.jsonl"))
    parser.add_argument("--table", type=Path, help="print a table of the rows of this file and end")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    arguments.seed = 0
    if arguments.tiny:
        arguments.shares, arguments.draws, arguments.held_out = [10, 20], 1, 1
        arguments.length, arguments.tokens, arguments.passes = 16, 4096, 200
    run(arguments)


if __name__ == "__main__":
    main()
