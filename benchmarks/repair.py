"""What a repair brings back, beside the repairs that others propose: KL from the original on held-out text.

Everything is fitted to conversations and novels, or to conversations alone, and measured on held-out documents of these
kinds and of two others (Python enhancement proposals, code). The removals are block influence's and a random one of
each size, and those that are named. A row is kept as soon as it is there, and what has one is not run again; the
most important rows come first, and none begins after --seconds.

    python benchmarks/repair.py MODEL --chat conversations.jsonl.gz --calibration-text train.jsonl.xz \\
        --text valid.jsonl.xz --removals 5,13-18,26 --device cuda --out repair.jsonl
    python benchmarks/repair.py --table repair.jsonl

--tiny tries the script itself: few tokens and two removals.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repair_methods import BASELINES, METHODS, OURS, OUTWARD, VARIANTS
from rows import Row, add_seconds, load, make_missing
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockspin import baselines
from blockspin.config import parse_indices
from blockspin.data.calibration import row_to_text
from blockspin.files import write_json
from blockspin.model.blocks import find_stack
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.own_text import own_text
from blockspin.model.quality import kl, values_of
from blockspin.problem import Removal, RemovalProblem
from blockspin.scatter import standard_error
from blockspin.surgery.memory import remove_blocks
from blockspin.tables import ranges

SEED = 42
LENGTH = 512  # tokens of a sample at most
PIECE = 2400  # characters of a document that a sample is cut from
HELD_OUT_EVERY = 8  # of the conversations, one is held out
SCORED = 16  # samples that block influence and SLEB look at
SCORED_LENGTH = 256  # their tokens
MIDDLE = 8  # blocks; removals of this size come first
SAME, OTHER = ("chat", "novel"), ("pep", "code")
OWN = "own"  # text that the model itself wrote


@dataclass(frozen=True)
class Job:
    """One row: a method on a removal, fitted to some text."""

    removed: Removal
    method: str
    kinds: tuple[str, ...]
    tokens: int

    @property
    def key(self) -> str:
        return f"{ranges(self.removed)} | {self.method} | {'+'.join(self.kinds)} | {self.tokens}"


@dataclass
class Texts:
    """Token samples by kind, drawn from pieces of documents.

    pieces: kind -> texts in random order; tokenizer: the model's. made: kind -> samples that are there.
    """

    pieces: Mapping[str, Sequence[str]]
    tokenizer: PreTrainedTokenizerBase
    length: int
    made: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def samples(self, kind: str) -> Iterator[Tensor]:
        """(tokens,) each, as many as there are."""
        made = self.made[kind]
        for number, text in enumerate(self.pieces[kind]):
            if number == len(made):
                ids = self.tokenizer(text, add_special_tokens=False, truncation=True, max_length=self.length)
                made.append(torch.tensor(ids["input_ids"], dtype=torch.int64))
            yield made[number]

    def write(self, model: PreTrainedModel, tokens: int) -> None:
        """Let the model write so many tokens, where it has not yet."""
        if sum(map(len, self.made[OWN])) < tokens:
            self.made[OWN] = own_text(model, tokens, self.length, SEED)
        self.pieces = {**self.pieces, OWN: [""] * len(self.made[OWN])}

    def first(self, kind: str, number: int) -> list[Tensor]:
        """So many samples."""
        return [sample for sample, _ in zip(self.samples(kind), range(number), strict=False)]

    def tokens(self, kinds: Sequence[str], number: int) -> list[Tensor]:
        """Samples of so many tokens, as many of each kind; twice as many of a kind that is named twice."""
        drawn: list[Tensor] = []
        for kind, times in Counter(kinds).items():
            left = number * times // len(kinds)
            for sample in self.samples(kind):
                if left < 2:
                    break
                drawn.append(sample[:left])
                left -= len(drawn[-1])
            if left >= LENGTH:
                print(f"{kind}: {left} tokens of {number * times // len(kinds)} are missing")
        return drawn


def rows_of(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, compressed or not."""
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Texts, Texts]:
    """The text to fit to, and that held out, of other documents."""
    fit: dict[str, list[str]] = defaultdict(list)
    held_out: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows_of(arguments.chat)):
        side = held_out if number % HELD_OUT_EVERY == 0 else fit
        side["chat"].append(row_to_text(row, tokenizer))
    for path, side in ((arguments.calibration_text, fit), (arguments.text, held_out)):
        for row in rows_of(path):
            text = row["text"]
            side[row["source"]] += [text[i : i + PIECE] for i in range(0, len(text) - PIECE // 2, PIECE)]

    generator = np.random.default_rng(arguments.seed)
    for side in (fit, held_out):
        for pieces in side.values():
            generator.shuffle(pieces)
    length = arguments.length
    return Texts(fit, tokenizer, length), Texts(held_out, tokenizer, length)


def divergences(model: nn.Module, original: nn.Module, samples: Sequence[Tensor], batch_size: int) -> list[float]:
    """KL(original || model) on each sample, nats a token."""
    values = values_of(model, original, samples, kl, batch_size)[:, 0]  # (number of samples,)
    return [round(value, 5) for value in values.tolist()]


def removals(arguments: argparse.Namespace, original: nn.Module, texts: Texts) -> dict[str, Removal]:
    """Name -> removal: the named ones, block influence's, SLEB's and a random one of each size; kept in a file."""
    path = arguments.out.with_suffix(".removals.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Removal] = {}
    for text in arguments.removals:
        removed = parse_indices(text)
        found[f"named, {len(removed)}: {text}"] = removed

    depth = len(find_stack(original).layers)
    half = SCORED // 2
    samples = [sample[:SCORED_LENGTH] for kind in SAME for sample in texts.first(kind, half)]
    activations = baselines.measure_activations(original, samples)
    generator = np.random.default_rng(arguments.seed)
    for size in arguments.sizes:
        problem = RemovalProblem(np.eye(depth), size)
        found[f"block influence, {size}"] = baselines.block_influence(problem, activations).removed
        found[f"random, {size}"] = tuple(sorted(generator.permutation(np.arange(1, depth - 1))[:size].tolist()))
        name = f"SLEB, {size}"
        if arguments.sleb and name not in kept:
            kept[name] = baselines.sleb(original, samples, problem, batch_size=SCORED).removed
            write_json(path, kept)
        if name in kept:
            found[name] = tuple(kept[name])
    write_json(path, {name: list(removed) for name, removed in found.items()})
    return found


def jobs(arguments: argparse.Namespace, found: Mapping[str, Removal]) -> list[Job]:
    """All rows, the most important ones first."""
    most = max(arguments.tokens)
    named = [removed for name, removed in found.items() if name.startswith("named")]
    influence = [removed for name, removed in found.items() if name.startswith("block influence")]
    main = sorted([*named, *influence], key=lambda removed: (len(removed) != MIDDLE, -len(removed)))
    tried = list(dict.fromkeys([main[0], influence[-1]]))  # what variants are tried on
    fewer = [tokens for tokens in reversed(arguments.tokens) if tokens != most]

    # What decides between variants, then every removal, then the others' repairs, then the rest.
    listed = [Job(removed, name, SAME, most) for name in ("plain", OURS, *VARIANTS[:4], OUTWARD) for removed in tried]
    listed += [Job(removed, OURS, SAME, tokens) for removed in tried for tokens in fewer]
    listed += [Job(removed, OURS, (*SAME, OWN, *more), most) for more in ((), (OWN,)) for removed in tried]
    listed += [Job(removed, name, SAME, most) for removed in main for name in ("plain", OURS)]
    listed += [Job(removed, name, SAME, most) for removed in [*tried, *main] for name in BASELINES]
    for kinds in (("chat",), (*SAME, "pep"), (*SAME, "code"), (OWN,)):
        listed += [Job(removed, OURS, kinds, most) for removed in tried]
    listed += [Job(removed, name, SAME, most) for name in VARIANTS[4:] for removed in tried]
    for tokens in fewer:
        names = (*VARIANTS[:4], OUTWARD, *BASELINES)
        listed += [Job(removed, name, SAME, tokens) for name in names for removed in tried]
    rest = [removed for removed in found.values() if removed not in main]
    listed += [Job(removed, name, SAME, most) for removed in rest for name in ("plain", OURS, *BASELINES)]
    wanted = [job for job in listed if any(part in job.key for part in arguments.only)]
    return list(dict.fromkeys(wanted))


def run(arguments: argparse.Namespace) -> None:
    """Every row that is missing, until the time is up."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(arguments.model)
    original = load_model(arguments.model, dtype=arguments.dtype).to(arguments.device)
    texts, held_out = read(arguments, tokenizer)
    measured_on = {kind: held_out.first(kind, arguments.held_out) for kind in (*SAME, *OTHER)}
    wanted = {}
    for job in jobs(arguments, removals(arguments, original, texts)):
        wanted[job.key] = partial(measured, job, original, texts, measured_on, arguments)
    make_missing(wanted, arguments.out, started, arguments.seconds)


def measured(
    job: Job,
    original: PreTrainedModel,
    texts: Texts,
    measured_on: Mapping[str, Sequence[Tensor]],
    arguments: argparse.Namespace,
) -> Row:
    """One row."""
    if OWN in job.kinds:
        texts.write(original, job.tokens * job.kinds.count(OWN) // len(job.kinds))
    samples = [] if job.method == "plain" else texts.tokens(job.kinds, job.tokens)
    shortened = remove_blocks(original, job.removed, copy=False)

    start = time.perf_counter()
    report = METHODS[job.method](shortened, original, samples, batch_size=arguments.batch_size)
    seconds = time.perf_counter() - start

    row: Row = {
        "removed": ranges(job.removed),
        "method": job.method,
        "kinds": "+".join(job.kinds),
        "tokens": sum(map(len, samples)),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "dtype": arguments.dtype,
    }
    if report is not None:
        row |= {"passes": report.passes, "kept": sum(step.kept for step in report.steps), "steps": len(report.steps)}
    row["kl"] = {
        kind: divergences(shortened, original, samples, arguments.batch_size) for kind, samples in measured_on.items()
    }
    return row


def share(values: Sequence[float], plain: Sequence[float]) -> tuple[float, float]:
    """The ratio of two means over the same samples, two or more, and its standard error."""
    ours, theirs = np.array(values), np.array(plain)
    error = standard_error(ours / theirs, theirs)  # the ratio is a mean of ratios, weighted by what is below
    assert error is not None
    return float(ours.mean() / theirs.mean()), error


def table(path: Path) -> str:
    """The rows as Markdown: KL on each kind, and as shares of the plain model's."""
    rows = load(path)
    plain = {row["removed"]: row["kl"] for row in rows if row["method"] == "plain"}
    lines = [
        f"| removed | method | text | tokens | {' | '.join((*SAME, *OTHER))} | same kinds | other kinds | passes | s |",
        "|---" * (8 + len(SAME) + len(OTHER)) + "|",
    ]
    for row in rows:
        cells = [row["removed"], row["method"], row["kinds"], f"{row['tokens']:,}"]
        cells += [f"{np.mean(row['kl'][kind]):.3f}" for kind in (*SAME, *OTHER)]
        if row["removed"] in plain:
            for kinds in (SAME, OTHER):
                ours, theirs = (
                    [values for kind in kinds for values in kls[kind]] for kls in (row["kl"], plain[row["removed"]])
                )
                ratio, error = share(ours, theirs)
                cells.append(f"{ratio:.3f} ±{error:.3f}")
        cells += [f"{row.get('passes', 0):.1f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="hub id, folder, or smollm2")
    parser.add_argument("--chat", help="conversations, for fitting and, one of eight, held out")
    parser.add_argument("--calibration-text", help="rows with text and source (novel, ...), for fitting")
    parser.add_argument("--text", help="the same of other documents, held out")
    parser.add_argument("--removals", nargs="*", default=["5,13-18,26"], help="blocks, besides the methods' choices")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 12], help="blocks that the methods choose")
    parser.add_argument(
        "--sleb", action=argparse.BooleanOptionalAction, default=False, help="SLEB's choices too: a minute on a GPU"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536, 250_000], help="to fit to")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose key has one of these in it: '| repair |'")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sample at most")
    parser.add_argument("--held-out", type=int, default=48, help="samples of each held-out kind")
    parser.add_argument("--batch-size", type=int, help="8, or 64 on a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    add_seconds(parser)
    parser.add_argument("--seed", type=int, default=SEED, help="draws the text and the random removals")
    parser.add_argument("--tiny", action="store_true", help="few tokens and one size, to try the script")
    parser.add_argument("--out", type=Path, default=Path("repair.jsonl"))
    parser.add_argument("--table", type=Path, help="print the rows of this file and end")
    arguments = parser.parse_args()

    if arguments.table:
        print(table(arguments.table))
        return

    arguments.batch_size = arguments.batch_size or (64 if arguments.device == "cuda" else 8)
    if arguments.tiny:
        arguments.sizes, arguments.tokens, arguments.held_out = [8], [4096, 8192], 2
        arguments.length = 64
    run(arguments)


if __name__ == "__main__":
    main()
