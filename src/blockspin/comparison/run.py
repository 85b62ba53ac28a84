"""Every method on the same model and samples, each result measured on held-out text; resumable.

Methods that compute statistics see the calibration samples; methods that measure shortened models, and the choice among
low-energy states, see the selection samples; what is reported is measured on the evaluation samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from .. import baselines
from ..config import CompressConfig
from ..costs.targets import goals_of
from ..energies import Energies
from ..errors import first_line
from ..evaluation.perplexity import tokens_per_second
from ..evaluation.tasks import Scorer, scorer
from ..journal import check_settings
from ..lock import locked
from ..machine import describe_machine
from ..memory import is_out_of_memory
from ..model.blocks import count_parameters
from ..model.largest_batch import lowered_size
from ..model.loading import check_quantization, load_as, load_config, load_tokenizer
from ..model.offload import check_in_memory
from ..model.quality import quality_of, shared_qualities
from ..model.tracing import TracedModel, trace_model
from ..pipeline.origin import describe_samples
from ..pipeline.preflight import check_before, goals_before
from ..pipeline.stages import (
    energies_stage,
    load_samples,
    metadata_of,
    pose_problem,
    spectrum_stage,
    stored_bytes,
    times_stage,
)
from ..problem import Block, Budget, Goal, Removal, check_goal
from ..processes import from_main, is_main
from ..progress import console
from ..settings import say
from ..solvers.candidates import random_candidate
from ..surgery.feasible import Removable
from ..surgery.memory import remove_blocks
from ..targets import TARGETS, target_text
from .cost import MethodCost
from .known import Known, known_removals, paper_models
from .methods import PAPER, Case, Method, Setup, known_methods, methods
from .repairs import repair_choices
from .results import ORIGINAL, RANDOM, Asked, Choice, Comparison, LandscapePoint, Row, energy_key, file_part

LANDSCAPE_DRAWS = 40  # random removals whose loss is set against their energy
LANDSCAPE_SEED = 1000  # added to the seed of the run: others than the draws of the method "random"


def compare(
    config: CompressConfig, goals: Mapping[str, Goal | None], out: str | Path, *, against: str | None = None
) -> Comparison:
    """Choose units with every method for every goal, and measure each choice; all of it in the folder `out`.

    ENERGY.safetensors (fitted-GOAL.safetensors, as these are made for a goal) and spectrum-GOAL-ENERGY.json, for the
    paper's energy and that of the settings, are as those of a run of `compress`; comparison.json holds the rest. The
    same call again continues where it was: a finished method is not run twice, and more goals may be added. Where a
    launcher has started several processes, they share the work.

    goals: name -> what to remove, e.g. {"8": 8}, None where the targets of `config` decide alone; `config.remove` is
        not used. The targets hold for every goal, and are part of its name (`goals_named`).
    against: removals that are known already (`known_removals`), of the units of `config`; those that meet a goal have a
        row of their own.

    Raises:
        ValueError: bad settings, unusable model, data or folder; what was finished before stays.
    """
    out = Path(out)
    if config.units == "sublayers" and against in paper_models():
        raise ValueError(f"the removals of {against} are of whole blocks; leave out --against, or --units sublayers")
    known = {} if against is None else known_removals(against)
    say(replace(config, energy=PAPER).unused())  # whose gradients every comparison takes
    with locked(out):
        comparison = from_main(lambda: open_comparison(config, out, against))
        measured = {row.goal for row in comparison.rows}
        missing = {name: goal for name, goal in goals.items() if name not in measured}
        if missing:
            complete(comparison, config, missing, out, known)
    return comparison


def goals_named(config: CompressConfig, removes: Mapping[str, Goal]) -> dict[str, Goal | None]:
    """What is to be removed by the name of the goal: as it is typed, with the targets that hold besides.

    removes: what --remove says, e.g. {"8": 8}; nothing where targets decide alone.
    """
    targets = [target_text(name, amount) for name, amount in config.targets.items()]
    goals: dict[str, Goal | None] = {}
    for text, goal in removes.items():
        goals[", ".join([text, *targets])] = goal
    return goals or {", ".join(targets): None}


def complete(
    comparison: Comparison, config: CompressConfig, goals: Mapping[str, Goal | None], out: Path, known: Known
) -> None:
    """Run and measure the methods that the comparison has no choices of yet, for goals that are not measured yet."""
    setup, score = _opened(config, goals, comparison, out)

    def save() -> None:
        if is_main():
            comparison.save(out / "comparison.json")

    save()
    setup.budgets = _budgets(setup, goals, out)
    for name, goal in goals.items():
        comparison.goals[name] = Asked(goal, config.targets)
        # Fitted energies are made for each goal, as a run of `compress` makes them; others are read again.
        for energy in dict.fromkeys([config.energy, PAPER]):
            setup.energies[energy] = energies_of(setup, energy, name, goal, out, save)
        case = pose_case(setup, name, goal, out)
        finished = {choice.method for choice in comparison.choices_for(name)}
        for method in [*methods(config), *known_methods(known, case.problem)]:
            if method.name not in finished:
                console.print(f"{name}: {method.name}", highlight=False)
                run_method(case, method, comparison)
                save()
        comparison.landscape[name] = landscape(case)
        if config.repair:
            repair_choices(setup, name, comparison, save)
        comparison.rows += measure(setup, name, comparison.choices_for(name), score)
        save()


def _opened(
    config: CompressConfig, goals: Mapping[str, Goal | None], comparison: Comparison, out: Path
) -> tuple[Setup, Scorer]:
    """The model, what the methods share, and what scores models on tasks.

    Everything that can be refused without timing is, before the settings are recorded.
    """
    remote = config.trust_remote_code
    check_quantization(config.model, config)
    model_config = load_config(config.model, trust_remote_code=remote)
    for goal in goals.values():
        from_main(partial(check_before, replace(config, remove=goal), model_config))
    tokenizer = load_tokenizer(config.model, trust_remote_code=remote)
    with_gradients = replace(config, energy=PAPER)  # which every comparison takes
    samples = from_main(lambda: load_samples(with_gradients, tokenizer, model_config))
    score = scorer(config, tokenizer, out / "scores")
    model = load_as(config.model, config)
    check_in_memory(model, "a comparison")
    measured = [*samples.calibration, *samples.selection]
    say(lowered_size(config.batch_size, measured, model, backward=with_gradients.keeps_activations))
    traced = trace_model(model, config.units)
    removable = Removable(model_config, traced.units, trust_remote_code=remote)
    if config.profile is not None or not config.needs_times:
        _check_goals(goals, traced.units, config, from_main(partial(goals_before, config, traced.units)))
    comparison.about = {**describe_machine(), **describe_samples(samples)}
    return Setup(traced, samples, config, removable, comparison.costs), score


def _budgets(setup: Setup, goals: Mapping[str, Goal | None], out: Path) -> list[Budget]:
    """What the targets ask for; times are measured where they are needed and no table is given.

    Raises:
        ValueError: a goal with them is out of reach.
    """
    config, model, units = setup.config, setup.traced.model, setup.traced.units
    times = from_main(lambda: times_stage(config, model, units, out / "profile.json"))
    remote = config.trust_remote_code
    budgets = from_main(lambda: goals_of(config, config.model, units, times, trust_remote_code=remote))
    _check_goals(goals, units, config, budgets)
    return budgets


def _check_goals(
    goals: Mapping[str, Goal | None], units: Sequence[Block], config: CompressConfig, budgets: Sequence[Budget]
) -> None:
    """Raise ValueError where one of the goals is out of reach."""
    for goal in goals.values():
        check_goal(units, goal, config.protect, budgets)


def open_comparison(config: CompressConfig, out: Path, against: str | None = None) -> Comparison:
    """The comparison in a folder, or a new one.

    Raises:
        ValueError: the folder holds something else, or a comparison with other settings.
    """
    of_goals = ("remove", *TARGETS)
    settings = {name: value for name, value in asdict(config).items() if name not in of_goals}
    settings["against"] = against
    file = out / "comparison.json"
    if file.is_file():
        comparison = Comparison.load(file)
        check_settings(out, "comparison", comparison.settings, settings)
        return comparison
    check_settings(out, "comparison", None, settings)
    return Comparison(json.loads(json.dumps(settings)))


def energies_of(
    setup: Setup, name: str, goal_name: str, goal: Goal | None, out: Path, save: Callable[[], None]
) -> Energies:
    """An energies file, and what it cost: an interrupted estimate adds to what was spent before.

    save: writes the comparison, whose costs are those of `setup`.
    """
    kept = energy_key(name, goal_name)
    config, key, path = setup.config, f"energy {kept}", out / f"{file_part(kept)}.safetensors"
    before = setup.costs.get(key, MethodCost())
    was_there = from_main(path.is_file)

    def keep(cost: MethodCost) -> None:
        setup.costs[key] = before + cost
        save()

    with setup.counting(None if was_there else keep) as cost:
        energies = energies_stage(
            replace(config, energy=name),
            setup.traced.model,
            setup.samples.calibration[: config.samples_for(name)],
            path,
            metadata_of(config),
            goal=goal,
            budgets=setup.budgets,
            protect=config.protect,
        )
    if was_there:
        setup.costs.setdefault(key, cost)
    else:
        keep(cost)
    return energies


def pose_case(setup: Setup, name: str, goal: Goal | None, out: Path) -> Case:
    """The problem of a goal with every energy; its spectrum, certified; and what tabu search finds, for a figure."""
    config = setup.config
    certifying = replace(config, solver="exact" if config.solver == "auto" else config.solver)
    problems, spectra, costs = {}, {}, {}
    for energy, energies in setup.energies.items():
        problem, file = pose_problem(energies, goal, config, setup.budgets), f"spectrum-{file_part(name)}-{energy}"
        spectrum = spectrum_stage(certifying, problem, out / f"{file}.json")
        spectrum_stage(replace(config, solver="tabu"), problem, out / f"{file}-tabu.json")

        solving = MethodCost(seconds=spectrum.seconds)
        setup.costs[f"solve {energy} {name}"] = solving
        problems[energy], spectra[energy] = problem, spectrum
        costs[energy] = setup.costs[f"energy {energy_key(energy, name)}"] + solving
    return Case(setup, name, problems, spectra, costs)


def run_method(case: Case, method: Method, comparison: Comparison) -> None:
    """Run one method and add its choices, or the reason why it has none, to the comparison."""
    setup, key = case.setup, f"{method.name}, {case.goal}"
    try:
        method.check(case)
        shared = method.shared_cost(case)
        with setup.counting() as own:
            chosen = method.choose(case)
    except (ValueError, MemoryError, RuntimeError) as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"out of memory ({first_line(error)})"
        comparison.left_out[key] = reason
        message = f"{case.goal}: {method.name} is left out: {reason}"
        console.print(message, highlight=False, markup=False, soft_wrap=True)
        return

    windows: tuple[tuple[int, int], ...] = ()
    if isinstance(chosen, baselines.Merged):
        windows, chosen = chosen.windows, chosen.candidate
    candidates = chosen if isinstance(chosen, Sequence) else [chosen]

    # Several draws count as one run of the method: each has its whole cost.
    cost = shared + own
    for candidate in candidates:
        removed = candidate.removed
        if setup.removable(removed):
            found = Choice(method.name, case.goal, removed, candidate.energy, windows, cost.passes, cost.seconds)
            comparison.choices.append(found)
        else:
            comparison.left_out[key] = f"the configuration cannot express the removal of {list(removed)}"


def landscape(case: Case) -> list[LandscapePoint]:
    """Both energies, loss and KL on the selection samples: the first states of each energy, and random removals."""
    setup, config = case.setup, case.setup.config
    drawn: dict[Removal, list[str]] = {(): [ORIGINAL]}  # removal -> how it was drawn
    for name, spectrum in case.spectra.items():
        for state in spectrum.states[: config.max_candidates]:
            drawn.setdefault(state.removed, []).append(name)
    for k in range(LANDSCAPE_DRAWS):
        candidate = random_candidate(case.problem, config.seed + LANDSCAPE_SEED + k)
        ways = drawn.setdefault(candidate.removed, [])
        if RANDOM not in ways:
            ways.append(RANDOM)

    # The whole model is among them, so that losses can be set against its own.
    qualities = shared_qualities(
        setup.traced, list(drawn), setup.samples.selection, batch_size=config.batch_size, progress=True
    )
    points = []
    for (removed, ways), quality in zip(drawn.items(), qualities, strict=True):
        energies = {name: problem.energy(removed) for name, problem in case.problems.items()}
        points.append(LandscapePoint(removed, energies, quality.loss, quality.kl, tuple(ways)))
    return points


def measure(setup: Setup, goal: str, choices: Sequence[Choice], score: Scorer) -> list[Row]:
    """Quality, size and speed of the choices of one goal, and of the original, and their scores on tasks."""
    traced, config, text = setup.traced, setup.config, setup.samples.evaluation
    model = traced.model
    compared = [Choice(ORIGINAL, goal, (), None, (), 0.0, 0.0), *choices]

    # Removals are measured together, so that they share passes; merged models have weights of their own.
    plain = sorted({choice.removed for choice in compared if not choice.windows})
    found = shared_qualities(traced, plain, text, batch_size=config.batch_size, progress=True)
    qualities = dict(zip(plain, found, strict=True))
    speeds = measure_speeds(setup, [choice.removed for choice in compared])

    rows = []
    for choice in compared:
        removed = choice.removed
        if choice.windows:
            shortened = baselines.merge_windows(model, choice.windows)
            quality = quality_of(shortened, model, text, config.batch_size)
        else:
            shortened = remove_blocks(model, removed, units=config.units, copy=False) if removed else model
            quality = qualities[removed]
        row = Row(
            **vars(choice),
            **vars(quality),
            num_parameters=count_parameters(shortened),
            num_bytes=stored_bytes(config, removed, shortened),
            tokens_per_second=speeds[_shape(traced, removed)],
            scores=score(shortened),
        )
        rows.append(row)
    return rows


def measure_speeds(setup: Setup, removals: Sequence[Removal]) -> dict[tuple[tuple[str, int], ...], float]:
    """Tokens per second by what was removed of which kind and size: models of one shape run equally fast."""
    model, units = setup.traced.model, setup.config.units
    models = {}
    for removed in removals:
        shape = _shape(setup.traced, removed)
        if shape not in models:
            models[shape] = remove_blocks(model, removed, units=units, copy=False) if removed else model
    running, batch_size = list(models.values()), setup.config.batch_size
    speeds = from_main(lambda: tokens_per_second(running, setup.samples.evaluation, batch_size=batch_size))
    return dict(zip(models, speeds, strict=True))


def _shape(traced: TracedModel, removed: Removal) -> tuple[tuple[str, int], ...]:
    """The kinds and sizes of the removed units."""
    shapes = [(traced.units[i].kind, traced.units[i].num_parameters) for i in removed]
    return tuple(sorted(shapes))
