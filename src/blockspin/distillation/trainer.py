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

from ..config import DistillConfig
from ..progress import bar, console

# transformers has called it by both names.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in fields(TrainingArguments)}
)


def training_arguments(config: DistillConfig, folder: Path, steps: int, weights: torch.dtype) -> TrainingArguments:
    """The settings in the Trainer's words. Weights in float32 on a GPU are multiplied in bfloat16 (autocast)."""
    cuda, checkpointing = torch.cuda.is_available(), config.gradient_checkpointing
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, steps // 10),
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
        **({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}} if checkpointing else {}),
    )


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples as a batch, padded on the right; a mask only where there is padding: without it is faster."""
    rows = [sample["input_ids"] for sample in samples]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids} | ({} if bool(mask.all()) else {"attention_mask": mask.long()})


def count_tokens(batch: dict[str, Tensor]) -> Tensor:
    """(rows, 2): tokens of each row that are not padding, and those of them that have a successor."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return torch.stack([mask.sum(1), mask[:, 1:].sum(1)], dim=1)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for a model whose forward pass gives the losses of each token (`loss.DistillationLoss`).

    The loss is the mean over all tokens of a step: of all processes, all accumulated batches. So neither the number of
    processes nor padding changes it.
    """

    def __init__(self, config: DistillConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the losses are scaled here
        self.weights = {"kl": 1.0, "cross_entropy": config.cross_entropy, "hidden": config.hidden_states}
        self.remove_callback(PrinterCallback)
        self.add_callback(ReportCallback(console.quiet))
        self._sums = torch.zeros(2, device=self.args.device)  # KL and cross-entropy since the last report, this process
        self._counts = torch.zeros(2, device=self.args.device)  # tokens and labels, all processes
        self._since = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and (2,) how many tokens and labels they have on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum((count_tokens(batch).sum(0) for batch in batches), torch.zeros(2)).to(device)
        counts = self.accelerator.reduce(own, "sum")
        self._counts += counts
        return batches, counts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of these inputs in the mean loss of the step, times the processes, over whose gradients the mean
        will be taken."""
        losses = model(**inputs)
        tokens, labels = num_items_in_batch
        counts = {"kl": tokens, "cross_entropy": labels, "hidden": tokens}
        terms = [weight * losses[name].sum() / counts[name] for name, weight in self.weights.items() if weight]
        self._sums += torch.stack([losses["kl"].detach().sum(), losses["cross_entropy"].detach().sum()])
        loss = torch.stack(terms).sum() * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what training reports lack: KL and perplexity of the student, tokens/s over all processes."""
        if "loss" in logs:
            sums, counts = self.accelerator.reduce(self._sums, "sum"), self._counts
            now = time.perf_counter()
            logs["kl"], logs["perplexity"] = _means(sums, counts)
            logs["tokens_per_second"] = float(counts[0]) / (now - self._since)
            self._sums, self._counts, self._since = torch.zeros_like(sums), torch.zeros_like(counts), now
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """KL(teacher || student) in nats a token and the student's perplexity, on all validation samples."""
        started = time.perf_counter()
        self.model.eval()
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad():
                losses = self.model(**inputs)
            sums = torch.stack([losses["kl"].sum(1), losses["cross_entropy"].sum(1)], dim=1)
            rows = self.accelerator.gather_for_metrics(torch.cat([sums, count_tokens(inputs).to(sums)], dim=1))
            totals += rows.double().sum(0).cpu()
        kl, perplexity = _means(totals[:2], totals[2:])
        metrics = {f"{metric_key_prefix}_kl": kl, f"{metric_key_prefix}_perplexity": perplexity}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # tokens/s are those of training
        return metrics


def _means(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    kl, cross_entropy = (sums / counts).tolist()
    return kl, math.exp(min(cross_entropy, 700.0))


class ReportCallback(TrainerCallback):  # type: ignore[misc]
    """A progress bar with what matters, and an early word when training goes wrong."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.recent: deque[float] = deque(maxlen=5)
        self.lowest, self.warned = math.inf, False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if not self.quiet:
            self.progress = bar()
            self.progress.start()
            self.task = self.progress.add_task("Distilling", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_save = False  # resuming at the last step would make one more

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
        self._watch_for_divergence(args, state)

    def _watch_for_divergence(self, args: TrainingArguments, state: Any) -> None:
        """Warn once when the mean of five reports is half as high again as the lowest such mean."""
        if len(self.recent) < 5:
            return
        mean = sum(self.recent) / 5
        if mean > 1.5 * self.lowest and not self.warned:
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
