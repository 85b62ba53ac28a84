"""What a run would do and need, before it is started: stages, passes, time from a short trial, memory, disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from ..evaluation.tasks import count_questions
from ..model.batches import BatchSize, frozen, make_batches
from ..model.blocks import count_parameters
from ..model.loading import check_quantization, load_as, load_config, load_tokenizer
from ..model.losses import sample_losses
from ..model.offload import check_in_memory
from ..model.passes import num_passes
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Budget, Removal, RemovalProblem, check_goal
from ..repairs.own_text import own_share
from ..selection.select import ACTIVATION_SAMPLES
from ..settings import say
from ..solvers.candidates import random_candidate
from ..surgery.checkpoint import checkpoint_bytes, small_files_bytes
from ..tables import Column, Table, short
from ..training import DistillConfig
from .footprint import FLOAT, bytes_of_matrices, memory_of_run
from .preflight import check_before, check_repair_text, check_run
from .stages import Samples, find_states, load_samples, pose_problem
from .sweeps import count_sweeps, timed_block

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

# What the stages make in the folder of the run, by how they are called.
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
class Step:
    """A stage of the run.

    passes: of the whole model over `samples` samples, `tokens` in all.
    seconds: None where it does not run the model, or is not known.
    done: what it makes is there already, so that it takes nothing.
    """

    stage: str
    samples: int
    passes: float | None
    tokens: float
    seconds: float | None
    done: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    steps: its stages in order. tokens_per_second: forward passes of the whole model, measured.
    memory_bytes: what `memory_of_run` counts. disk_bytes: files of the run when they are most.
    budgets: what the targets ask for.
    sweeps: how often all blocks are read, where they are read one by one; reading_seconds: what it takes once.
    """

    steps: tuple[Step, ...]
    tokens_per_second: float
    memory_bytes: int
    disk_bytes: int
    sweeps: float = 0.0
    reading_seconds: float = 0.0
    budgets: tuple[Budget, ...] = ()

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["budgets"]
        return values | {"goals": list(map(asdict, what_is_left(self.budgets, ())))}

    def table(self) -> Table:
        """A row for each stage."""
        rows = []
        for step in self.steps:
            passes = "" if step.passes is None else f"{step.passes:.3g}"
            samples = f"{step.samples:,}" if step.samples else ""
            tokens = short(step.tokens) if step.tokens else ""
            taken = "" if step.seconds is None else duration(step.seconds)
            rows.append([step.stage, samples, passes, tokens, "done" if step.done else taken])
        columns = [Column("stage", words=True), Column("samples"), Column("passes"), Column("tokens"), Column("time")]
        return Table(columns, rows)

    def summary(self) -> str:
        """What it takes in all, and that this was only asked."""
        return f"{self.estimate()} Nothing was written."

    def estimate(self) -> str:
        """What it takes in all, in a few sentences."""
        seconds = sum(step.seconds or 0 for step in self.steps)
        reading = ""
        if self.sweeps:
            reading = f" The blocks are read about {self.sweeps:.0f} times, for {duration(self.reading_seconds)} each."
        uncounted = ", benchmark tasks not counted" if any(step.stage == TASKS for step in self.steps) else ""
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
    reading, often = 0.0, dict[str, float]()
    if traced.is_offloaded:
        speed, reading = timed_block(traced, samples.calibration, config.batch_size)
        often = count_sweeps(config, traced, samples)
    else:
        speed = timed_passes(traced, samples.calibration, config.batch_size)

    budgets = _budgets(config, traced)
    gone = _parameters_gone(config, traced.units, budgets)
    left = 1 - gone / count_parameters(traced.model)
    steps = [_with_reading(step, often, reading) for step in _steps(config, traced, samples, left, speed, budgets)]
    if config.tasks:
        models = 1 + COMPARED + config.repair + (config.distill is not None)
        questions = count_questions(config, tokenizer)
        steps.append(Step(TASKS, models * questions, None, 0, None))
    if out is not None:
        steps = [_marked(step, out) for step in steps]

    disk = _disk(config, traced, samples, left)
    memory = memory_of_run(config, traced, samples, left)
    return Plan(tuple(steps), speed, memory, disk, sum(often.values()), reading, tuple(budgets))


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


def _steps(
    config: CompressConfig,
    traced: TracedModel,
    samples: Samples,
    left: float,
    speed: float,
    budgets: Sequence[Budget],
) -> list[Step]:
    """The stages of `compress` in order."""

    def running(stage: str, over: Sequence[Tensor], passes: float) -> Step:
        tokens = passes * sum(map(len, over))
        return Step(stage, len(over), passes, tokens, tokens / speed)

    # The whole model and shortened ones: losses, and a batch again and again for the speed.
    models = 1 + (COMPARED + config.repair) * left
    in_a_batch = len(make_batches(samples.evaluation, config.batch_size)[0].indices)
    timed = min(1.0, TIMING_ROUNDS * in_a_batch / len(samples.evaluation))
    steps = [
        running(
            f"energies ({config.energy})",
            samples.calibration,
            _energy_passes(config.energy, traced, len(samples.calibration)),
        ),
        _solving(config, traced.units, budgets),
        running("cheap baselines", samples.calibration[:ACTIVATION_SAMPLES], 1),
        running("selection (at most)", samples.selection, config.budget),
        Step("checkpoint", 0, None, 0, None),
        running("evaluation", samples.evaluation, models * (1 + timed)),
    ]
    if config.repair:
        share = own_share(traced.model, config.own_text)
        passes = 1 + REPAIRING * left + WRITING * share
        steps.append(running("repair", [*samples.calibration, *samples.selection], passes / (1 - share)))
    if config.distill is not None:
        tokens = float(TRAINING * _tokens_of(config.distill))
        steps.append(Step("distillation (at most)", 0, None, tokens, tokens / speed))
    return steps


def _solving(config: CompressConfig, blocks: Sequence[Block], budgets: Sequence[Budget] = ()) -> Step:
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
        return Step("spectrum (made-up energies)", 0, None, 0, seconds)
    return Step("spectrum (at least)", 0, None, 0, config.time_limit or seconds)


def _marked(step: Step, out: Path) -> Step:
    """The step, done if what it makes is in the folder of the run."""
    made = next(file for stage, file in MADE.items() if step.stage.startswith(stage))
    return Step(step.stage, 0, None, 0, None, done=True) if (out / made).exists() else step


def _with_reading(step: Step, sweeps: Mapping[str, float], reading: float) -> Step:
    """The stage with the time that it reads blocks. sweeps: how often all are read, by what its name begins with."""
    often = next((number for stage, number in sweeps.items() if step.stage.startswith(stage)), 0.0)
    return replace(step, seconds=(step.seconds or 0.0) + often * reading) if often else step


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
