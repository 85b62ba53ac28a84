"""Every method on the same model and samples, each result measured on held-out text; resumable.

Methods that compute statistics see the calibration samples; methods that measure shortened models, and the choice among
low-energy states, see the selection samples; what is reported is measured on the evaluation samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import baselines
from ..config import CompressConfig
from ..energies import Energies
from ..evaluation.perplexity import tokens_per_second
from ..evaluation.scores import Score, mean_scores
from ..evaluation.tasks import scorer
from ..files import write_json
from ..model.blocks import find_blocks
from ..model.loading import load_config, load_model, load_tokenizer
from ..model.quality import quality_of, shared_qualities
from ..model.tracing import trace_model
from ..preflight import check_before
from ..problem import Goal, RemovalProblem
from ..progress import console
from ..solvers import Spectrum
from ..solvers.candidates import random_candidate
from ..stages import energies_stage, load_samples, pose_problem, spectrum_stage
from ..surgery.checkpoint import checkpoint_bytes
from ..surgery.feasible import Removable
from ..surgery.memory import remove_blocks
from .methods import PAPER, Bench, Cost, Method, counted, methods

LANDSCAPE_DRAWS = 40  # random removals whose loss is set against their energy


@dataclass(frozen=True)
class Choice:
    """What a method removes for a goal ("8", "moe=2", "25%"), and what finding it cost.

    windows: of sliding-window merging, the (lowest, highest) blocks that were merged into one.
    """

    method: str
    goal: str
    removed: tuple[int, ...]
    energy: float | None
    windows: tuple[tuple[int, int], ...]
    passes: float
    seconds: float


@dataclass(frozen=True)
class Row(Choice):
    """A choice with its measures on the evaluation samples; see `measures.Quality` and `evaluation.Evaluation`."""

    loss: float
    kl: float
    agreement: float
    num_parameters: int
    num_bytes: int
    tokens_per_second: float
    scores: tuple[Score, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass
class Comparison:
    """Everything `comparison.json` holds.

    settings: of the run. costs: of what several methods share. choices: made so far. rows: the measured choices.
    landscape: goal -> removals with both energies, loss and KL on the selection samples, and how they were drawn: the
    names of the energies whose low states they are, "random", or "original" for the whole model.
    left_out: "method, goal" -> why it has no result.
    """

    settings: dict[str, Any]
    costs: dict[str, Cost] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    landscape: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        values = asdict(self)
        values["rows"] = [{**asdict(row), "perplexity": row.perplexity} for row in self.rows]
        write_json(path, values)

    @staticmethod
    def load(path: Path) -> Comparison:
        """Raises ValueError where the file is no comparison."""
        try:
            values = json.loads(path.read_text())
            rows = [{k: v for k, v in row.items() if k != "perplexity"} for row in values["rows"]]
            return Comparison(
                settings=values["settings"],
                costs={name: Cost(**cost) for name, cost in values["costs"].items()},
                choices=[Choice(**_tuples(choice)) for choice in values["choices"]],
                rows=[Row(**_tuples(row)) for row in rows],
                landscape=values["landscape"],
                left_out=values["left_out"],
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a comparison of blockspin ({error})") from error


def compare(config: CompressConfig, goals: Mapping[str, Goal], out: str | Path) -> Comparison:
    """Choose blocks with every method for every goal, and measure each choice; all of it in the folder `out`.

    ENERGY.safetensors and spectrum-GOAL-ENERGY.json, for the paper's energy and that of the settings, are as those of a
    run of `compress`; comparison.json holds the rest. The same call again continues where it was: a finished method is
    not run twice, and more goals may be added.

    goals: name -> what to remove, e.g. {"8": 8}; `config.remove` is not used.

    Raises:
        ValueError: bad settings, unusable model, data or folder; what was finished before stays.
    """
    out, file = Path(out), Path(out) / "comparison.json"
    comparison = open_comparison(config, out)
    measured = {row.goal for row in comparison.rows}
    if measured >= set(goals):
        return comparison
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    for removal in goals.values():
        check_before(replace(config, remove=removal), model_config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    samples = load_samples(replace(config, energy=PAPER), tokenizer, model_config)
    score = scorer(config, tokenizer, out / "scores")
    comparison.save(file)
    remote, device = config.trust_remote_code, config.device_map
    model = load_model(config.model, dtype=config.dtype, device_map=device, trust_remote_code=remote)
    comparison.costs = {name: cost for name, cost in comparison.costs.items() if name.startswith("energy ")}
    removable = Removable(model_config, trust_remote_code=remote)
    bench = Bench(model, samples, config, removable, comparison.costs)
    bench.energies = {name: energies_of(bench, name, out) for name in dict.fromkeys([config.energy, PAPER])}
    for goal, removal in goals.items():
        if goal in measured:
            continue
        for name, energies in bench.energies.items():
            bench.problems[name, goal] = pose_problem(energies, removal, config)
            bench.spectra[name, goal] = spectrum_of(bench, name, goal, out)
        problem = bench.problems[PAPER, goal]
        for name, method in methods(config).items():
            if not any((choice.method, choice.goal) == (name, goal) for choice in comparison.choices):
                console.print(f"{goal}: {name}", highlight=False)
                choose(bench, comparison, problem, goal, name, method)
                comparison.save(file)
        comparison.landscape[goal] = landscape(bench, goal)
        comparison.rows += measure(bench, [choice for choice in comparison.choices if choice.goal == goal], score)
        comparison.save(file)
    return comparison


def open_comparison(config: CompressConfig, out: Path) -> Comparison:
    """The comparison in a folder, or a new one. Raises ValueError where the folder holds something else."""
    settings = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k != "remove"}))
    if (out / "comparison.json").is_file():
        comparison = Comparison.load(out / "comparison.json")
        differing = [name for name, value in settings.items() if comparison.settings.get(name) != value]
        if differing:
            raise ValueError(
                f"{out} holds a comparison with other settings ({', '.join(differing)}); choose another folder (--out)"
            )
        return comparison
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a comparison of blockspin; choose another folder (--out)")
    return Comparison(settings)


def energies_of(bench: Bench, name: str, out: Path) -> Energies:
    """An energies file, and what it cost; an interrupted estimate counts from where it continued."""
    config = bench.config
    with counted(bench.model, bench.tokens) as cost:
        energies = energies_stage(
            replace(config, energy=name),
            bench.model,
            bench.samples.calibration[: config.samples_for(name)],
            out / f"{name}.safetensors",
            {name: str(getattr(config, name)) for name in ("model", "calibration", "seed", "max_length")},
        )
    bench.costs.setdefault(f"energy {name}", cost)
    return energies


def spectrum_of(bench: Bench, energy: str, goal: str, out: Path) -> Spectrum:
    """The spectrum that a goal's states are taken from, certified; and what tabu search finds, for a figure."""
    exact = replace(bench.config, solver="exact" if bench.config.solver == "auto" else bench.config.solver)
    problem = bench.problems[energy, goal]
    spectrum = spectrum_stage(exact, problem, out / f"spectrum-{goal}-{energy}.json")
    spectrum_stage(replace(bench.config, solver="tabu"), problem, out / f"spectrum-{goal}-{energy}-tabu.json")
    bench.costs[f"solve {energy} {goal}"] = Cost(0.0, spectrum.seconds)
    return spectrum


def choose(bench: Bench, comparison: Comparison, problem: RemovalProblem, goal: str, name: str, method: Method) -> None:
    """Run one method and add its choice, or the reason why it has none, to the comparison."""
    needs = [need.format(goal=goal) for need in method[0]]
    try:
        known = {need for need in needs if need in bench.costs}  # what is computed now is counted now
        with counted(bench.model, bench.tokens) as cost:
            found = method[1](bench, problem, goal)
    except ValueError as error:
        comparison.left_out[f"{name}, {goal}"] = str(error)
        console.print(f"{goal}: {name} is left out: {error}", highlight=False, markup=False, soft_wrap=True)
        return
    passes = cost.passes + sum(bench.costs[need].passes for need in known)
    seconds = cost.seconds + sum(bench.costs[need].seconds for need in known)
    windows = found.windows if isinstance(found, baselines.Merged) else ()
    candidates = [found.candidate] if isinstance(found, baselines.Merged) else found
    for candidate in candidates if isinstance(candidates, list) else [candidates]:
        if not bench.removable(candidate.removed):
            reason = f"the configuration cannot express the removal of {list(candidate.removed)}"
            comparison.left_out[f"{name}, {goal}"] = reason
            continue
        comparison.choices.append(Choice(name, goal, candidate.removed, candidate.energy, windows, passes, seconds))


def landscape(bench: Bench, goal: str) -> list[dict[str, Any]]:
    """Both energies, loss and KL on the selection samples: the first states of each energy, and random removals."""
    config, problem = bench.config, bench.problems[PAPER, goal]
    drawn_as: dict[tuple[int, ...], list[str]] = {(): ["original"]}
    for name in bench.energies:
        for state in bench.spectra[name, goal].states[: config.max_candidates]:
            drawn_as.setdefault(state.removed, []).append(name)
    for k in range(LANDSCAPE_DRAWS):
        ways = drawn_as.setdefault(random_candidate(problem, config.seed + 1000 + k).removed, [])
        ways += ["random"] if "random" not in ways else []
    removals = list(drawn_as)
    found = shared_qualities(
        trace_model(bench.model), removals, bench.samples.selection, batch_size=config.batch_size, progress=True
    )
    return [
        {
            "removed": removed,
            "energies": {name: bench.problems[name, goal].energy(removed) for name in bench.energies},
            "loss": quality.loss,
            "kl": quality.kl,
            "drawn": drawn_as[removed],
        }
        for removed, quality in zip(removals, found, strict=True)
    ]


def measure(
    bench: Bench, choices: Sequence[Choice], score: Callable[[Any], tuple[Score, ...]] = lambda model: ()
) -> list[Row]:
    """Quality, size and speed of the choices of one goal, and of the original, and their scores on tasks.

    Models with the same number of blocks of each kind run equally fast: of those one is timed.
    """
    model, config, text = bench.model, bench.config, bench.samples.evaluation
    original = Choice("original", choices[0].goal, (), None, (), 0.0, 0.0)
    plain = sorted({choice.removed for choice in [original, *choices] if not choice.windows})
    found = shared_qualities(trace_model(model), plain, text, batch_size=config.batch_size, progress=True)
    quality = dict(zip(plain, found, strict=True))
    blocks = find_blocks(model)

    def shape(removed: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
        return tuple(sorted((blocks[i].kind, blocks[i].num_parameters) for i in removed))

    timed = {shape(choice.removed): choice.removed for choice in [original, *choices]}
    models = [remove_blocks(model, removed) if removed else model for removed in timed.values()]
    speeds = dict(zip(timed, tokens_per_second(models, text, batch_size=config.batch_size), strict=True))
    rows = []
    for choice in [original, *choices]:
        removed = choice.removed
        if choice.windows:
            shortened = baselines.merge_windows(model, choice.windows)
            measures = quality_of(shortened, model, text, config.batch_size)
        else:
            shortened = remove_blocks(model, removed) if removed else model
            measures = quality[removed]
        rows.append(
            Row(
                **vars(choice),
                **vars(measures),
                num_parameters=sum(p.numel() for p in model.parameters())
                - sum(blocks[i].num_parameters for i in removed),
                num_bytes=checkpoint_bytes(config.model, removed, trust_remote_code=config.trust_remote_code),
                tokens_per_second=speeds[shape(removed)],
                scores=score(shortened),
            )
        )
    return rows


def averaged(rows: Sequence[Row]) -> list[Row]:
    """One row for each method and goal: several draws become their mean, with no blocks; best loss first in a goal."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.goal, row.method), []).append(row)
    means = []
    for group in groups.values():
        numbers = ("loss", "kl", "agreement", "num_parameters", "num_bytes", "tokens_per_second", "passes", "seconds")
        mean = {name: sum(getattr(row, name) for row in group) / len(group) for name in numbers}
        scores = mean_scores([row.scores for row in group])
        drawn = replace(group[0], **mean, removed=(), energy=None, scores=scores)
        means.append(group[0] if len(group) == 1 else drawn)
    order = list(dict.fromkeys(row.goal for row in rows))
    return sorted(means, key=lambda row: (order.index(row.goal), row.method != "original", row.loss))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    windows = tuple((lo, hi) for lo, hi in values["windows"])
    scores = {"scores": tuple(map(Score.from_json, values["scores"]))} if "scores" in values else {}
    return {**values, "removed": tuple(values["removed"]), "windows": windows, **scores}
