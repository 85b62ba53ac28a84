"""What retraining brings back on a real model, from several starts, for how many tokens; and what of the recipe pays.

    python benchmarks/retraining_data.py MODEL --chat ... --text ... --out retraining      # once: windows and removals
    python benchmarks/retraining.py MODEL --data retraining --out results --part 8-blockspin-repaired --seconds 250

Each part appends a row of JSON to OUT/PART.jsonl for each training and, run again, continues after the last one. Parts
can run side by side. `--list` prints them, the most important first:

    8-blockspin-repaired, ...  a removal of 8 or 4 blocks, repaired or plain, with 0, 50 k, 200 k and 1 M tokens (with
                               two seeds where it matters); the learning rate is chosen on validation windows
    predict-0, predict-1       20 removals: does KL before training, repaired or not, or after 50 short steps, order
                               them as the KL after 200 k tokens does?
    own-text                   with a third of the text written by the original itself, from several starts
    starts                     as few tokens from the plain start as from the repaired one, three learning rates each
    after-repair               200 k tokens, a third written by the original, from the start that had such a repair
    loss, trained, order, answers, on-policy
                               changes of the recipe, one at a time, from the first start, with 300 k tokens
    throughput                 tokens/s of the training beside those of a plain Trainer; run it alone

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
from retraining_bench import BATCH, CHOOSING, FIRST, RATES, Bench, OutOfTimeError, Run, Start

from blockspin.data.packing import pack
from blockspin.distillation.generation import generate_answers
from blockspin.repairs.own_text import own_text
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks

STARTS = ("blockspin", "block influence", "SLEB", "random")
MOST, LEAST = 1_000_000, 50_000  # tokens of a training
PREDICTED_TOKENS, CHANGE_TOKENS = 200_000, 300_000
SHORT_STEPS = 50  # of one window
TIMED_STEPS, TIMED_BATCHES = 60, (BATCH, 4 * BATCH)
LOW_RATES = (6e-5, 2e-4, 6e-4)  # for short trainings
THIRD_OWN, MIXED = "a third own", "calibration, a third own"  # texts of a training and of a repair
GENERATED, ANSWER_TOKENS, ANSWERED_AT_ONCE = 1536, 256, 512


def from_start(bench: Bench, start: Start, repaired: bool) -> None:
    """What 0, 50 k, 200 k and 1 M tokens bring back of one removal."""
    if start not in bench.removals:
        print(f"{start}: the removal is not known yet", flush=True)
        return
    run = Run(start, CHOOSING, repaired=repaired)
    bench.row(replace(run, tokens=0))
    run = replace(run, rate=bench.best_rate(run))
    bench.row(replace(run, tokens=MOST))
    bench.row(replace(run, tokens=bench.least))
    if start[1] in STARTS[:2]:
        bench.row(replace(run, tokens=MOST, seed=1))


def predict(bench: Bench, remainder: int) -> None:
    """Every second removal: KL before training, after short steps, and after many."""
    numbers = sorted(int(number) for goal, number in bench.removals if goal == "predicted")
    short = SHORT_STEPS * len(bench.data["train"][0])  # tokens
    for number in numbers[remainder::2]:
        run = Run(("predicted", str(number)), PREDICTED_TOKENS, name="predict")
        for repaired in (False, True):
            bench.row(replace(run, tokens=0, repaired=repaired))
            bench.row(replace(run, tokens=short, repaired=repaired, batch=1))
        bench.row(run)


# A change of the recipe: its name, the settings, and the learning rates, relative to the middle one.
Change = tuple[str, dict[str, Any], tuple[float, ...]]
LOSSES: list[Change] = [
    ("as it is", {}, (1.0, 0.5, 2.0)),
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
            bench.row(Run(FIRST, CHANGE_TOKENS, RATES[1] * factor, name=name, changes=tuple(settings.items())))
    for seed in seeds:
        bench.row(Run(FIRST, CHANGE_TOKENS, seed=seed, name="as it is"))


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
    length = len(bench.data["train"][0])
    own = [torch.tensor(window) for window in pack(iter(answers), length, None)]
    own = own[: CHANGE_TOKENS // length]
    bench.data["own"], bench.data["half own"] = own, [*own[::2], *bench.data["train"][: len(own) // 2]]
    print(f"{len(answers)} answers, {len(own)} windows", flush=True)
    for seed in (0, 1):
        for text, name in (("own", "the original's own answers"), ("half own", "half of the answers its own")):
            bench.row(Run(FIRST, len(own) * length, seed=seed, name=name, text=text))


def own_text_too(bench: Bench) -> None:
    """On conversations only, or with a third of the text written by the original, which is of all kinds it knows."""
    mix_own_text(bench)
    for tokens in (bench.least, CHOOSING):
        for repaired, fitted_to in ((True, MIXED), (False, "calibration"), (True, "calibration")):
            run = Run(FIRST, tokens, repaired=repaired, fitted_to=fitted_to, name="own text")
            bench.row(replace(run, tokens=0))
            for text in ("train", THIRD_OWN):
                bench.row(replace(run, text=text))


def equal_tokens(bench: Bench) -> None:
    """Three learning rates from the plain and the repaired start, then a third own text with the better of them."""
    mix_own_text(bench)
    for repaired in (True, False):
        run = Run(FIRST, bench.least, repaired=repaired, fitted_to=MIXED, name="starts")
        bench.row(replace(run, tokens=0))
        validation = {rate: bench.row(replace(run, rate=rate))["validation"] for rate in LOW_RATES}
        best = min(validation, key=lambda rate: validation[rate])
        bench.row(replace(run, rate=best, text=THIRD_OWN))


def after_repair(bench: Bench) -> None:
    """From the repaired start, and a third own text in the training too: as many tokens as plain starts have."""
    mix_own_text(bench)
    run = Run(FIRST, CHOOSING, rate=RATES[0], fitted_to=MIXED, text=THIRD_OWN, name="after a repair")
    bench.row(replace(run, tokens=0))
    bench.row(run)


def mix_own_text(bench: Bench) -> None:
    """The texts of the training and of the repair, with a third of each written by the original."""
    length = len(bench.data["train"][0])
    tokens = 4 * length if bench.tiny else CHOOSING // 3
    written = own_text(bench.teacher, tokens, length, partial=bench.out / "own.journal")
    own = [torch.tensor(window) for window in pack((row.tolist() for row in written), length, None)]

    bench.data[THIRD_OWN] = [*own, *bench.data["train"][: 2 * len(own)]]
    calibration = bench.data["calibration"]
    bench.data[MIXED] = [*calibration[: len(calibration) * 2 // 3], *own[: len(calibration) // 3]]


def in_steps(bench: Bench) -> None:
    """Instead of all at once: remove, repair and train in steps, with as many tokens in all."""
    removed = bench.removals[FIRST]
    for steps in (2, 4):
        run = Run(FIRST, CHANGE_TOKENS // steps, name=f"in {steps} steps")
        if bench.find(run) is not None:
            continue

        # The blocks of a step are spread over the model; earlier ones have moved the later blocks down.
        bench.check_time(CHANGE_TOKENS)
        student, gone = bench.original, list[int]()
        for step in range(steps):
            going = removed[step::steps]
            before, positions = student, [i - sum(earlier < i for earlier in gone) for i in going]
            student = remove_blocks(before, positions)
            repair(student, before, bench.data["calibration"])
            trained = bench.train(student, replace(run, seed=step))
            gone += going
        bench.keep(run, {**trained, **bench.measured(student)})


def throughput(bench: Bench) -> None:
    """Tokens/s of our training and of a plain Trainer, in turns."""
    windows = bench.data["train"]
    steps = 4 if bench.tiny else bench.timed_steps
    for seed in (0, 1, 2):
        for batch in bench.timed_batches:
            run = Run(FIRST, steps * batch * len(windows[0]), seed=seed, name="ours", batch=batch)
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
    found["predict-0"] = partial(predict, remainder=0)
    found["predict-1"] = partial(predict, remainder=1)
    found["own-text"] = own_text_too
    found["starts"] = equal_tokens
    found["after-repair"] = after_repair
    found["loss"] = partial(change, changes=LOSSES, seeds=(1, 2))
    found["answers"] = self_generated
    found["on-policy"] = partial(change, changes=ON_POLICY)
    found["trained"] = partial(change, changes=TRAINED)
    found["order"] = in_steps
    found["throughput"] = throughput
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
    parser.add_argument("--timed-steps", type=int, default=TIMED_STEPS, help="of a training of throughput")
    parser.add_argument("--timed-batches", type=int, nargs="+", default=TIMED_BATCHES, help="windows of its steps")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(parts()))
        return

    ends_at = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments, ends_at)
    for part in arguments.part:
        bench.open(part)
        try:
            parts()[part](bench)
        except OutOfTimeError:
            print(f"{part}: no time left", flush=True)


if __name__ == "__main__":
    main()
