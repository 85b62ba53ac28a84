"""A shortened model and its teacher, and settings to train it with: shared by the tests of distillation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from conftest import random_samples, tiny_model
from torch.nn.functional import log_softmax

from blockspin.distillation.loss import DistillationLoss, split, training_forward
from blockspin.surgery.memory import remove_blocks
from blockspin.training import DistillConfig

Losses = dict[str, torch.Tensor]


def losses_of(
    student: tf.PreTrainedModel, teacher: tf.PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any
) -> Losses:
    """The objective's losses; the gradient of the sum of the KL is left in the student."""
    with training_forward(DistillationLoss(split(student), split(teacher), **options)):
        losses: Losses = student(**inputs)
        torch.autograd.backward(losses["kl"].sum())
    return losses


def reference_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    wanted, found = (log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)


def samples(number: int, length: int = 12, seed: int = 3) -> list[torch.Tensor]:
    return random_samples((length,) * number, seed)


def settings(**changes: Any) -> DistillConfig:
    """Small and fast; the models have 64 positions at most."""
    values = {"max_length": 32, "batch_size": 4, "learning_rate": 3e-3, "log_steps": 2, "max_steps": 8, "save_steps": 3}
    return DistillConfig(**{**values, "validation_split": 0.1, **changes})


def shortened(seed: int = 0) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    teacher = tiny_model("llama", seed=seed)
    return copy.deepcopy(remove_blocks(teacher, [1, 2])), teacher


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
