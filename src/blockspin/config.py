"""The settings of a run. The only defaults of the package's commands are here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from .files import replacing
from .problem import Goal

GRADIENT_ENERGIES = ("fisher", "empirical-fisher")  # computed from gradients; the others from shortened models
ENERGY_NAMES = ("secant", "pairwise", "gauss-newton", *GRADIENT_ENERGIES)
QUANTIZATIONS = ("auto", "nf4", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_remove(text: str) -> Goal:
    """ "8" is a number of blocks, "moe=2,attention=1" a number for each kind, "25%" a share of the blocks' parameters.

    Raises:
        ValueError: it is none of them, or a number is not positive.
    """
    try:
        if text.endswith("%") and 0 < float(text[:-1]) < 100:
            return float(text[:-1]) / 100
        pairs = [part.split("=") for part in text.split(",")] if "=" in text else [["", text]]
        counts = {kind.strip(): int(number) for kind, number in pairs}
    except ValueError:
        raise ValueError(
            f"--remove takes a number (8), a number for each kind (moe=2) or a share of parameters (25%), not {text!r}"
        ) from None
    if min(counts.values()) < 1:
        raise ValueError(f"--remove must be at least 1, not {text}")
    return counts.get("", counts)


def parse_indices(text: str) -> tuple[int, ...]:
    """ "3-6,9,15" as block indices, the inverse of `tables.ranges`.

    Raises:
        ValueError: it is not whole numbers and ascending ranges separated by commas.
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        bounds = [first, last] if dash else [first, first]
        if not all(bound.isdecimal() for bound in bounds) or int(bounds[0]) > int(bounds[1]):
            raise ValueError(f"blocks are numbers and ranges separated by commas (3-6,9,15), not {text!r}")
        indices += range(int(bounds[0]), int(bounds[1]) + 1)
    return tuple(indices)


def parse_names(text: str) -> tuple[str, ...]:
    """ "mmlu,gsm8k" as names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_rollouts(text: str) -> tuple[tuple[str, int], ...]:
    """ "aime25=10,gpqa_diamond_cot_zeroshot=5" as pairs of a task and a number.

    Raises:
        ValueError: it is something else.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return tuple((name.strip(), int(number)) for name, number in pairs)
    except ValueError:
        raise ValueError(f"a number of answers for each task is wanted (aime25=10), not {text!r}") from None


def parse_batch_size(text: str) -> int | str:
    """ "auto" or a number.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto" or (text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise ValueError(f"auto or a positive number is wanted, not {text!r}")


def setting(help: str, value: Any = MISSING, parse: Callable[[str], Any] | None = None) -> Any:
    """A field with the help text of its command-line option; `parse` reads the option where it is not a plain value."""
    return field(default=value, metadata={"help": help, "parse": parse})


class Settings:
    """What the dataclasses of settings share: YAML in and out, and lower limits of their numbers."""

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(asdict(self), sort_keys=False))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The settings in a YAML file, which may leave some out.

        Raises:
            ValueError: the file is missing, not YAML, or names unknown settings.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read the settings {path}: {error}") from error
        return cls.known(values, str(path))

    @classmethod
    def known(cls, values: Any, where: str) -> dict[str, Any]:
        """`values`, if it is a mapping that names settings only.

        Raises:
            ValueError: it is not.
        """
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(names)) if isinstance(values, dict) else ["(no mapping)"]
        if unknown:
            raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}; known are {', '.join(names)}")
        settings: dict[str, Any] = values
        return settings

    def _check_least(self, least: dict[str, float]) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {value}, not {getattr(self, name)}")


@dataclass(frozen=True)
class DistillConfig(Settings):
    """How a shortened model is trained with the original as its teacher; the defaults are the paper's (Table 10).

    The loss is KL(teacher || student) + cross_entropy * that of the next token + hidden_states * the relative squared
    distance of the hidden states after each kept block.
    """

    teacher: str | None = setting("The original model: hub id or local folder.", None)
    data: str | None = setting("Text to train on: hub id or local file, texts or conversations.", None)
    split: str = setting("Split of a hub dataset.", "train")
    max_length: int = setting("Tokens of a training sample; the texts are packed to this length.", 1024)
    validation_split: float = setting("Share of the samples that is only measured.", 0.01)
    num_epochs: float = setting("Passes over the data.", 1.0)
    max_steps: int = setting("Optimiser steps at most.", 10_000)
    batch_size: int = setting("Samples in one pass, on each device.", 16)
    gradient_accumulation: int = setting("Passes before each optimiser step.", 1)
    learning_rate: float = setting("Highest learning rate; it falls along a cosine.", 2e-5)
    warmup_steps: int = setting("Steps in which the learning rate rises; a tenth of all steps at most.", 100)
    weight_decay: float = setting("Weight decay of AdamW.", 1e-4)
    max_grad_norm: float = setting("Gradients longer than this are cut.", 1.0)
    seed: int = setting("Decides the order of the data.", 42)
    temperature: float = setting("Both distributions are softened by it.", 1.0)
    cross_entropy: float = setting("Weight of the cross-entropy with the next token.", 0.0)
    hidden_states: float = setting("Weight of the distance between hidden states after kept blocks.", 0.0)
    top_k: int | None = setting(
        "Compare only the teacher's most probable tokens, the rest as one (default: all).", None
    )
    chunk_tokens: int = setting("Tokens whose logits are held at a time.", 1024)
    dtype: str = setting("The student's: auto is bfloat16 on a GPU; float32 costs twice the memory there.", "auto")
    teacher_quantization: str = setting("auto, nf4 (4 bits, needs bitsandbytes) or none.", "auto")
    lora_rank: int | None = setting("Train low-rank adapters, merged at the end, not all weights (needs peft).", None)
    gradient_checkpointing: bool = setting("Less memory, a third more time.", False)
    log_steps: int = setting("Steps between two reports.", 10)
    eval_steps: int = setting("Steps between two validations.", 1000)
    save_steps: int = setting("Steps between two checkpoints, from which a run that was cut off continues.", 500)
    report_to: tuple[str, ...] = setting("Log to tensorboard, wandb, ...: names with commas.", (), parse_names)
    trust_remote_code: bool = setting("Run code that comes with the model.", False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", tuple(self.report_to))
        whole = ("max_steps", "batch_size", "gradient_accumulation", "chunk_tokens", "log_steps", "eval_steps")
        self._check_least({**dict.fromkeys(whole, 1), "save_steps": 1, "max_length": 2, "warmup_steps": 0})
        self._check_least(dict.fromkeys(("weight_decay", "max_grad_norm", "cross_entropy", "hidden_states"), 0))
        self._check_least({name: 1 for name in ("top_k", "lora_rank") if getattr(self, name) is not None})
        for name in ("num_epochs", "learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if not 0 < self.validation_split < 1:
            raise ValueError(f"--validation-split must be between 0 and 1, not {self.validation_split}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"--dtype must be one of auto, float32, bfloat16 for training, not {self.dtype!r}")
        if self.teacher_quantization not in QUANTIZATIONS:
            raise ValueError(
                f"--teacher-quantization must be one of {', '.join(QUANTIZATIONS)}, not {self.teacher_quantization!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The benchmark tasks to score models on, by the names of the lm-evaluation-harness."""

    tasks: tuple[str, ...] = setting("Tasks or groups of the lm-evaluation-harness: mmlu,gsm8k.", (), parse_names)
    include_path: str | None = setting("Folder with task files of your own; they win over the harness's.", None)
    limit: float | None = setting("Questions of each (sub)task at most, or a share below 1. For trials only.", None)
    num_fewshot: int | None = setting("Examples shown before each question (default: as the task says).", None)
    apply_chat_template: bool = setting("Ask in the chat format of the model.", False)
    max_gen_tokens: int | None = setting("Tokens of a task's answer at most (default: as the task says).", None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"--limit must be positive, not {self.limit}")
        if self.limit is not None and self.limit >= 1:
            object.__setattr__(self, "limit", int(self.limit))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot must not be negative, not {self.num_fewshot}")
        if self.max_gen_tokens is not None and self.max_gen_tokens < 1:
            raise ValueError(f"--max-gen-tokens must be at least 1, not {self.max_gen_tokens}")


@dataclass(frozen=True)
class CompressConfig(TaskSettings, Settings):
    """Everything that decides the outcome of `blockspin compress`; stored as run.yaml in the run folder.

    remove: number of blocks, kind -> number, or a share of the blocks' parameters between 0 and 1.
    The samples for the gradients, the selection and the evaluation come after each other and are distinct.
    distill: train the result with the original as its teacher; by default on what is left of the calibration set.
    """

    model: str = setting("Hub id or local folder of a causal language model.")
    calibration: str = setting("Text the gradients are computed on: hub id or local file.")
    remove: Goal = setting(
        "What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters.", parse=parse_remove
    )
    evaluation: str | None = setting("Text for the report (default: held-out calibration samples).", None)
    protect: tuple[int, ...] = setting("Blocks that must stay: 0-3,31.", (), parse_indices)
    energy: str = setting("What predicts the loss: secant, pairwise, gauss-newton, fisher, empirical-fisher.", "secant")
    num_samples: int = setting("Calibration samples for the gradients (fisher, empirical-fisher).", 2048)
    energy_samples: int = setting("Calibration samples for the other energies, which measure shortened models.", 64)
    selection_samples: int = setting("Samples the choice is made on.", 64)
    evaluation_samples: int = setting("Samples of the report.", 128)
    max_length: int = setting("Tokens of a sample at most.", 1024)
    seed: int = setting("Decides the order of the data and the solver's start values.", 42)
    split: str = setting("Split of a hub dataset.", "train")
    batch_size: int = setting("Samples in one pass.", 8)
    gradient_checkpointing: bool = setting("Less memory for the gradients, a third more time.", False)
    beta: float = setting("Weight of the first-order term.", 0.0)
    solver: str = setting("auto certifies its answer.", "auto")
    states: int = setting("How many lowest-energy removals to find.", 100)
    objective: Literal["kl", "loss"] = setting(
        "What the choice minimises: kl (to the whole model) or loss (cross-entropy).", "kl"
    )
    budget: float = setting("Forward passes over the selection samples that the choice may take.", 64.0)
    max_candidates: int = setting("Distinct low-energy states that enter the race.", 20)
    time_limit: float | None = setting("Seconds the solver may take.", None)
    dtype: str = setting("auto, float32, bfloat16 or float16.", "auto")
    device_map: str | None = setting("auto spreads the model over several GPUs.", None)
    trust_remote_code: bool = setting("Run code that comes with the model.", False)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "protect", tuple(self.protect))
        if isinstance(self.distill, dict):  # as YAML has it
            object.__setattr__(self, "distill", DistillConfig(**DistillConfig.known(self.distill, "distill")))
        sizes = ("num_samples", "energy_samples", "selection_samples", "evaluation_samples", "batch_size")
        self._check_least({**dict.fromkeys((*sizes, "states", "max_candidates"), 1), "max_length": 2})
        if self.energy not in ENERGY_NAMES:
            raise ValueError(f"--energy must be one of {', '.join(ENERGY_NAMES)}, not {self.energy!r}")
        if self.objective not in ("kl", "loss"):
            raise ValueError(f"--objective must be kl or loss, not {self.objective!r}")
        if self.budget < 0:
            raise ValueError(f"--budget must not be negative, not {self.budget}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def calibration_samples(self) -> int:
        """How many samples the energy is computed from."""
        return self.num_samples if self.energy in GRADIENT_ENERGIES else self.energy_samples


# The benchmarks of the paper (arXiv 2602.00161, Tables 1 and 2).
PAPER_TASKS = ("mmlu", "hellaswag", "winogrande", "arc_challenge", "leaderboard_bbh", "gsm8k")
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TaskSettings):
    """How `blockspin evaluate` scores models on tasks; without tasks and rollouts, on those of the paper.

    rollouts: (task, number of sampled answers for each question); such a task's score is the mean over rollouts.
    cache: folder of the results computed so far, or None.
    """

    rollouts: tuple[tuple[str, int], ...] = setting(
        "Sampled answers for each question of a task: aime25=10,gpqa_diamond_cot_zeroshot=5.", (), parse_rollouts
    )
    temperature: float = setting("Of the sampling of rollouts.", 0.6)
    top_p: float = setting("Of the sampling of rollouts.", 0.95)
    seed: int = setting("Of the sampling.", 42)
    batch_size: int | str = setting("A number, or auto: what fits into the GPU.", "auto", parse_batch_size)
    backend: str = setting("What runs the model: hf or vllm.", "hf")
    cache: str | None = setting(
        "Folder of the results computed so far, which are not computed again; none keeps nothing.",
        str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "blockspin" / "scores"),
        lambda text: None if text == "none" else text,
    )
    dtype: str = setting("auto, float32, bfloat16 or float16.", "auto")
    device_map: str | None = setting("auto spreads the model over several GPUs.", None)
    trust_remote_code: bool = setting("Run code that comes with the model.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rollouts", tuple(dict(self.rollouts).items()))
        sampled = tuple(name for name, _ in self.rollouts)
        asked = self.tasks or (() if sampled else PAPER_TASKS)
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(asked + sampled)))
        if self.backend not in BACKENDS:
            raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if any(number < 1 for _, number in self.rollouts):
            raise ValueError(f"--rollouts must be at least 1, not {dict(self.rollouts)}")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"--temperature {self.temperature} must be positive and --top-p {self.top_p} in (0, 1]")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
