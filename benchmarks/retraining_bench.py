"""What the parts of `retraining.py` share: the models, the data, one training with its measurements, and the rows."""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockspin.data.packing import pack
from blockspin.distillation.run import distill
from blockspin.model.blocks import find_stack
from blockspin.model.loading import load_model
from blockspin.model.own_text import own_text
from blockspin.model.quality import quality, values_of
from blockspin.problem import Removal
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks
from blockspin.training import DistillConfig

Start = tuple[str, str]  # the number of blocks and the method; or "predicted" and the removal's number
FIRST: Start = ("8", "blockspin")  # where one change of the recipe is tried
BATCH = 4  # windows a step
RATES = (2e-4, 6e-4)
SOME, MOST = 200_000, 1_000_000  # tokens of a training
ANSWERED_AT_ONCE = 512  # texts that the original writes side by side, on a GPU
NEVER = 10**6  # steps
FIRST_GUESS = 20_000.0  # tokens/s
DATA = ("calibration", "validation", "chat", "text", "train")
MEASURED = ("validation", "chat", "text")
CONVERSATIONS, THIRD_OWN, TWO_THIRDS_OWN, ALL_OWN = "train", "a third own", "two thirds own", "all own"  # texts
MIXED = "calibration, a third own"  # text of a repair


@dataclass(frozen=True)
class Run:
    """One training: from where, how long, on which text and how.

    fitted_to: the text of the repair. text: that of the training. batch: windows of a step. changes: of the settings.
    """

    start: Start
    tokens: int
    rate: float = RATES[0]
    repaired: bool = True
    fitted_to: str = MIXED
    seed: int = 0
    name: str = "main"
    text: str = THIRD_OWN
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
        self.out, self.ends_at, self.least = arguments.out, ends_at, arguments.least
        self.change_tokens = arguments.change_tokens
        self.models: Path | None = arguments.models
        self.timed_steps, self.timed_batches = arguments.timed_steps, arguments.timed_batches
        self.original = tiny_model() if self.tiny else load_model(arguments.model, dtype="float32")
        self.original.to(self.device)
        self.teacher = copy.deepcopy(self.original)
        if self.device.type == "cuda":
            self.teacher.to(torch.bfloat16)

        with np.load(arguments.data.with_suffix(".npz")) as arrays:
            found = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in DATA}  # (windows, 512)
            flat, ends = arrays["prompts"].astype(int).tolist(), np.cumsum(arrays["prompt_lengths"], dtype=int).tolist()
        for name in MEASURED:
            number = min(arguments.windows or len(found[name]), len(found[name]))
            found[name] = found[name][np.linspace(0, len(found[name]) - 1, number).round().astype(int)]
        if self.tiny:
            found = {name: rows[:8, :16] % self.original.config.vocab_size for name, rows in found.items()}
        self.data: dict[str, list[Tensor]] = {name: list(rows) for name, rows in found.items()}
        self.prompts = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]  # token ids
        if self.tiny:
            self.prompts = [[token % 256 for token in prompt[:8]] for prompt in self.prompts[:12]]

        self.removals: dict[Start, Removal] = {}
        for goal, by_method in json.loads(arguments.data.with_suffix(".json").read_text()).items():
            for method, removed in by_method.items():
                self.removals[goal, method] = (1, 2, 3, 4) if self.tiny else tuple(removed)

        self.speed = FIRST_GUESS
        self.part, self.rows = "", list[dict[str, Any]]()
        self._repaired: tuple[tuple[Start, str], PreTrainedModel] | None = None  # the last start that was repaired

    def write(self, tokens: int) -> None:
        """The texts of the training and of the repair of which a share is written by the original."""
        length = len(self.data[CONVERSATIONS][0])
        at_once = ANSWERED_AT_ONCE if self.device.type == "cuda" else None
        partial = self.out / "own.journal"
        written = own_text(self.teacher, tokens, length, batch_size=at_once, partial=partial)
        own = [torch.tensor(window) for window in pack((row.tolist() for row in written), length, None)]

        self.data[ALL_OWN] = own
        self.data[THIRD_OWN] = [*own, *self.data[CONVERSATIONS][: 2 * len(own)]]
        self.data[TWO_THIRDS_OWN] = [*own, *self.data[CONVERSATIONS][: len(own) // 2]]
        calibration = self.data["calibration"]
        self.data[MIXED] = [*calibration[: len(calibration) * 2 // 3], *own[: len(calibration) // 3]]

    def open(self, part: str) -> None:
        """Go on to another part."""
        self.part, self.rows = part, read_rows(self.out / f"{part}.jsonl")

    def student(self, run: Run) -> PreTrainedModel:
        """A new student. A start is repaired once."""
        if not run.repaired:
            return remove_blocks(self.original, self.removals[run.start])

        made_of = run.start, run.fitted_to
        if self._repaired is None or self._repaired[0] != made_of:
            model = remove_blocks(self.original, self.removals[run.start])
            print(repair(model, self.original, self.data[run.fitted_to]).summary(), flush=True)
            self._repaired = made_of, model
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
        student = self.student(run)
        values = self.train(student, run) if run.tokens else {"original": self.measured(self.original)}
        if self.models is not None and run.name == "main" and run.tokens in (0, MOST) and run.seed == 0:
            student.save_pretrained(self.models / f"{self.part}-{run.tokens}-{run.rate:.0e}")
        return self.keep(run, {**values, **self.measured(student)})

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
        text = self.data[run.text]
        order = np.random.default_rng(run.seed).permutation(len(text))
        samples = [text[i] for i in order[: steps * run.batch].tolist()]
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
        )
        config = replace(config, **dict(run.changes))
        if config.dtype == "bfloat16":
            student.to(torch.bfloat16)

        gone = self.removals[run.start]
        kept = [i for i in range(len(find_stack(self.original).layers)) if i not in gone]
        started = time.monotonic()
        result = distill(student, self.teacher, samples, self.data["validation"], config=config, kept=kept)
        seconds = time.monotonic() - started
        student.to(torch.float32)
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
        found = {rate: self.row(replace(run, rate=rate))["validation"] for rate in RATES}
        return min(found, key=lambda rate: found[rate])


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
