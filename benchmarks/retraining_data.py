"""What `retraining.py` trains and measures on, prepared once: token windows, prompts, and the removals to start from.

    python benchmarks/retraining_data.py MODEL --chat conversations.jsonl.gz --text valid.jsonl.xz --out retraining

MODEL is SmolLM2-135M-Instruct: the folder or GGUF file. The removals take a quarter of an hour on a core. What is
written is small (2 MB), so that the training itself, elsewhere, needs neither the texts nor a package that reads them.

Removals are chosen on beginnings of conversations and as much text that the model writes itself. Conversations are
drawn in one seeded order: the first are for calibration (energies, choice, repair), the next to choose learning rates
by, the next are held out, and all others are trained on. The held-out text of another kind is one third each of a
novel, of Python enhancement proposals and of code.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from real_model import ours
from real_model_text import CHOICE_SAMPLES, FIT_SAMPLES, draws_of, written
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blockspin import baselines
from blockspin.data.calibration import tokenise
from blockspin.data.packing import pack
from blockspin.data.prompts import prompts
from blockspin.data.reading import open_rows
from blockspin.energies.fitted import Fitted, fit_removals
from blockspin.files import replacing, write_json
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.problem import Removal, RemovalProblem
from blockspin.solvers import solve
from blockspin.solvers.candidates import distinct, fill, states_as_candidates

LENGTH = 512  # tokens of a window
CHOICE_LENGTH = 64  # tokens of a sample that a removal is chosen on
CONVERSATIONS = {"calibration": 250, "validation": 100, "chat": 250}  # the others are trained on
HELD_OUT = 60  # windows of text of another kind
PROMPT = LENGTH // 2  # tokens of a prompt at most
GOALS = (8, 4)  # blocks that are removed
SLEB_SAMPLES = 4
PREDICTED, LOW = 20, 8  # removals of the first goal whose outcome is predicted, and low states among them
Ids = NDArray[np.uint16]  # the model has 49,152 tokens


def windows_of(samples: list[list[int]], separator: int | None) -> Ids:
    """(windows, LENGTH): the samples one after another."""
    return np.array(list(pack(iter(samples), LENGTH, separator)), dtype=np.uint16)


def chat_windows(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Ids], list[Tensor]]:
    """Windows of conversations by use, and the beginnings of some for calibration, on which removals are chosen."""
    conversations = list(tokenise(source, tokenizer, LENGTH, seed=0, split="train", truncate=False))
    found, first = {}, 0
    for use, number in CONVERSATIONS.items():
        found[use] = windows_of(conversations[first : first + number], tokenizer.eos_token_id)
        first += number
    found["train"] = windows_of(conversations[first:], tokenizer.eos_token_id)

    beginnings = []
    for ids in conversations[: CONVERSATIONS["calibration"]]:
        if len(ids) >= CHOICE_LENGTH:
            beginnings.append(torch.tensor(ids[:CHOICE_LENGTH]))
    return found, beginnings


def text_windows(source: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """(HELD_OUT, LENGTH) windows, as many of each source, evenly spread over all that there is of it."""
    by_source: dict[str, list[list[int]]] = {}
    for row in open_rows(source, "train"):
        by_source.setdefault(row["source"], []).append(tokenizer(row["text"], verbose=False)["input_ids"])

    found = []
    for name in sorted(by_source):
        windows = windows_of(by_source[name], tokenizer.eos_token_id)
        spread = np.linspace(0, len(windows) - 1, HELD_OUT // len(by_source)).round().astype(int)
        found.append(windows[spread])
    return np.concatenate(found)


def choices(model: nn.Module, found: Fitted, samples: list[Tensor]) -> Iterator[tuple[int, str, Removal]]:
    """(number of blocks, method, removal): what the methods choose, the cheap ones first, and a random removal."""
    activations = baselines.measure_activations(model, samples)
    generator = np.random.default_rng(0)
    problems = {goal: RemovalProblem(found.hessian, goal, blocks=found.blocks) for goal in GOALS}
    for goal, problem in problems.items():
        yield goal, "block influence", baselines.block_influence(problem, activations).removed
        yield goal, "random", fill(problem, generator.permutation(problem.num_blocks).tolist())
        yield goal, "norm ratio", baselines.norm_ratio(problem, activations).removed
        yield goal, "angular distance", baselines.angular_distance(problem, activations).removed
        yield goal, "blockspin", ours(model, found, goal, samples, seed=0).chosen.removed
    for goal, problem in problems.items():
        yield goal, "SLEB", baselines.sleb(model, samples[:SLEB_SAMPLES], problem, progress=True).removed


def to_predict(found: Fitted, chosen: list[Removal]) -> list[Removal]:
    """Removals from good to bad: those chosen by methods, low states, and random ones that avoid costly blocks."""
    problem = RemovalProblem(found.hessian, GOALS[0], blocks=found.blocks)
    generator = np.random.default_rng(1)
    states = distinct(states_as_candidates(solve(problem, states=100)))
    removals = [*chosen, *(state.removed for state in states[:LOW])]
    while len(set(removals)) < PREDICTED:
        noise = generator.gumbel(size=problem.num_blocks)
        removals.append(fill(problem, np.argsort(2.5 * np.log(found.singles) - noise).tolist()))
    return list(dict.fromkeys(removals))[:PREDICTED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chat", required=True, help="conversations")
    parser.add_argument("--text", required=True, help="held-out text of another kind, rows with text and source")
    parser.add_argument("--out", type=Path, default=Path("retraining"), help="OUT.npz and OUT.json are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)

    arrays, beginnings = chat_windows(arguments.chat, tokenizer)
    arrays["text"] = text_windows(arguments.text, tokenizer)
    asked = list(prompts(arguments.chat, tokenizer, PROMPT, seed=0))[sum(CONVERSATIONS.values()) :]
    arrays["prompts"] = np.concatenate([np.array(ids, dtype=np.uint16) for ids in asked])  # one after another
    arrays["prompt_lengths"] = np.array(list(map(len, asked)), dtype=np.uint16)
    with replacing(arguments.out.with_suffix(".npz")) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)

    model = load_model(arguments.model, dtype="float32")
    own = written(model, (FIT_SAMPLES + CHOICE_SAMPLES) // 2, CHOICE_LENGTH)
    samples = draws_of([beginnings, own], 1)[0]
    partial = arguments.out.with_name(f"{arguments.out.name}-energies.jsonl")
    found = fit_removals(model, samples[:FIT_SAMPLES], seed=0, partial=partial)
    removals: dict[str, dict[str, Removal]] = {"predicted": {}}
    for goal, method, removed in choices(model, found, samples):
        print(goal, method, removed, flush=True)
        removals.setdefault(str(goal), {})[method] = removed
        if (goal, method) == (GOALS[0], "blockspin"):  # those that are compared by then, and others
            for number, other in enumerate(to_predict(found, list(removals[str(goal)].values()))):
                removals["predicted"][str(number)] = other
        write_json(arguments.out.with_suffix(".json"), removals)


if __name__ == "__main__":
    main()
