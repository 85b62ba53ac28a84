"""The training step that `retraining.py` compares speeds with: a plain Trainer, both forward passes, no chunks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

WARM_UP = 1 / 2  # of the steps are not timed


class PlainTrainer(Trainer):  # type: ignore[misc]
    """KL(teacher || student) of the logits of all tokens at once, as it would be written in a few lines."""

    teacher: PreTrainedModel

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The mean over all tokens."""
        with torch.no_grad():
            wanted = self.teacher(**inputs, use_cache=False).logits.float()  # (batch, length, vocabulary)
        found = model(**inputs, use_cache=False).logits.float()
        wanted, found = wanted.log_softmax(-1).flatten(0, 1), found.log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """The time when the first half of the steps is done is kept."""
        loss: Tensor = super().training_step(*arguments, **named)
        if self.state.global_step + 1 == round(WARM_UP * self.args.max_steps):
            self.half_at = self.now()
        return loss

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def plain_speed(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Sequence[Tensor], batch: int, steps: int
) -> float:
    """Tokens/s of the second half of the steps."""
    samples = [{"input_ids": windows[i % len(windows)]} for i in range(steps * batch)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PlainTrainer(student, arguments, train_dataset=samples)
        trainer.teacher = teacher.eval()
        trainer.train()
        seconds = trainer.now() - trainer.half_at
    return (steps - round(WARM_UP * steps)) * batch * len(windows[0]) / seconds
