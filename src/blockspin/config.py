"""The settings of a run. The only defaults of the package's commands are here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from .files import replacing

Removal = int | dict[str, int] | float
GRADIENT_ENERGIES = ("fisher", "empirical-fisher")  # computed from gradients; the others from shortened models
ENERGY_NAMES = ("secant", "pairwise", "gauss-newton", *GRADIENT_ENERGIES)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_remove(text: str) -> Removal:
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
    """ "20,23" as block indices.

    Raises:
        ValueError: it is not whole numbers separated by commas.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"block numbers are separated by commas (20,23), not {text!r}") from None


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
class CompressConfig(TaskSettings):
    """Everything that decides the outcome of `blockspin compress`; stored as run.yaml in the run folder.

    remove: number of blocks, kind -> number, or a share of the blocks' parameters between 0 and 1.
    The samples for the gradients, the selection and the evaluation come after each other and are distinct.
    """

    model: str = setting("Hub id or local folder of a causal language model.")
    calibration: str = setting("Text the gradients are computed on: hub id or local file.")
    remove: Removal = setting(
        "What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters.", parse=parse_remove
    )
    evaluation: str | None = setting("Text for the report (default: held-out calibration samples).", None)
    protect: tuple[int, ...] = setting("Blocks that must stay: 0,1,31.", (), parse_indices)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "protect", tuple(self.protect))
        sizes = ("num_samples", "energy_samples", "selection_samples", "evaluation_samples", "batch_size")
        for name, value in {**dict.fromkeys((*sizes, "states", "max_candidates"), 1), "max_length": 2}.items():
            if getattr(self, name) < value:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {value}, not {getattr(self, name)}")
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

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump({**asdict(self), "protect": list(self.protect)}, sort_keys=False))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The settings in a YAML file, which may leave some out.

        Raises:
            ValueError: the file is missing, not YAML, or names unknown settings.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read the settings {path}: {error}") from error
        known = [f.name for f in fields(CompressConfig)]
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else ["(no mapping)"]
        if unknown:
            raise ValueError(f"{path} has unknown settings: {', '.join(unknown)}; known are {', '.join(known)}")
        settings: dict[str, Any] = values
        return settings


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
