"""What retraining brings back on a real model, from several starts, for how many tokens; and what of the recipe pays.

    python benchmarks/retraining_data.py MODEL --chat ... --text ... --out retraining      # once: windows and removals
    python benchmarks/retraining.py MODEL --data retraining --out results --part 8-blockspin-repaired --seconds 250

Each part appends a row of JSON to OUT/PART.jsonl for each training and, run again, continues after the last one. Parts
can run side by side. `--list` prints them, the most important first:

    8-blockspin-repaired, ...  a removal of 8 or 4 blocks, repaired or plain, with 0, 50 k, 200 k and 1 M tokens, the
                               last with two seeds; the learning rate is chosen on validation windows, after 200 k
    predict-0, predict-1       20 removals: does KL before training, repaired or not, or after 50 short steps, order
                               them as the KL after 300 k tokens does?
    loss, trained, order       one change of the recipe each, from the first start, with 500 k tokens
    throughput                 tokens/s of the training beside those of a plain Trainer; run it alone

Rows hold loss and KL of every held-out window, so that differences have paired standard errors;
`retraining_report.py` makes tables and a figure of them. With --tiny everything runs on a random model, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_trainer import plain_speed
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockspin.config import DistillConfig
from blockspin.distillation.run import distill
from blockspin.model.blocks import find_stack
from blockspin.model.loading import load_model
from blockspin.model.quality import quality, values_of
from blockspin.problem import Removal
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks

Start = tuple[str, str]  # the number of blocks and the method; or "predicted" and the removal's number
STARTS = ("blockspin", "block influence", "SLEB", "random")
FIRST: Start = ("8", "blockspin")  # where one change of the recipe is tried
BATCH = 4  # windows a step
RATES = (2e-4, 6e-4, 2e-3)
MOST, CHOOSING, LEAST = 1_000_000, 200_000, 50_000  # tokens
PREDICTED_TOKENS, CHANGE_TOKENS = 300_000, 500_000
SHORT_STEPS = 50  # of one window
TIMED_STEPS = 60
NEVER = 10**6  # steps
FIRST_GUESS = 20_000.0  # tokens/s
DATA = ("calibration", "validation", "chat", "text", "train")


@dataclass(frozen=True)
class Run:
    """One training: from where, how long and how; batch counts the windows of a step, and changes are those of the
    settings."""

    start: Start
    tokens: int
    rate: float = RATES[1]
    repaired: bool = True
    seed: int = 0
    name: str = "main"
    batch: int = BATCH
    changes: tuple[tuple[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


class OutOfTimeError(Exception):
    """The next training would end too late."""


class Bench:
    """The models and the data, and the finished rows of a part."""

    def __init__(self, arguments: argparse.Namespace, ends_at: float) -> None:
        self.device, self.tiny = torch.device(arguments.device), arguments.tiny
        self.out, self.ends_at = arguments.out, ends_at
        self.original = tiny_model() if self.tiny else load_model(arguments.model, dtype="float32")
        self.original.to(self.device)
        self.teacher = copy.deepcopy(self.original)
        if self.device.type == "cuda":
            self.teacher.to(torch.bfloat16)

        with np.load(arguments.data.with_suffix(".npz")) as arrays:
            found = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in DATA}  # (windows, 512)
        if self.tiny:
            found = {name: rows[:8, :16] % self.original.config.vocab_size for name, rows in found.items()}
        self.data: dict[str, list[Tensor]] = {name: list(rows) for name, rows in found.items()}

        self.removals: dict[Start, Removal] = {}
        for goal, by_method in json.loads(arguments.data.with_suffix(".json").read_text()).items():
            for method, removed in by_method.items():
                self.removals[goal, method] = (1, 2, 3, 4) if self.tiny else tuple(removed)

        self.speed = FIRST_GUESS
        self.part, self.rows = "", list[dict[str, Any]]()
        self._repaired: tuple[Start, PreTrainedModel] | None = None  # the last start that was repaired

    def open(self, part: str) -> None:
        """Go on to another part."""
        self.part, self.rows = part, read_rows(self.out / f"{part}.jsonl")

    def student(self, start: Start, repaired: bool) -> PreTrainedModel:
        """A new student. A start is repaired once."""
        if not repaired:
            return remove_blocks(self.original, self.removals[start])
        if self._repaired is None or self._repaired[0] != start:
            model = remove_blocks(self.original, self.removals[start])
            print(repair(model, self.original, self.data["calibration"]).summary(), flush=True)
            self._repaired = start, model
        return copy.deepcopy(self._repaired[1])

    def row(self, run: Run) -> dict[str, Any]:
        """The row of a run: from the file, or trained and measured now.

        Raises:
            OutOfTimeError: it would not be ready in time.
        """
        known = self.find(run)
        if known is not None:
            return known

        self.check_time(run.tokens)
        student = self.student(run.start, run.repaired)
        trained = self.train(student, run) if run.tokens else {}
        return self.keep(run, {**trained, **self.measured(student)})

    def find(self, run: Run) -> dict[str, Any] | None:
        """The row of a run, if it is there."""
        wanted = run.as_json()
        return next((row for row in self.rows if row["run"] == wanted), None)

    def check_time(self, tokens: int) -> None:
        if tokens / self.speed > self.ends_at - time.monotonic():
            raise OutOfTimeError

    def train(self, student: PreTrainedModel, run: Run) -> dict[str, Any]:
        """Train a student in place; its KL on the validation windows, and how long it took."""
        length = len(self.data["train"][0])
        steps = 4 if self.tiny else run.tokens // (run.batch * length)
        order = np.random.default_rng(run.seed).permutation(len(self.data["train"]))
        samples = [self.data["train"][i] for i in order[: steps * run.batch].tolist()]
        config = DistillConfig(
            max_length=length,
            batch_size=run.batch,
            max_steps=steps,
            num_epochs=1 + steps * run.batch / len(samples),
            learning_rate=run.rate,
            seed=run.seed,
            log_steps=max(1, steps // 2),
            eval_steps=NEVER,
            save_steps=NEVER,
            chunk_tokens=BATCH * length,
        )
        config = replace(config, **dict(run.changes))

        gone = self.removals[run.start]
        kept = [i for i in range(len(find_stack(self.original).layers)) if i not in gone]
        started = time.monotonic()
        result = distill(student, self.teacher, samples, self.data["validation"], config=config, kept=kept)
        seconds = time.monotonic() - started
        self.speed = steps * run.batch * length / seconds
        speeds = [entry["tokens_per_second"] for entry in result.history if "tokens_per_second" in entry]
        return {"validation": result.after["kl"], "seconds": round(seconds, 2), "tokens_per_second": round(speeds[-1])}

    def measured(self, model: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
        """Held-out text -> loss and KL of each of its windows, in nats a token."""
        found = {}
        for text in ("chat", "text"):
            values = values_of(model, self.original, self.data[text], quality)  # loss, KL, agreement
            found[text] = {"loss": values[:, 0].round(5).tolist(), "kl": values[:, 1].round(5).tolist()}
        return found

    def keep(self, run: Run, values: dict[str, Any]) -> dict[str, Any]:
        """Add the row of a run to the file of the part."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        row = {"run": run.as_json(), "removed": self.removals[run.start], "device": device, **values}
        self.rows.append(row)
        with (self.out / f"{self.part}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        kl = {text: round(float(np.mean(values[text]["kl"])), 4) for text in ("chat", "text") if text in values}
        print(run, values.get("validation"), kl, values.get("tokens_per_second"), flush=True)
        return row

    def best_rate(self, run: Run) -> float:
        """The learning rate with which a run ends nearest to the teacher, on the validation windows."""
        low, middle, high = RATES
        found = {rate: self.row(replace(run, rate=rate))["validation"] for rate in (middle, low, high)}

        # Where the best is at an end, the next one outside may be better still.
        outside = {low: low**2 / middle, high: high**2 / middle}
        best = min(found, key=lambda rate: found[rate])
        if best in outside:
            found[outside[best]] = self.row(replace(run, rate=outside[best]))["validation"]
        return min(found, key=lambda rate: found[rate])

    def known_rate(self) -> float:
        """The learning rate of the start where changes are tried, from the rows of its part; without them, a guess."""
        best: dict[str, Any] = {"validation": float("inf"), "run": {"rate": RATES[1]}}
        for row in read_rows(self.out / f"{part_of(FIRST, repaired=True)}.jsonl"):
            if row["run"]["tokens"] == CHOOSING and row["validation"] < best["validation"]:
                best = row
        rate: float = best["run"]["rate"]
        return rate


def from_start(bench: Bench, start: Start, repaired: bool) -> None:
    """What 0, 50 k, 200 k and 1 M tokens bring back of one removal."""
    run = Run(start, CHOOSING, repaired=repaired)
    bench.row(replace(run, tokens=0))
    rate = bench.best_rate(run)
    for tokens, seed in ((MOST, 0), (LEAST, 0), (MOST, 1)):
        bench.row(replace(run, tokens=tokens, rate=rate, seed=seed))


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


# A change of the recipe: its name, the settings, and the learning rates, relative to the one that was chosen.
Change = tuple[str, dict[str, Any], tuple[float, ...]]
LOSSES: list[Change] = [
    ("as it is", {}, (1.0,)),
    ("cross-entropy 0.5", {"cross_entropy": 0.5}, (1.0,)),
    ("hidden states 1", {"hidden_states": 1.0}, (1.0,)),
    ("temperature 2", {"temperature": 2.0}, (1.0, 0.5)),
    ("cross-entropy 2", {"cross_entropy": 2.0}, (1.0,)),
    ("top 64", {"top_k": 64}, (1.0,)),
]
TRAINED: list[Change] = [
    ("neighbours", {"train": "neighbours"}, (1.0, 3.0)),
    ("norms and out-projections", {"train": "norms-and-projections"}, (1.0, 3.0)),
    ("LoRA, rank 64", {"lora_rank": 64}, (1.0, 3.0)),
]


def change(bench: Bench, changes: Sequence[Change]) -> None:
    """Changes of the recipe, and the recipe as it is with other seeds, which shows what chance does."""
    rate = bench.known_rate()
    for name, settings, factors in changes:
        for factor in factors:
            bench.row(Run(FIRST, CHANGE_TOKENS, rate * factor, name=name, changes=tuple(settings.items())))
    for seed in (1, 2):
        bench.row(Run(FIRST, CHANGE_TOKENS, rate, seed=seed, name="as it is"))


def in_steps(bench: Bench) -> None:
    """Instead of all at once: remove, repair and train in steps, with as many tokens in all."""
    removed, rate = bench.removals[FIRST], bench.known_rate()
    for steps in (2, 4):
        run = Run(FIRST, CHANGE_TOKENS // steps, rate, name=f"in {steps} steps")
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
    steps = 4 if bench.tiny else TIMED_STEPS
    for seed in (0, 1, 2):
        for batch in (BATCH, 4 * BATCH):
            run = Run(FIRST, steps * batch * len(windows[0]), seed=seed, name="ours", batch=batch)
            bench.row(run)
            plain = replace(run, name="plain Trainer")
            if bench.find(plain) is None:
                speed = plain_speed(bench.student(FIRST, repaired=True), bench.teacher, windows, batch, steps)
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
    found["loss"] = partial(change, changes=LOSSES)
    found["trained"] = partial(change, changes=TRAINED)
    found["order"] = in_steps
    found["throughput"] = throughput
    return found


def part_of(start: Start, repaired: bool) -> str:
    """The part that trains from a start."""
    return "-".join([*start, "repaired" if repaired else "plain"]).replace(" ", "-")


def tiny_model() -> PreTrainedModel:
    """A random model for --tiny."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))
    return model


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without the last where it was cut off."""
    found = []
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="SmolLM2-135M-Instruct: folder or GGUF file")
    parser.add_argument("--data", type=Path, default=Path("retraining"), help="of retraining_data.py, without ending")
    parser.add_argument("--out", type=Path, default=Path("retraining-results"))
    parser.add_argument("--part", nargs="+", choices=list(parts()), default=[], help="one after another")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no training starts that would end later")
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
