"""The Hugging Face Trainer with the distillation loss: what is summed and divided, logged and watched."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..model.generation import continued
from ..model.head import SplitModel
from ..progress import bar, console
from ..training import DistillConfig

# What transformers calls gradient checkpointing: newer versions have another name.
_NAMES = {f.name for f in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"

WARMUP_SHARE = 10  # a short training warms up for a tenth of its steps
LARGEST_EXPONENT = 700.0  # of e in float64
STEPS_AHEAD = 16  # steps whose windows the student goes on with at once
REPORTS = 5  # reports whose mean loss is compared, to see whether the loss rises
RISE = 1.5  # times the lowest mean: a loss that has risen so much is reported


def training_arguments(
    config: DistillConfig, folder: Path, steps: int, rate: float, weights: torch.dtype
) -> TrainingArguments:
    """The arguments of the Trainer for these settings.

    rate: the highest learning rate. weights: the dtype of the student. Weights in float32 are multiplied in bfloat16
    on a GPU (autocast).
    """
    cuda = torch.cuda.is_available()
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        checkpointing = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=rate,
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, steps // WARMUP_SHARE),
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="cosine",
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # ReportCallback stops at them
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=1,
        bf16=cuda and weights == torch.float32,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        **checkpointing,
    )


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples as a batch, padded on the right. There is a mask only where there is padding: without it is faster.

    The teacher's view, where samples have one, is that of full windows.
    """
    if len(samples[0]) > 1:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    rows = [sample["input_ids"] for sample in samples]
    lengths = torch.tensor(list(map(len, rows)))  # (batch,)

    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)  # (batch, length)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    if mask.all():
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def count_tokens(batch: dict[str, Tensor]) -> Tensor:
    """(rows, 2): tokens of each row that are not padding, and those of them that have a successor."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return torch.stack([mask.sum(1), mask[:, 1:].sum(1)], dim=1)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for a model whose forward pass returns the losses of each token (`loss.DistillationLoss`).

    The loss of a step is the mean over its tokens, in all processes and all accumulated batches. So neither the number
    of processes nor padding changes it.

    student: the model inside whatever wraps it, which goes on with windows where that is asked for.
    """

    def __init__(self, config: DistillConfig, student: SplitModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the losses are scaled here
        divergence = "kl" if config.divergence == "kl" else "divergence"
        self.weights = {divergence: 1.0, "cross_entropy": config.cross_entropy, "hidden": config.hidden_states}
        self.student, self.on_policy = student, config.on_policy
        self._ahead: list[dict[str, Tensor]] = []  # batches of the next steps
        self.remove_callback(PrinterCallback)
        self.add_callback(ReportCallback(console.quiet))

        # Since the last report: KL and cross-entropy of this process, tokens and labels of all processes.
        self._sums = torch.zeros(2, device=self.args.device)
        self._counts = torch.zeros(2, device=self.args.device)
        self._since = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and (2,) how many tokens and labels they have on all processes."""
        batches = self._ahead[:num_batches]
        if not batches:
            steps = STEPS_AHEAD if self.on_policy else 1
            self._ahead, _ = super().get_batch_samples(epoch_iterator, steps * num_batches, device)
            if self.on_policy:
                self._continue_windows()
            batches = self._ahead[:num_batches]
        self._ahead = self._ahead[num_batches:]

        own = torch.zeros(2, device=device)  # of this process
        for batch in batches:
            own += count_tokens(batch).sum(0).to(device)
        counts = self.accelerator.reduce(own, "sum")
        self._counts += counts
        return batches, counts

    def _continue_windows(self) -> None:
        """Of a share of the next batches, replace the second half of each window by what the student goes on with."""
        chosen = []
        for number in range(len(self._ahead)):
            if int((number + 1) * self.on_policy) > int(number * self.on_policy):  # evenly spread
                chosen.append(number)
        if not chosen:
            return

        beginnings, longest = [], 0
        for number in chosen:
            batch = self._ahead[number]
            for row, length in zip(batch["input_ids"].cpu(), count_tokens(batch)[:, 0].tolist(), strict=True):
                beginnings.append(row[: (length + 1) // 2])
                longest = max(longest, length // 2)

        # Every process and every round draws its own.
        seed = (self.args.seed + self.state.global_step) * self.args.world_size + self.args.process_index
        with self.student.whole(), self.accelerator.autocast():
            rows = continued(self.student.model, beginnings, longest, seed)

        for number in chosen:
            size = len(self._ahead[number]["input_ids"])
            own, rows = rows[:size], rows[size:]
            batch = collate([{"input_ids": torch.tensor(row)} for row in own])
            self._ahead[number] = {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What these inputs add to the mean loss of the step, times the number of processes: the gradients of the
        processes are averaged."""
        losses = model(**inputs)  # (batch, length) each
        self._sums += torch.stack([losses["kl"].detach().sum(), losses["cross_entropy"].detach().sum()])

        tokens, labels = num_items_in_batch
        counts = {"kl": tokens, "divergence": tokens, "cross_entropy": labels, "hidden": tokens}
        weighted = []
        for name, weight in self.weights.items():
            if weight:
                weighted.append(weight * losses[name].sum() / counts[name])
        loss = torch.stack(weighted).sum() * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report on training, with KL and perplexity of the student and tokens/s over all processes."""
        if "loss" in logs:
            now = time.perf_counter()
            sums, counts = self.accelerator.reduce(self._sums, "sum"), self._counts
            logs["kl"], logs["perplexity"] = _kl_and_perplexity(sums, counts)
            logs["tokens_per_second"] = float(counts[0]) / (now - self._since)

            # The next report begins.
            self._sums, self._counts, self._since = torch.zeros_like(sums), torch.zeros_like(counts), now
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """KL(teacher || student) in nats a token and the student's perplexity, on all validation samples."""
        started = time.perf_counter()
        self.model.eval()

        totals = torch.zeros(4, dtype=torch.float64)  # KL, cross-entropy, tokens, labels
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad():
                losses = self.model(**inputs)
            sums = torch.stack([losses["kl"].sum(1), losses["cross_entropy"].sum(1)], dim=1)  # (batch, 2)
            rows = torch.cat([sums, count_tokens(inputs).to(sums)], dim=1)  # (batch, 4)

            # Of all processes, without the samples that only fill up the last batch.
            totals += self.accelerator.gather_for_metrics(rows).double().sum(0).cpu()

        kl, perplexity = _kl_and_perplexity(totals[:2], totals[2:])
        metrics = {f"{metric_key_prefix}_kl": kl, f"{metric_key_prefix}_perplexity": perplexity}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # tokens/s count the time of training alone
        return metrics


def _kl_and_perplexity(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """KL a token and perplexity, from the sums of KL and cross-entropy and the numbers of tokens and labels."""
    kl, cross_entropy = (sums / counts).tolist()
    return kl, math.exp(min(cross_entropy, LARGEST_EXPONENT))


class ReportCallback(TrainerCallback):  # type: ignore[misc]
    """A progress bar with KL, perplexity and speed. A loss that is not finite ends the training; one that rises is
    reported once.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.recent: deque[float] = deque(maxlen=REPORTS)
        self.lowest, self.warned = math.inf, False  # the lowest mean of recent losses so far

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if not self.quiet:
            self.progress = bar()
            self.progress.start()
            self.task = self.progress.add_task("Distilling", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_save = False  # a run resumed at the last step would make one more

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        if self.progress is not None:
            text = f"KL {logs['kl']:.3f}, {logs['perplexity']:.1f} ppl, {logs['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, description=text)

        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}; train with a lower --learning-rate "
                f"than {args.learning_rate:g} or with --dtype float32"
            )
        self.recent.append(logs["loss"])
        self._warn_of_divergence(args, state)

    def _warn_of_divergence(self, args: TrainingArguments, state: Any) -> None:
        """Warn once when the mean of the last reports is much above the lowest such mean."""
        if len(self.recent) < REPORTS:
            return

        mean = sum(self.recent) / REPORTS
        if mean > RISE * self.lowest and not self.warned:
            console.print(
                f"Step {state.global_step}: the loss has risen from {self.lowest:.4g} to {mean:.4g}; the learning rate "
                f"{args.learning_rate:g} may be too high (--learning-rate).",
                style="yellow",
            )
            self.warned = True
        self.lowest = min(self.lowest, mean)

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        kl, perplexity = metrics["eval_kl"], metrics["eval_perplexity"]
        console.print(f"Step {state.global_step}: validation KL {kl:.4f}, perplexity {perplexity:.2f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
