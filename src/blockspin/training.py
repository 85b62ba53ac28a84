"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .settings import SPLIT, SettingError, Settings, parse_names, setting

TEACHER_QUANTIZATIONS = ("auto", "nf4", "none")
DIVERGENCES = ("kl", "reverse-kl", "js")
TRAINED = ("all", "neighbours", "norms-and-projections")
TRAINING_DTYPES = ("auto", "float32", "bfloat16")
CACHED_TOKENS = 64  # of the vocabulary, at each place of a text
MAX_SEED = 2**32 - 1  # what NumPy takes


@dataclass(frozen=True)
class DistillConfig(Settings):
    """How a shortened model is trained with the original as its teacher; the defaults are the paper's (Table 10).

    The loss is KL(teacher || student) + cross_entropy * that of the next token + hidden_states * the relative squared
    distance of the hidden states after each kept block.
    """

    panel: ClassVar[str] = "Training"

    teacher: str | None = setting("The original model: hub id or local folder.", None)
    data: str | None = setting("Text to train on: hub id or local file, texts or conversations.", None)
    split: str = setting("Split of a hub dataset.", SPLIT)
    max_length: int = setting("Tokens of a training sample; the texts are packed to this length.", 1024, least=2)
    validation_split: float = setting("Share of the samples that is only measured.", 0.01, above=0, below=1)
    num_epochs: float = setting("Passes over the data.", 1.0, above=0)
    max_steps: int = setting("Optimiser steps at most.", 10_000, least=1)
    batch_size: int = setting("Samples in one pass, on each device.", 16, least=1)
    gradient_accumulation: int = setting("Passes before each optimiser step.", 1, least=1)
    learning_rate: float | None = setting(
        "Highest learning rate; it falls along a cosine (default: by the width of the model).", None, above=0
    )
    warmup_steps: int = setting("Steps in which the learning rate rises; a tenth of all steps at most.", 100, least=0)
    weight_decay: float = setting("Weight decay of AdamW.", 1e-4, least=0)
    max_grad_norm: float = setting("Gradients longer than this are cut.", 1.0, least=0)
    seed: int = setting("Decides the order of the data.", 42, least=0, most=MAX_SEED)
    self_generated: int | None = setting(
        "Train on so many answers that the teacher gives to the prompts of the data, instead of on the data.",
        None,
        least=2,
    )
    answer_tokens: int = setting("Tokens of such an answer at most.", 256, least=1, needs=("self_generated",))
    on_policy: float = setting(
        "Share of the batches whose second half is what the student itself goes on with.", 0.0, least=0, most=1
    )
    divergence: str = setting(
        "What is made small: kl (from the teacher), reverse-kl, or js (Jensen-Shannon).", "kl", choices=DIVERGENCES
    )
    temperature: float = setting("Both distributions are softened by it.", 1.0, above=0)
    cross_entropy: float = setting("Weight of the cross-entropy with the next token.", 0.0, least=0)
    hidden_states: float = setting("Weight of the distance between hidden states after kept blocks.", 0.0, least=0)
    top_k: int | None = setting(
        "Compare only the teacher's most probable tokens, the rest as one (default: all).", None, least=1
    )
    cache_teacher: str | None = setting(
        "Folder for the teacher's --top-k (default: 64) at every token, so that it runs over the data only once.", None
    )
    chunk_tokens: int = setting("Tokens whose logits are held at a time.", 1024, least=1)
    dtype: str = setting(
        "The student's: auto is bfloat16 on a GPU; float32 costs twice the memory there.",
        "auto",
        choices=TRAINING_DTYPES,
    )
    teacher_quantization: str = setting(
        "auto, nf4 (4 bits, needs bitsandbytes) or none.", "auto", choices=TEACHER_QUANTIZATIONS
    )
    train: str = setting(
        "all weights, those of the neighbours of removed blocks, or norms-and-projections: norms and out-projections.",
        "all",
        choices=TRAINED,
    )
    lora_rank: int | None = setting(
        "Train low-rank adapters, merged at the end, not all weights (needs peft).", None, least=1
    )
    gradient_checkpointing: bool = setting("Less memory, a third more time.", False)
    log_steps: int = setting("Steps between two reports.", 10, least=1)
    eval_steps: int = setting("Steps between two validations.", 1000, least=1)
    save_steps: int = setting(
        "Steps between two checkpoints, from which a run that was cut off continues.", 500, least=1
    )
    report_to: tuple[str, ...] = setting("Log to tensorboard, wandb, ...: names with commas.", (), parse=parse_names)
    trust_remote_code: bool = setting("Run code that comes with the model.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_teacher is not None and self.on_policy:
            raise SettingError("cache_teacher", "needs text that is known before; leave out --on-policy")
        if self.cache_teacher is not None and self.hidden_states:
            raise SettingError("cache_teacher", "keeps no hidden states; leave out --hidden-states")
        if self.lora_rank is not None and self.train != "all":
            raise SettingError("lora_rank", f"trains adapters instead of weights; leave out --train {self.train}")

    @property
    def the_teacher(self) -> str:
        """The teacher, where one must be given."""
        if self.teacher is None:
            raise ValueError("distillation needs a teacher (--teacher)")
        return self.teacher

    @property
    def the_data(self) -> str:
        """The text, where one must be given."""
        if self.data is None:
            raise ValueError("distillation needs data (--data)")
        return self.data

    @property
    def compared_tokens(self) -> int | None:
        """How many of the teacher's most probable tokens are compared one by one; None: all."""
        return self.top_k or (CACHED_TOKENS if self.cache_teacher is not None else None)
