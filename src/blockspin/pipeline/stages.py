"""The stages of a run. Each is a file; a stage whose file exists is read and not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import CompressConfig, DataSettings, EnergySettings, SolvingSettings
from ..costs.targets import goals_table, read_times, what_is_left
from ..costs.timing import TimeTable, check_prediction, measure_times
from ..data.calibration import load_calibration
from ..energies import Energies, estimate_energies, load_energies
from ..energies.robustness import Robustness
from ..evaluation.perplexity import Evaluation, evaluate_models, evaluation_of, losses_without
from ..evaluation.tasks import Scorer
from ..files import write_json
from ..memory import release_memory
from ..model.batches import NotFiniteError
from ..model.blocks import count_parameters
from ..model.loading import context_length, load_config, model_without_weights, vocabulary_size
from ..model.offload import check_in_memory, is_offloaded
from ..model.quantization import is_quantized
from ..model.tracing import find_units, trace_model
from ..problem import Block, Budget, Goal, Removal, RemovalProblem, goal_name, units_of
from ..processes import from_main, is_main
from ..progress import console
from ..selection.repaired import repaired_beside
from ..selection.result import Selection
from ..solvers import Spectrum, solve
from ..solvers.candidates import Candidate
from ..surgery.checkpoint import checkpoint_bytes, prune_checkpoint
from ..surgery.memory import remove_blocks
from ..surgery.sublayer_checkpoint import prune_sublayers


@dataclass(frozen=True)
class Samples:
    """Three sets of token samples that share none: for the energies, for the choice, for the report."""

    calibration: list[Tensor]
    selection: list[Tensor]
    evaluation: list[Tensor]


def load_samples(config: CompressConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> Samples:
    """Draw the three sets; where the calibration set is too small for all, each gets its share.

    Raises:
        ValueError: the data cannot be read or is too small.
    """
    length = max_length(config, model_config)

    def draw(option: str, source: str, number: int) -> list[Tensor]:
        return load_calibration(
            source,
            tokenizer,
            num_samples=number,
            max_length=length,
            seed=config.seed,
            split=config.split,
            vocabulary=vocabulary_size(model_config),
            option=option,
        )

    held_out = 0 if config.evaluation else config.evaluation_samples
    sizes = [config.calibration_samples, config.selection_samples, held_out]
    drawn = draw("--calibration", config.calibration, sum(sizes))
    wanted = len(sizes) - sizes.count(0)
    if len(drawn) < wanted:
        raise ValueError(f"the calibration set is too small: {len(drawn)} of at least {wanted} samples (--calibration)")

    def share(size: int) -> int:
        """How many samples of what was drawn a set gets: at least one, if any are wanted."""
        return max(size * len(drawn) // sum(sizes), min(size, 1))

    selection, evaluation = share(config.selection_samples), share(held_out)
    calibration = len(drawn) - selection - evaluation
    if config.evaluation:
        reported = draw("--evaluation", config.evaluation, config.evaluation_samples)
    else:
        reported = drawn[calibration + selection :]
    return Samples(drawn[:calibration], drawn[calibration : calibration + selection], reported)


def max_length(settings: DataSettings, model_config: PretrainedConfig) -> int:
    """Tokens of a sample: what the settings allow and the model holds."""
    return min(settings.max_length, context_length(model_config) or settings.max_length)


def metadata_of(config: CompressConfig) -> dict[str, str]:
    """What the file of the energies says of where they come from."""
    return {
        "model": config.model,
        "calibration": config.calibration,
        "seed": str(config.seed),
        "max_length": str(config.max_length),
    }


def energies_stage(
    settings: EnergySettings,
    model: nn.Module,
    samples: Sequence[Tensor],
    path: Path,
    metadata: dict[str, str],
    goal: Goal | None = None,
    budgets: Sequence[Budget] = (),
    protect: Sequence[int] = (),
) -> Energies:
    """The energies file: read, or computed, continuing where an interrupted run stopped.

    goal, budgets, protect: what the energies are for, of `estimate_energies`.
    """
    with _journal(path) as partial:
        if not from_main(path.is_file):
            energies = estimate_energies(
                settings.energy,
                model,
                samples,
                batch_size=settings.batch_size,
                units=settings.units,
                goal=goal,
                budgets=budgets,
                protect=protect,
                gradient_checkpointing=settings.gradient_checkpointing,
                partial=partial,
                metadata=metadata,
            )
            from_main(lambda: energies.save(path))
            release_memory()
    return from_main(lambda: load_energies(path))


@contextmanager
def _journal(path: Path) -> Iterator[Path]:
    """The file that keeps what a stage has finished while it lasts; gone when the stage is whole.

    It stays after an interruption, from which the same call continues, but not where a loss is not finite: no call with
    these settings gets further, and others must not be refused for its sake.
    """
    partial = path.with_name(f"{path.stem}.partial.jsonl")
    try:
        yield partial
    except NotFiniteError:
        if is_main():
            partial.unlink(missing_ok=True)
        raise
    if is_main():
        partial.unlink(missing_ok=True)


def pose_problem(
    energies: Energies, remove: Goal | None, settings: SolvingSettings, budgets: Sequence[Budget] = ()
) -> RemovalProblem:
    """The removal problem for a goal as the settings state it, and for budgets; energies for another goal are named.

    Raises:
        ValueError: no removal meets them.
    """
    note_goal(energies, goal_name(remove, budgets))
    return problem_of(energies, remove, settings, budgets)


def note_goal(energies: Energies, wanted: str) -> None:
    """Say so where energies are made for another goal than the one that is wanted, of `goal_name`."""
    # Forms that are fitted for one goal record it; of other kinds there is nothing to say.
    made_for = energies.metadata.get("goal", wanted)
    if made_for != wanted:
        console.print(
            f"These energies are fitted to removals for {made_for} and say less of others: for {wanted} compute them "
            "with the options of that goal (blockspin energies --remove, --target-...), or with none for any number.",
            soft_wrap=True,
            highlight=False,
        )


def problem_of(
    energies: Energies, remove: Goal | None, settings: SolvingSettings, budgets: Sequence[Budget] = ()
) -> RemovalProblem:
    """As `pose_problem`, without a word."""
    return RemovalProblem.for_goal(
        energies.hessian,
        remove,
        blocks=energies.blocks,
        protect=settings.protect,
        beta=settings.beta,
        gradient=energies.mean_gradient,
        budgets=budgets,
    )


def times_stage(config: CompressConfig, model: nn.Module, units: Sequence[Block], path: Path) -> TimeTable | None:
    """The times that targets are stated in: of --profile, or measured on this machine and kept in a file."""
    if not config.needs_times or config.profile is not None:
        return read_times(config)
    if not path.is_file():
        check_in_memory(model, "timing a model")
        assert isinstance(model, PreTrainedModel)
        times = measure_times(model, units_of(units))
        console.print(times.table().text(console.width), soft_wrap=True, highlight=False)
        times.save(path)
    return TimeTable.load(path)


def goals_stage(
    budgets: Sequence[Budget], times: TimeTable | None, model: nn.Module, removed: Removal, path: Path
) -> None:
    """What the choice leaves of everything that a target counts, in a file; times are measured again on the result.

    times: what targets of time are stated in; None where there are none. Those of another machine only predict.
    """
    if path.is_file() or not budgets:
        return
    met = what_is_left(budgets, removed)
    console.print(goals_table(met).text(console.width), soft_wrap=True, highlight=False)
    record: dict[str, Any] = {"goals": list(map(asdict, met))}
    if times is not None:
        assert isinstance(model, PreTrainedModel)
        check = check_prediction(model, times, removed)
        console.print(check.summary(), soft_wrap=True, highlight=False)
        record["times"] = check.as_json()
    write_json(path, record)


def find_states(problem: RemovalProblem, settings: SolvingSettings) -> Spectrum:
    """The lowest states, as the settings say."""
    with console.status("Solving"):
        return solve(
            problem,
            states=settings.states,
            solver=settings.solver,
            time_limit=settings.time_limit,
            seed=settings.seed,
        )


def spectrum_stage(settings: SolvingSettings, problem: RemovalProblem, path: Path) -> Spectrum:
    """The spectrum file: read, or solved for."""

    def found() -> Spectrum:
        if not path.is_file():
            spectrum = find_states(problem, settings)
            spectrum.save(path)
            console.print(spectrum.summary(), soft_wrap=True)
        return Spectrum.load(path)

    return from_main(found)


def check_same_units(energies: Energies, model: PreTrainedModel) -> None:
    """Refuse energies of another model, where that shows in its units.

    Raises:
        ValueError: kinds, or sizes where no weights are packed, are not those of the model.
    """

    def described(units: Sequence[Block]) -> list[tuple[str, int]]:
        return [(unit.kind, 0 if is_quantized(model) else unit.num_parameters) for unit in units]

    units = find_units(model, units_of(energies.blocks))
    if described(units) != described(energies.blocks):
        other = energies.metadata.get("model") or "another model"
        raise ValueError(f"the energies are of {other}, whose blocks are not those of this model (--energies)")


def selection_stage(choose: Callable[[Path], tuple[Selection, Robustness]], path: Path) -> Selection:
    """The choice: read, or made, continuing where an interrupted run stopped.

    choose: `select_with_energies`, given the file that keeps what is measured until the choice is made.
    """
    with _journal(path) as partial:
        if not from_main(path.is_file):
            selection, trust = choose(partial)
            shown = selection.table().text(console.width)
            console.print(trust.summary(), shown, selection.summary(), sep="\n", soft_wrap=True, highlight=False)
            from_main(lambda: write_json(path, {**selection.as_json(), "robustness": trust.as_json()}))
            release_memory()
        if is_main():
            repaired_beside(partial).unlink(missing_ok=True)
    return from_main(lambda: Selection.load(path))


def checkpoint_stage(
    config: CompressConfig, chosen: Candidate, energies: Energies, about: dict[str, str], path: Path
) -> None:
    """The smaller checkpoint, if it is not there. about: machine, date and data, for its record."""
    if path.is_dir():
        return
    details = {
        "candidate": asdict(chosen),
        "objective": config.objective,
        "blocks": list(map(asdict, energies.blocks)),
        "about": about,
    }
    prune = prune_checkpoint if config.units == "blocks" else prune_sublayers
    prune(config.model, chosen.removed, path, details=details, trust_remote_code=config.trust_remote_code)


def evaluate_removals(
    config: CompressConfig,
    model: nn.Module,
    candidates: Sequence[Candidate],
    samples: Sequence[Tensor],
    score: Scorer,
) -> list[Evaluation]:
    """The original and each candidate, measured on `samples`; models in memory are scored on the tasks of the run too.

    A removal that several candidates share is measured once.
    """
    compared = [Candidate((), "original"), *candidates]
    names: dict[Removal, str] = {}
    for candidate in compared:
        names.setdefault(candidate.removed, candidate.source)

    if is_offloaded(model):
        evaluations = _in_one_sweep(config, model, names, samples)
    else:
        evaluations = _in_memory(config, model, names, samples, score)

    by_removal = {evaluation.removed: evaluation for evaluation in evaluations}
    rows = []
    for candidate in compared:
        rows.append(replace(by_removal[candidate.removed], name=candidate.source, energy=candidate.energy))
    return rows


def stored_bytes(config: CompressConfig, removed: Removal, shortened: nn.Module | None = None) -> int:
    """Bytes on disk of a shortened model; without some sub-layers in proportion to the parameters that are left."""
    remote = config.trust_remote_code
    if config.units == "blocks" or shortened is None:
        return checkpoint_bytes(config.model, removed, trust_remote_code=remote)
    model_config = load_config(config.model, trust_remote_code=remote)
    whole = count_parameters(model_without_weights(model_config, trust_remote_code=remote))
    return checkpoint_bytes(config.model, trust_remote_code=remote) * count_parameters(shortened) // whole


def _in_memory(
    config: CompressConfig, model: nn.Module, names: Mapping[Removal, str], samples: Sequence[Tensor], score: Scorer
) -> list[Evaluation]:
    """The rows of models that are built in memory, where they take turns to be timed."""
    models: dict[str, nn.Module] = {}
    sizes = []
    for removed, name in names.items():
        models[name] = remove_blocks(model, removed, units=config.units, copy=False) if removed else model
        sizes.append(stored_bytes(config, removed, models[name]))

    rows = []
    evaluations = evaluate_models(models, sizes, samples, batch_size=config.batch_size)
    for removed, evaluation in zip(names, evaluations, strict=True):
        rows.append(replace(evaluation, removed=removed, scores=score(models[evaluation.name])))
    return rows


def _in_one_sweep(
    config: CompressConfig, model: nn.Module, names: Mapping[Removal, str], samples: Sequence[Tensor]
) -> list[Evaluation]:
    """The rows of an offloaded model without some of its blocks, which need not be built for that; nothing is timed."""
    measured = losses_without(trace_model(model), list(names), samples, config.batch_size)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    structure = model_without_weights(model_config, trust_remote_code=config.trust_remote_code)

    rows = []
    for (removed, name), losses in zip(names.items(), measured, strict=True):
        shortened = remove_blocks(structure, removed, copy=False) if removed else structure
        row = evaluation_of(name, shortened, losses, samples, num_bytes=stored_bytes(config, removed))
        rows.append(replace(row, removed=removed))
    return rows
