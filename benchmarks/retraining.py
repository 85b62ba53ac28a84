"""What retraining brings back on a real model, from several starts, for how many tokens; and what of the recipe pays.

    python benchmarks/retraining_data.py MODEL --chat ... --text ... --out retraining      # once: windows and removals
    python benchmarks/retraining.py MODEL --data retraining --out results --part 8-blockspin-repaired --seconds 250

Each part appends a row of JSON to OUT/PART.jsonl for each training and, run again, continues after the last one. Parts
can run side by side. `--list` prints them, the most important first:

    8-blockspin-repaired, ...  a removal of 8 or 4 blocks with 0, 50 k, 200 k and 1 M tokens (more seeds where it
                               matters), the better of two learning rates on validation windows: plain, trained on
                               conversations; or repaired and trained with a third of both texts written by the original
    predict-0, ...             20 removals: does KL before training, repaired or not, or after 50 short steps, order
                               them as the KL after 200 k tokens does? predict-longer-0, ...: after 1 M?
    crossed                    each start with the text of the other, 1 M tokens
    texts, rate, loss, trained, order, answers, on-policy
                               changes of the recipe, one at a time, from the first repaired start, with 300 k tokens
    throughput                 tokens/s of the training beside those of a plain Trainer; run it alone
    write                      the original's own text, and nothing else; any part writes it where it is not there

Rows hold loss and KL of every held-out window, so that differences have paired standard errors;
`retraining_report.py` makes tables and a figure of them. With --tiny everything runs on a random model, in seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain_trainer import plain_speed
from retraining_bench import (
    ALL_OWN,
    ANSWERED_AT_ONCE,
    BATCH,
    CONVERSATIONS,
    FIRST,
    MIXED,
    MOST,
    RATES,
    SOME,
    THIRD_OWN,
    TWO_THIRDS_OWN,
    Bench,
    OutOfTimeError,
    Run,
    Start,
)

from blockspin.data.packing import pack
from blockspin.distillation.generation import generate_answers
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks

STARTS = ("blockspin", "block influence", "SLEB", "random")
LEAST, CHANGE_TOKENS = 50_000, 300_000  # tokens of a training
PARALLEL = 4  # parts of the removals whose outcome is predicted
SHORT_STEPS = 50  # of one window
TIMED_STEPS, TIMED_BATCHES = 60, (BATCH, 4 * BATCH)
GENERATED, ANSWER_TOKENS = 1536, 256


def from_start(bench: Bench, start: Start, repaired: bool) -> None:
    """What 0, 50 k, 200 k and 1 M tokens bring back of one removal."""
    if start not in bench.removals:
        print(f"{start}: the removal is not known yet", flush=True)
        return
    run = Run(start, 0, repaired=repaired, text=THIRD_OWN if repaired else CONVERSATIONS)
    bench.row(run)
    best = bench.best_rate(replace(run, tokens=MOST))
    bench.best_rate(replace(run, tokens=SOME))
    bench.best_rate(replace(run, tokens=bench.least))
    for seed in (1, 2) if start[1] in STARTS[:2] else ():
        bench.row(replace(run, tokens=MOST, rate=best, seed=seed))


def crossed(bench: Bench) -> None:
    """How much of it is the repair, and how much the text: each start of two methods with the text of the other."""
    for method in STARTS[:2]:
        run = Run((FIRST[0], method), MOST, name="crossed")
        bench.best_rate(replace(run, repaired=False))
        bench.best_rate(replace(run, text=CONVERSATIONS))


def predict(bench: Bench, remainder: int, tokens: int) -> None:
    """A part of the removals: KL before training, after short steps, and after so many tokens."""
    numbers = sorted(int(number) for goal, number in bench.removals if goal == "predicted")
    short = SHORT_STEPS * len(bench.data[CONVERSATIONS][0])  # tokens
    for number in numbers[remainder::PARALLEL]:
        run = Run(("predicted", str(number)), tokens, name="predict")
        for repaired in (False, True):
            bench.row(replace(run, tokens=0, repaired=repaired))
            bench.row(replace(run, tokens=short, repaired=repaired, batch=1))
        bench.row(run)


# A change of the recipe: its name, the settings, and the learning rates, relative to the lower one.
Change = tuple[str, dict[str, Any], tuple[float, ...]]
AS_IT_IS: list[Change] = [("as it is", {}, (1.0, 3.0))]
LOSSES: list[Change] = [
    ("cross-entropy 0.5", {"cross_entropy": 0.5}, (1.0,)),
    ("hidden states 1", {"hidden_states": 1.0}, (1.0,)),
    ("temperature 2", {"temperature": 2.0}, (1.0, 0.5)),
    ("cross-entropy 2", {"cross_entropy": 2.0}, (1.0,)),
    ("top 64", {"top_k": 64}, (1.0,)),
    ("reverse KL", {"divergence": "reverse-kl"}, (1.0,)),
    ("Jensen-Shannon", {"divergence": "js"}, (1.0, 2.0)),
    ("weights in bfloat16", {"dtype": "bfloat16"}, (1.0, 0.3)),
]
ON_POLICY: list[Change] = [
    ("half on-policy", {"on_policy": 0.5}, (1.0,)),
    ("half on-policy, Jensen-Shannon", {"on_policy": 0.5, "divergence": "js"}, (1.0,)),
]
TRAINED: list[Change] = [
    ("neighbours", {"train": "neighbours"}, (1.0, 3.0)),
    ("norms and out-projections", {"train": "norms-and-projections"}, (1.0, 3.0)),
    ("LoRA, rank 64", {"lora_rank": 64}, (1.0, 3.0)),
]


def change(bench: Bench, changes: Sequence[Change], seeds: Sequence[int] = ()) -> None:
    """Changes of the recipe, and the recipe as it is with other seeds, which shows what chance does."""
    for name, settings, factors in changes:
        for factor in factors:
            bench.row(Run(FIRST, bench.change_tokens, RATES[0] * factor, name=name, changes=tuple(settings.items())))
    for seed in seeds:
        bench.row(Run(FIRST, bench.change_tokens, seed=seed, name="as it is"))


def self_generated(bench: Bench) -> None:
    """On answers that the original gives to the prompts, instead of on those of the data; and on half of each."""
    answers = generate_answers(
        bench.teacher,
        bench.prompts[:GENERATED],
        max_new_tokens=8 if bench.tiny else ANSWER_TOKENS,
        seed=0,
        batch_size=4 if bench.tiny else ANSWERED_AT_ONCE,
        partial=bench.out / "answers.journal",
    )
    length = len(bench.data[CONVERSATIONS][0])
    own = [torch.tensor(window) for window in pack(iter(answers), length, None)]
    own = own[: bench.change_tokens // length]
    bench.data["own"], bench.data["half own"] = own, [*own[::2], *bench.data[CONVERSATIONS][: len(own) // 2]]
    print(f"{len(answers)} answers, {len(own)} windows", flush=True)
    for seed in (0, 1):
        for text, name in (("own", "the original's own answers"), ("half own", "half of the answers its own")):
            bench.row(Run(FIRST, len(own) * length, seed=seed, name=name, text=text))


def texts(bench: Bench) -> None:
    """On a third of the original's own text, on nothing else, on two thirds and on conversations only."""
    names = {
        THIRD_OWN: "as it is",
        ALL_OWN: "only own text",
        TWO_THIRDS_OWN: "two thirds own",
        CONVERSATIONS: "none own",
    }
    for text, name in names.items():
        bench.row(Run(FIRST, bench.change_tokens, name=name, text=text))


def in_steps(bench: Bench) -> None:
    """Instead of all at once: remove, repair and train in steps, with as many tokens in all."""
    removed = bench.removals[FIRST]
    for steps in (2, 4):
        run = Run(FIRST, bench.change_tokens // steps, name=f"in {steps} steps")
        if bench.find(run) is not None:
            continue

        # The blocks of a step are spread over the model; earlier ones have moved the later blocks down.
        bench.check_time(bench.change_tokens)
        student, gone = bench.original, list[int]()
        for step in range(steps):
            going = removed[step::steps]
            before, positions = student, [i - sum(earlier < i for earlier in gone) for i in going]
            student = remove_blocks(before, positions)
            repair(student, before, bench.data[MIXED])
            trained = bench.train(student, replace(run, seed=step))
            gone += going
        bench.keep(run, {**trained, **bench.measured(student)})


def throughput(bench: Bench) -> None:
    """Tokens/s of our training and of a plain Trainer, in turns."""
    windows = bench.data[CONVERSATIONS]
    steps = 4 if bench.tiny else bench.timed_steps
    for seed in (0, 1, 2):
        for batch in bench.timed_batches:
            tokens = steps * batch * len(windows[0])
            run = Run(FIRST, tokens, repaired=False, seed=seed, name="ours", text=CONVERSATIONS, batch=batch)
            bench.row(run)
            plain = replace(run, name="plain Trainer")
            if bench.find(plain) is None:
                speed = plain_speed(bench.student(run), bench.teacher, windows, batch, steps)
                bench.keep(plain, {"tokens_per_second": round(speed)})


def parts() -> dict[str, Callable[[Bench], None]]:
    """What each part does, the most important first."""
    found: dict[str, Callable[[Bench], None]] = {}
    for goal in ("8", "4"):
        for methods in (STARTS[:2], STARTS[2:]):
            for repaired in (True, False):
                for method in methods:
                    start = goal, method
                    found[part_of(start, repaired)] = partial(from_start, start=start, repaired=repaired)
    for name, tokens in (("predict", SOME), ("predict-longer", MOST)):
        for part in range(PARALLEL):
            found[f"{name}-{part}"] = partial(predict, remainder=part, tokens=tokens)
    found["crossed"] = crossed
    found["texts"] = texts
    found["rate"] = partial(change, changes=AS_IT_IS, seeds=(1, 2))
    found["loss"] = partial(change, changes=LOSSES)
    found["answers"] = self_generated
    found["on-policy"] = partial(change, changes=ON_POLICY)
    found["trained"] = partial(change, changes=TRAINED)
    found["order"] = in_steps
    found["throughput"] = throughput
    found["write"] = lambda bench: None
    return found


def part_of(start: Start, repaired: bool) -> str:
    """The part that trains from a start."""
    return "-".join([*start, "repaired" if repaired else "plain"]).replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="SmolLM2-135M-Instruct: folder or GGUF file")
    parser.add_argument("--data", type=Path, default=Path("retraining"), help="of retraining_data.py, without ending")
    parser.add_argument("--out", type=Path, default=Path("retraining-results"))
    parser.add_argument("--part", nargs="+", choices=list(parts()), default=[], help="one after another")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no training starts that would end later")
    parser.add_argument("--windows", type=int, help="to measure on, of each text, evenly spread (default: all)")
    parser.add_argument("--least", type=int, default=LEAST, help="tokens of the shortest training")
    parser.add_argument("--change-tokens", type=int, default=CHANGE_TOKENS, help="of a training with a changed recipe")
    parser.add_argument(
        "--own",
        type=int,
        default=MOST // 3,
        help="tokens that the original writes; a CPU core writes about 100 a second",
    )
    parser.add_argument("--models", type=Path, help="keep the models of the starts and after 1 M tokens here")
    parser.add_argument("--timed-steps", type=int, default=TIMED_STEPS, help="of a training of throughput")
    parser.add_argument("--timed-batches", type=int, nargs="+", default=TIMED_BATCHES, help="windows of its steps")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(parts()))
        return

    ends_at = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    bench = Bench(arguments, ends_at)
    bench.write(64 if arguments.tiny else arguments.own)
    for part in arguments.part:
        bench.open(part)
        try:
            parts()[part](bench)
        except OutOfTimeError:
            print(f"{part}: no time left", flush=True)


if __name__ == "__main__":
    main()
