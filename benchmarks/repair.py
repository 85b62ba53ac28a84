"""What a repair brings back, beside the repairs that others propose: KL from the original on held-out text.

For each removal: the plain shortened model, ReplaceMe (least squares, cosine), LinearPatch, Ghosted Layers and the
repair, all fitted to the same text, and measured on held-out text of those kinds and of others. A
row is printed, and appended to --out, as soon as it is there; a method whose row is in the file is not run again.

    python benchmarks/repair.py MODEL --removals 3,12-15 5,13-18,26 --fit chat.jsonl novels.jsonl \\
        --same held_out_chat.jsonl held_out_novels.jsonl --other code.jsonl --out repair.jsonl

"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockspin.baselines import ghosted_layers, linear_patch, replaceme
from blockspin.config import parse_indices
from blockspin.data.calibration import load_calibration
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.quality import quality_of
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks
from blockspin.tables import ranges

Method = Callable[[nn.Module, nn.Module, list[Tensor]], Any]
SEED = 42
METHODS: dict[str, Method] = {
    "plain": lambda shortened, original, samples: None,
    "ReplaceMe": replaceme,
    "ReplaceMe, cosine": partial(replaceme, cosine=True),
    "LinearPatch": linear_patch,
    "Ghosted Layers": ghosted_layers,
    "repair": repair,
}


def run(arguments: argparse.Namespace) -> None:
    """Every method on every removal."""
    original = load_model(arguments.model, dtype="float32")
    tokenizer = load_tokenizer(arguments.model)

    def draw(files: list[str], samples_a_file: int) -> dict[str, list[Tensor]]:
        drawn = {}
        for file in files:
            drawn[Path(file).stem] = load_calibration(
                file, tokenizer, num_samples=samples_a_file, max_length=arguments.length, seed=SEED, progress=False
            )
        return drawn

    fitted_to = draw(arguments.fit, arguments.tokens // len(arguments.fit) // arguments.length)
    samples = [sample for kind in fitted_to.values() for sample in kind]
    held_out = draw([*arguments.same, *arguments.other], arguments.held_out)
    done = finished(arguments.out)
    for removal in arguments.removals:
        removed = parse_indices(removal)
        for name in arguments.methods:
            if (ranges(removed), name) in done:
                continue
            shortened = remove_blocks(original, removed, copy=False)
            start = time.perf_counter()
            METHODS[name](shortened, original, samples)
            row: dict[str, Any] = {
                "removed": ranges(removed),
                "method": name,
                "tokens": sum(map(len, samples)),
                "seconds": round(time.perf_counter() - start),
            }
            for kind, texts in held_out.items():
                row[kind] = round(quality_of(shortened, original, texts).kl, 4)
            print(json.dumps(row), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def finished(path: Path) -> set[tuple[str, str]]:
    """The removals and methods that have a row."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["removed"], row["method"]) for row in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--removals", nargs="+", required=True, help="blocks: 3,12-15")
    parser.add_argument("--fit", nargs="+", required=True, help="texts to fit to, in equal shares")
    parser.add_argument("--same", nargs="+", default=[], help="held-out texts of the same kinds")
    parser.add_argument("--other", nargs="+", default=[], help="held-out texts of other kinds")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens to fit to, at most")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample at most")
    parser.add_argument("--held-out", type=int, default=16, help="samples of each held-out text")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("repair.jsonl"))
    run(parser.parse_args())
