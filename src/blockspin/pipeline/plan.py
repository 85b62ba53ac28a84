"""What a run would do and need, before it is started: stages, passes, time from a short trial, memory, disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import GRADIENT_ENERGIES, CompressConfig
from ..costs.targets import goals_of, read_times, what_is_left
from ..costs.timing import measure_times
from ..distillation.preflight import memory_estimate
from ..energies.fitted import PASSES_PER_BLOCK
from ..energies.gradients import Gradients
from ..evaluation.questions import time_questions
from ..model.batches import BatchSize, frozen, make_batches
from ..model.blocks import count_parameters
from ..model.largest_batch import tokens_that_fit
from ..model.loading import check_quantization, load_as, load_config, load_tokenizer
from ..model.losses import sample_losses
from ..model.offload import check_in_memory
from ..model.passes import num_passes
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Budget, Removal, RemovalProblem, check_goal
from ..repairs.own_share import own_share
from ..selection.select import ACTIVATION_SAMPLES
from ..settings import say
from ..solvers.candidates import random_candidate
from ..surgery.checkpoint import checkpoint_bytes, small_files_bytes
from ..tables import Column, Table, short
from ..training import DistillConfig
from .footprint import FLOAT, bytes_of_matrices, memory_of_run
from .preflight import check_before, check_repair_text, check_run
from .stages import Samples, find_states, load_samples, pose_problem
from .sweeps import Pace, count_sweeps, timed_block

TRIALS = 2  # batches that are timed, after one that warms up
TIMING_ROUNDS = 6  # in which the models of the report are timed, each on one batch
COMPARED = 3  # shortened models in the report: the lowest state, the chosen one, a random one
RECORDS = 250_000  # bytes of the page of a run, of what it is made of, and of what a Trainer notes
BACKWARD = 2  # what a forward pass with its backward pass through the activations costs, in forward passes
TRAINING = 4  # the same with one through the weights, and a pass of the teacher
WRITING = 2  # text that the model writes, in passes over it
REPAIRING = 5  # a repair of four kinds of maps a block, with the sums, in passes of the shortened model
RANDOM_REMOVALS = 20  # whose mean size stands for that of the choice
SOLVER_SECONDS = 10.0  # at most, to see how long the solver takes
TASKS = "questions of benchmark tasks"
UNTIMED = "not timed"

# What each stage makes in the folder of the run.
MADE = {
    "energies": "energies.safetensors",
    "spectrum": "spectrum.json",
    "cheap baselines": "candidates.json",
    "selection": "candidates.json",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation.json",
    "repair": "repaired",
    "distillation": "distilled",
    TASKS: "evaluation.json",
}


@dataclass(frozen=True)
class StagePlan:
    """What a stage of the run takes.

    stage: its name. note: what is said behind it, such as "at most".
    passes: of the whole model over `samples` samples, `tokens` in all.
    seconds: None where it does not run the model, or is not known.
    done: what it makes is there already, so that it takes nothing.
    """

    stage: str
    samples: int = 0
    passes: float | None = None
    tokens: float = 0
    seconds: float | None = None
    done: bool = False
    note: str = ""

    @property
    def title(self) -> str:
        """As it is shown."""
        return f"{self.stage} ({self.note})" if self.note else self.stage

    def as_json(self) -> dict[str, Any]:
        values = {**asdict(self), "stage": self.title}
        del values["note"]
        return values


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    stages: in order. tokens_per_second: forward passes of the whole model, measured.
    memory_bytes: what `memory_of_run` counts. disk_bytes: files of the run when they are most.
    budgets: what the targets ask for.
    sweeps: how often all blocks are read, where they are read one by one; reading_seconds: what it takes once.
    """

    stages: tuple[StagePlan, ...]
    tokens_per_second: float
    memory_bytes: int
    disk_bytes: int
    sweeps: float = 0.0
    reading_seconds: float = 0.0
    budgets: tuple[Budget, ...] = ()

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["stages"], values["budgets"]
        goals = list(map(asdict, what_is_left(self.budgets, ())))
        return {"steps": list(map(StagePlan.as_json, self.stages)), **values, "goals": goals}

    def table(self) -> Table:
        """A row for each stage."""
        rows = []
        for planned in self.stages:
            passes = "" if planned.passes is None else f"{planned.passes:.3g}"
            samples = f"{planned.samples:,}" if planned.samples else ""
            tokens = short(planned.tokens) if planned.tokens else ""
            taken = "" if planned.seconds is None else duration(planned.seconds)
            rows.append([planned.title, samples, passes, tokens, "done" if planned.done else taken])
        columns = [Column("stage", words=True), Column("samples"), Column("passes"), Column("tokens"), Column("time")]
        return Table(columns, rows)

    def summary(self) -> str:
        """What it takes in all, and that this was only asked."""
        return f"{self.estimate()} Nothing was written."

    def estimate(self) -> str:
        """What it takes in all, in a few sentences."""
        seconds = sum(planned.seconds or 0 for planned in self.stages)
        reading = ""
        if self.sweeps:
            reading = f" The blocks are read about {self.sweeps:.0f} times, for {duration(self.reading_seconds)} each."
        untimed = any(planned.stage == TASKS and planned.note == UNTIMED for planned in self.stages)
        uncounted = ", benchmark tasks not counted" if untimed else ""
        return (
            f"About {duration(seconds)} at {self.tokens_per_second:,.0f} tokens a second (measured here){uncounted}; "
            f"about {short(self.memory_bytes, 'B')} of memory and {short(self.disk_bytes, 'B')} of disk.{reading}"
        )


def duration(seconds: float) -> str:
    """42 s, 7 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def plan_run(config: CompressConfig, out: Path | None = None) -> Plan:
    """Plan a run of `compress` by drawing its samples, timing a few batches and a solver; nothing is written.

    out: the folder of the run, where stages may be done already.

    Raises:
        ValueError: what `compress` would refuse at its start.
    """
    say(config.unused())
    if out is not None:
        check_run(config, out)
    remote = config.trust_remote_code
    check_quantization(config.model, config)
    model_config = load_config(config.model, trust_remote_code=remote)
    check_before(config, model_config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=remote)
    samples = load_samples(config, tokenizer, model_config)
    model = load_as(config.model, config)
    check_repair_text(config, model, samples)
    return plan_with(config, trace_model(model, config.units), samples, tokenizer, out)


def plan_with(
    config: CompressConfig,
    traced: TracedModel,
    samples: Samples,
    tokenizer: PreTrainedTokenizerBase,
    out: Path | None = None,
) -> Plan:
    """As `plan_run`, with the model and the samples at hand."""
    pace = _measured_pace(config, traced, samples)
    budgets = _budgets(config, traced)
    gone = _parameters_gone(config, traced.units, budgets)
    left = 1 - gone / count_parameters(traced.model)

    stages = _stages(config, traced, samples, budgets, left, pace)
    if config.tasks:
        stages.append(_asking(config, traced, tokenizer, left))
    if out is not None:
        stages = [_marked(planned, out) for planned in stages]

    return Plan(
        stages=tuple(stages),
        tokens_per_second=pace.tokens_per_second,
        memory_bytes=memory_of_run(config, traced, samples, left),
        disk_bytes=_disk(config, traced, samples, left),
        sweeps=sum(pace.sweeps.values()),
        reading_seconds=pace.reading,
        budgets=tuple(budgets),
    )


def _measured_pace(config: CompressConfig, traced: TracedModel, samples: Samples) -> Pace:
    """From a few batches through the model, or through its first block where blocks are read one by one."""
    if not traced.is_offloaded:
        return Pace(timed_passes(traced, samples.calibration, config.batch_size))
    tokens_per_second, reading = timed_block(traced, samples.calibration, config.batch_size)
    return Pace(tokens_per_second, count_sweeps(config, traced, samples), reading)


def timed_passes(traced: TracedModel, samples: Sequence[Tensor], batch_size: BatchSize) -> float:
    """Tokens a second of forward passes with their losses, on the longest samples; padding is not counted."""
    seconds, tokens = 0.0, 0
    trial = make_batches(samples, batch_size)[: TRIALS + 1]
    with frozen(traced.model), torch.no_grad():
        for place, batch in enumerate(trial):
            started = time.perf_counter()
            sample_losses(traced.halves, traced.halves.hidden_of(batch), batch).tolist()  # waits for the device
            if place or len(trial) == 1:
                seconds += time.perf_counter() - started
                tokens += int(batch.lengths.sum())
    return tokens / seconds


def _stages(
    config: CompressConfig,
    traced: TracedModel,
    samples: Samples,
    budgets: Sequence[Budget],
    left: float,
    pace: Pace,
) -> list[StagePlan]:
    """The stages of `compress` in order. left: the share of the parameters that stays."""

    def running(stage: str, over: Sequence[Tensor], passes: float, note: str = "") -> StagePlan:
        tokens = passes * sum(map(len, over))
        return StagePlan(stage, len(over), passes, tokens, pace.seconds(stage, tokens), note=note)

    # The whole model and shortened ones: losses, and a batch again and again for the speed, the repaired one's aside.
    models = 1 + COMPARED * left
    in_a_batch = len(make_batches(samples.evaluation, config.batch_size)[0].indices)
    timed = min(1.0, TIMING_ROUNDS * in_a_batch / len(samples.evaluation))
    evaluation_passes = models * (1 + timed) + config.repair * left

    energy_passes = _energy_passes(config.energy, traced, len(samples.calibration))
    checkpointed = _checkpointed_share(config, traced, samples.calibration)
    note = f"{config.energy}, gradient checkpointing" if checkpointed else config.energy
    stages = [
        running("energies", samples.calibration, energy_passes + checkpointed, note=note),
        _solving(config, traced.units, budgets),
        running("cheap baselines", samples.calibration[:ACTIVATION_SAMPLES], 1),
        running("selection", samples.selection, config.budget, note="at most"),
        StagePlan("checkpoint"),
        running("evaluation", samples.evaluation, evaluation_passes),
    ]
    if config.repair:
        share = own_share(traced.model, config.own_text)
        passes = 1 + REPAIRING * left + WRITING * share
        stages.append(running("repair", [*samples.calibration, *samples.selection], passes / (1 - share)))
    if config.distill is not None:
        tokens = float(TRAINING * _tokens_of(config.distill))
        seconds = pace.seconds("distillation", tokens)
        stages.append(StagePlan("distillation", tokens=tokens, seconds=seconds, note="at most"))
    return stages


def _asking(config: CompressConfig, traced: TracedModel, tokenizer: PreTrainedTokenizerBase, left: float) -> StagePlan:
    """The questions of the tasks to all models of the report; shortened ones take `left` of the time, as in passes."""
    assert isinstance(traced.model, PreTrainedModel)
    asked = time_questions(config, traced.model, tokenizer)
    shortened = COMPARED + config.repair + (config.distill is not None)
    questions = (1 + shortened) * asked.number
    if asked.seconds is None:
        return StagePlan(TASKS, questions, note=UNTIMED)
    return StagePlan(TASKS, questions, seconds=(1 + shortened * left) * asked.seconds, note="estimated from a few")


def _solving(config: CompressConfig, blocks: Sequence[Block], budgets: Sequence[Budget] = ()) -> StagePlan:
    """The solver's stage, timed on energies made up: gradients with a share in common and blocks of unlike weight."""
    rng = np.random.default_rng(config.seed)
    samples = 4 * len(blocks)
    gradients = rng.normal(size=(samples, len(blocks))) + rng.normal(size=(samples, 1))
    gradients *= rng.lognormal(size=len(blocks))
    made_up = Gradients(gradients.astype(np.float32), tuple(blocks), np.zeros(samples, np.float32))

    limit = min(SOLVER_SECONDS, config.time_limit or SOLVER_SECONDS)
    problem = pose_problem(made_up, config.remove, config, budgets)
    seconds = find_states(problem, replace(config, time_limit=limit)).seconds
    if seconds < limit:
        return StagePlan("spectrum", seconds=seconds, note="made-up energies")
    return StagePlan("spectrum", seconds=config.time_limit or seconds, note="at least")


def _marked(planned: StagePlan, out: Path) -> StagePlan:
    """The stage, done if what it makes is in the folder of the run."""
    if not (out / MADE[planned.stage]).exists():
        return planned
    return StagePlan(planned.stage, done=True, note=planned.note)


def _energy_passes(energy: str, traced: TracedModel, num_samples: int) -> float:
    """Passes over each sample; of pairs, what the first quarter of the samples takes, at most.

    The passes of `fitted` do not depend on the samples, which share them; they are fewer where there are few removals.
    """
    if energy == "fitted":
        return PASSES_PER_BLOCK * (traced.num_units + 1) / num_samples
    singles: list[Removal] = [(), *((i,) for i in range(traced.num_units))]
    if energy in GRADIENT_ENERGIES:
        return BACKWARD
    if energy == "pairwise":
        pairs = [(i, j) for j in range(traced.num_units) for i in range(j)]
        return num_passes(traced, [*singles, *pairs])
    return num_passes(traced, singles) if energy == "secant" else 1 + 2 * traced.num_units


def _checkpointed_share(config: CompressConfig, traced: TracedModel, samples: Sequence[Tensor]) -> float:
    """The share of the tokens that gradient checkpointing runs once more, where gradients are taken."""
    if config.energy not in GRADIENT_ENERGIES:
        return 0.0
    fitting = tokens_that_fit(traced.model, backward=True)
    again = [len(sample) for sample in samples if config.gradient_checkpointing or len(sample) > fitting]
    return sum(again) / sum(map(len, samples))


def _budgets(config: CompressConfig, traced: TracedModel) -> list[Budget]:
    """What the targets ask for; times that no table has are measured. Raises ValueError as `compress` does."""
    times = None
    if config.needs_times and config.profile is None:
        model = traced.model
        check_in_memory(model, "timing a model")
        assert isinstance(model, PreTrainedModel)
        times = measure_times(model, config.units, rounds=TRIALS)
    elif config.needs_times:
        times = read_times(config)
    budgets = goals_of(config, config.model, traced.units, times, trust_remote_code=config.trust_remote_code)
    check_goal(traced.units, config.remove, config.protect, budgets)
    return budgets


def _parameters_gone(config: CompressConfig, blocks: Sequence[Block], budgets: Sequence[Budget]) -> float:
    """How many parameters a removal takes away, in the mean over random ones that meet the goals."""
    any_form = np.eye(len(blocks))
    problem = RemovalProblem.for_goal(any_form, config.remove, blocks=blocks, protect=config.protect, budgets=budgets)
    gone = 0
    for seed in range(RANDOM_REMOVALS):
        gone += sum(blocks[i].num_parameters for i in random_candidate(problem, seed).removed)
    return gone / RANDOM_REMOVALS


def _disk(config: CompressConfig, traced: TracedModel, samples: Samples, left: float) -> int:
    """Bytes of the files of the run while they are most, with what a repair and a training keep to continue.

    left: the share of the parameters that stays.
    """
    whole = checkpoint_bytes(config.model, trust_remote_code=config.trust_remote_code)
    smaller = left * whole + small_files_bytes(config.model)
    forms = FLOAT * traced.num_units**2 * len(samples.calibration)

    checkpoints, most = 1, smaller
    if config.repair:
        checkpoints += 1
        most = checkpoints * smaller + left * bytes_of_matrices(traced)
    if config.distill is not None:
        sizes = memory_estimate(int(left * count_parameters(traced.model)), 0, 0, config.distill, shards=1)
        state = sizes["student"] + sizes["optimiser"]  # a new one is written before the old one goes
        written = max(2 * state, smaller + state)
        most = max(most, checkpoints * smaller + written + FLOAT * _tokens_of(config.distill))
    return int(most + forms + RECORDS)


def _tokens_of(training: DistillConfig) -> int:
    """How many tokens a training sees at most."""
    return training.batch_size * training.gradient_accumulation * training.max_length * training.max_steps
