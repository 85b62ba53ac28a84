"""The settings of a run. The only defaults of the package's commands are here."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .problem import Goal, Units
from .settings import SPLIT, SettingError, Settings, parse_names, setting, unused_split, without_effect
from .targets import NO_GOAL, TargetSettings
from .training import MAX_SEED, DistillConfig

GRADIENT_ENERGIES = ("fisher", "empirical-fisher")  # computed from gradients; the others from shortened models
ENERGY_NAMES = ("fitted", "secant", "pairwise", "gauss-newton", *GRADIENT_ENERGIES)
STREAM = "stream"  # a place for a model beside those of transformers: its blocks stay on disk
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "int8")
BACKENDS = ("hf", "vllm")
GRADIENT_SAMPLES, REMOVAL_SAMPLES = 2048, 64  # for energies of gradients (the paper's number), and for the others
# The benchmarks of the paper (arXiv 2602.00161, Tables 1 and 2).
PAPER_TASKS = ("mmlu", "hellaswag", "winogrande", "arc_challenge", "leaderboard_bbh", "gsm8k")


def parse_remove(text: str) -> Goal:
    """ "8" is a number of blocks, "moe=2,attention=1" a number for each kind, "25%" a share of the blocks' parameters.

    Raises:
        ValueError: it is none of them, or a number is not positive.
    """
    try:
        if text.endswith("%"):
            goal: Goal = float(text[:-1]) / 100
        elif "=" in text:
            goal = parse_numbers(text)
        else:
            goal = int(text)
    except ValueError:
        raise ValueError(
            f"--remove takes a number (8), a number for each kind (moe=2) or a share of parameters (25%), not {text!r}"
        ) from None

    _check_goal(goal)
    return goal


def parse_numbers(text: str) -> dict[str, int]:
    """ "moe=2,attention=1" as numbers by name. Raises ValueError where it is something else."""
    numbers = {}
    for part in text.split(","):
        name, number = part.split("=")
        numbers[name.strip()] = int(number)
    return numbers


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


def parse_rollouts(text: str) -> tuple[tuple[str, int], ...]:
    """ "aime25=10,gpqa_diamond_cot_zeroshot=5" as pairs of a task and a number.

    Raises:
        ValueError: it is something else.
    """
    try:
        return tuple(parse_numbers(text).items())
    except ValueError:
        raise ValueError(f"a number of answers for each task is wanted (aime25=10), not {text!r}") from None


def parse_batch_size(text: str) -> int | str:
    """ "auto" or a number.

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(f"auto or a positive number is wanted, not {text!r}")


def parse_folder(text: str) -> str | None:
    """A folder; "none" is no folder."""
    return None if text == "none" else text


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings):
    """What makes a run repeatable."""

    panel: ClassVar[str] = "Data"

    seed: int = setting("Decides the order of the data and the solver's start values.", 42, least=0, most=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """How many samples run side by side."""

    panel: ClassVar[str] = "Model"

    batch_size: int | Literal["auto"] = setting(
        "Samples of the longest length in one pass, more of shorter ones; auto: what keeps the device busy. Where "
        "memory does not suffice, fewer are taken.",
        "auto",
        parse=parse_batch_size,
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings(SeedSettings):
    """How samples are drawn from a text."""

    panel: ClassVar[str] = "Data"

    max_length: int = setting("Tokens of a sample at most.", 1024, least=2)
    split: str = setting("Split of a hub dataset.", SPLIT)


@dataclass(frozen=True, kw_only=True)
class LoadingSettings(Settings):
    """How a model is opened."""

    panel: ClassVar[str] = "Model"

    dtype: str = setting("auto, float32, bfloat16 or float16.", "auto", choices=DTYPES)
    device_map: str | None = setting(
        "auto spreads the model over several GPUs; cpu loads it into the memory, even where --stream would be chosen.",
        None,
    )
    stream: bool = setting(
        "Read blocks from disk when they are needed; done by itself where a model does not fit.", False
    )
    quantization: str | None = setting(
        "nf4 loads the model in 4 bits, int8 in 8 (bitsandbytes): less memory, for energies, choice and evaluation.",
        None,
        choices=QUANTIZATIONS,
    )
    trust_remote_code: bool = setting("Run code that comes with the model.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.quantization is not None:
            raise SettingError("stream", "reads blocks as they are on disk; leave it out, or --quantization")
        if self.stream and self.device_map is not None:
            raise SettingError("stream", "chooses the place of the model itself; leave out --device-map")

    @property
    def place(self) -> str | None:
        """Where the model goes, as `load_model` takes it for `device_map`."""
        return STREAM if self.stream else self.device_map


@dataclass(frozen=True, kw_only=True)
class EnergySettings(BatchSettings):
    """What predicts the loss of the model without some blocks."""

    panel: ClassVar[str] = "Energy"

    energy: str = setting(f"What predicts the loss: {', '.join(ENERGY_NAMES)}.", "fitted", choices=ENERGY_NAMES)
    energy_samples: int | None = setting(
        f"Calibration samples for the energy (default: {GRADIENT_SAMPLES} for gradients: fisher, empirical-fisher; "
        f"{REMOVAL_SAMPLES} for the others, which measure shortened models).",
        None,
        least=1,
        old_name="num_samples",
    )
    units: Units = setting("What can be removed: blocks, or sublayers (their attention and MLP apart).", "blocks")
    gradient_checkpointing: bool = setting("Less memory for the gradients, a third more time.", False)

    @property
    def keeps_activations(self) -> bool:
        """Whether every block keeps what it makes, for a backward pass."""
        return self.energy in GRADIENT_ENERGIES and not self.gradient_checkpointing

    def samples_for(self, energy: str) -> int:
        """How many calibration samples an energy is computed from."""
        if self.energy_samples is not None:
            return self.energy_samples
        return GRADIENT_SAMPLES if energy in GRADIENT_ENERGIES else REMOVAL_SAMPLES

    def unused(self, given: Collection[str] = (), missing: Collection[str] = ()) -> list[str]:
        """As of all settings."""
        notes = super().unused(given, missing)
        if self.energy not in GRADIENT_ENERGIES:
            in_backward_pass = {"--gradient-checkpointing": self.gradient_checkpointing}
            notes += without_effect(f"with --energy {self.energy}", in_backward_pass)
        return notes

    @classmethod
    def known(cls, values: Any, where: str) -> dict[str, Any]:
        """As of all settings. Older files have `num_samples` for gradients, beside `energy_samples` for the others."""
        if isinstance(values, dict) and "num_samples" in values:
            values = dict(values)
            number = values.pop("num_samples")
            if values.get("energy", cls.energy) in GRADIENT_ENERGIES or "energy_samples" not in values:
                values["energy_samples"] = number
        return super().known(values, where)


@dataclass(frozen=True, kw_only=True)
class SolvingSettings(SeedSettings):
    """The removal problem, and how its lowest states are found."""

    panel: ClassVar[str] = "Solver"

    protect: tuple[int, ...] = setting("Blocks (or sub-layers) that must stay: 0-3,31.", (), parse=parse_indices)
    beta: float = setting("Weight of the first-order term, of energies from gradients.", 0.0)
    solver: str = setting("auto certifies its answer; else exact, enumerate, tabu, anneal or gurobi.", "auto")
    states: int = setting("How many lowest-energy removals to find.", 100, least=1)
    time_limit: float | None = setting("Seconds the solver may take.", None, above=0)


@dataclass(frozen=True, kw_only=True)
class ChoosingSettings(SeedSettings, BatchSettings):
    """How a removal is chosen by measuring."""

    panel: ClassVar[str] = "Choice"

    selection_samples: int = setting("Samples the choice is made on.", 64, least=1)
    objective: Literal["kl", "loss"] = setting(
        "What the choice minimises: kl (to the whole model) or loss (cross-entropy).", "kl"
    )
    budget: float = setting("Forward passes over the selection samples that the choice may take.", 64.0, least=0)
    max_candidates: int = setting("Distinct low-energy states that enter the race.", 20, least=1)
    choose_repaired: bool = setting("Compare the last candidates as a repair leaves them.", True)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """The benchmark tasks to score models on, by the names of the lm-evaluation-harness."""

    panel: ClassVar[str] = "Tasks"

    tasks: tuple[str, ...] = setting("Tasks or groups of the lm-evaluation-harness: mmlu,gsm8k.", (), parse=parse_names)
    include_path: str | None = setting(
        "Folder with task files of your own; they win over the harness's.", None, needs=("tasks",)
    )
    limit: float | None = setting(
        "Questions of each (sub)task at most, or a share below 1. For trials only.", None, above=0, needs=("tasks",)
    )
    num_fewshot: int | None = setting(
        "Examples shown before each question (default: as the task says).", None, least=0, needs=("tasks",)
    )
    apply_chat_template: bool = setting("Ask in the chat format of the model.", False, needs=("tasks",))
    max_gen_tokens: int | None = setting(
        "Tokens of a task's answer at most (default: as the task says).", None, least=1, needs=("tasks",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit >= 1:
            object.__setattr__(self, "limit", int(self.limit))


@dataclass(frozen=True)
class CompressConfig(
    TaskSettings, ChoosingSettings, SolvingSettings, TargetSettings, EnergySettings, LoadingSettings, DataSettings
):
    """Everything that decides the outcome of `blockspin compress`; stored as run.yaml in the run folder.

    remove: number of blocks, kind -> number, or a share of the blocks' parameters between 0 and 1; None where targets
        decide alone.
    The samples for the energy, the selection and the evaluation come after each other and are distinct.
    repair: what the samples for the energy and the selection say on how the smaller model should follow the original,
        and text of its own besides (`own_text`).
    distill: train the result with the original as its teacher; by default on what is left of the calibration set.
    """

    panel: ClassVar[str] = "Run"

    model: str = setting("Hub id, local folder or GGUF file of a causal language model.")
    calibration: str = setting(
        "Text the energy is computed on: hub id, or local file of texts or conversations; a,b mixes two."
    )
    remove: Goal | None = setting(
        "What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters; targets may decide instead.",
        None,
        parse=parse_remove,
    )
    evaluation: str | None = setting("Text for the report (default: held-out calibration samples).", None)
    evaluation_samples: int = setting("Samples of the report.", 128, least=1)
    repair: bool = setting("Give linear maps of the kept blocks new weights, in closed form.", True)
    own_text: float | None = setting(
        "Share of the text for the repair that the original writes itself (default: a third, where it can).",
        None,
        least=0,
        most=0.9,
        needs=("repair",),
    )
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove is not None:
            _check_goal(self.remove)
        elif not self.has_targets:
            raise ValueError(NO_GOAL)
        if self.distill is None or isinstance(self.distill, DistillConfig):
            return

        # YAML has a mapping.
        try:
            training = DistillConfig(**DistillConfig.known(self.distill, "distill"))
        except SettingError as error:
            raise SettingError(f"distill_{error.setting}", error.problem) from None
        object.__setattr__(self, "distill", training)

    def unused(self, given: Collection[str] = (), missing: Collection[str] = ()) -> list[str]:
        """As of all settings."""
        of_training = None if self.distill is None else self.distill.data
        notes = super().unused(given, missing)
        return notes + unused_split(self.split, self.calibration, self.evaluation, of_training)

    @property
    def calibration_samples(self) -> int:
        """How many samples the energy is computed from."""
        return self.samples_for(self.energy)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TaskSettings, LoadingSettings):
    """How `blockspin evaluate` scores models on tasks; without tasks and rollouts, on those of the paper.

    rollouts: (task, number of sampled answers for each question); such a task's score is the mean over rollouts.
    cache: folder of the results computed so far, or None.
    """

    panel: ClassVar[str] = "Tasks"

    rollouts: tuple[tuple[str, int], ...] = setting(
        "Sampled answers for each question of a task: aime25=10,gpqa_diamond_cot_zeroshot=5.", (), parse=parse_rollouts
    )
    temperature: float = setting("Rollouts are sampled at this temperature.", 0.6, above=0, needs=("rollouts",))
    top_p: float = setting(
        "Rollouts are sampled from so much of the probability.", 0.95, above=0, most=1, needs=("rollouts",)
    )
    seed: int = setting("Decides the sampled answers and the order of --data.", 42, least=0, most=MAX_SEED)
    batch_size: int | Literal["auto"] = setting(
        "Questions or prompts in one pass; auto: what fits into the GPU, and 1 for --cost.",
        "auto",
        parse=parse_batch_size,
        least=1,
    )
    backend: str = setting("What runs the model: hf or vllm.", "hf", choices=BACKENDS, needs=("tasks",))
    cache: str | None = setting(
        "Folder of the results computed so far, which are not computed again; none keeps nothing.",
        str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "blockspin" / "scores"),
        parse=parse_folder,
        needs=("tasks",),
    )

    def __post_init__(self) -> None:
        if isinstance(self.rollouts, dict):  # as Python code has it
            object.__setattr__(self, "rollouts", tuple(self.rollouts.items()))
        super().__post_init__()

        if self.backend != "hf" and self.quantization is not None:
            raise SettingError("quantization", f"is not for --backend {self.backend}; leave one of them out")

        sampled = dict(self.rollouts)
        if min(sampled.values(), default=1) < 1:
            raise SettingError("rollouts", f"must be at least 1, not {sampled}")

        # Every task once; those that are sampled are asked for too.
        asked = self.tasks or (() if sampled else PAPER_TASKS)
        object.__setattr__(self, "rollouts", tuple(sampled.items()))
        object.__setattr__(self, "tasks", tuple(dict.fromkeys([*asked, *sampled])))


def _check_goal(remove: Goal) -> None:
    """Refuse what no model could meet. Raises SettingError."""
    counts = list(remove.values()) if isinstance(remove, dict) else [remove]
    if not counts:
        raise SettingError("remove", "names no kind of blocks; give for example moe=2")
    if isinstance(remove, float) and not 0 < remove < 1:
        raise SettingError("remove", f"must be a share between 0% and 100%, not {remove:.0%}")
    if not isinstance(remove, float) and min(counts) < 1:
        raise SettingError("remove", f"must be at least 1, not {remove}")
