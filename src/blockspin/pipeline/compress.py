"""The whole method on one page: calibrate, energies, solve, select, prune, repair, evaluate; each stage is a file.

A stage whose file exists is not done again, so a run that was cut off continues where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import CompressConfig
from ..costs.targets import goals_of
from ..costs.timing import TimeTable
from ..data.calibration import tokenise
from ..data.prompts import prompts
from ..distillation.run import distill_checkpoint
from ..evaluation.perplexity import Evaluation, evaluation_of, results_table, sample_losses_of
from ..evaluation.tasks import Scorer, scorer
from ..files import write_json
from ..lock import locked
from ..machine import describe_machine
from ..memory import release_memory
from ..model.largest_batch import lowered_size
from ..model.loading import check_quantization, load_as, load_config, load_tokenizer
from ..model.offload import is_offloaded
from ..model.tracing import find_units, trace_model
from ..problem import Budget, RemovalProblem, check_goal
from ..processes import from_main
from ..progress import console
from ..repairs.checkpoint import repair_checkpoint
from ..selection.result import Selection
from ..selection.select import select_with_energies
from ..settings import say
from ..solvers import Spectrum
from ..solvers.candidates import Candidate, random_candidate, states_as_candidates
from ..sources import public_name
from ..surgery.card import add_results
from ..surgery.checkpoint import checkpoint_bytes
from ..surgery.feasible import Removable, protect_what_must_stay
from .origin import describe_samples
from .plan import plan_with
from .preflight import check_before, check_repair_text, check_streaming, open_run
from .report import write_run_report
from .stages import (
    Samples,
    checkpoint_stage,
    energies_stage,
    evaluate_removals,
    goals_stage,
    load_samples,
    max_length,
    metadata_of,
    pose_problem,
    selection_stage,
    spectrum_stage,
    times_stage,
)

_RANDOM_DRAWS = 100  # in which a random removal that can be saved is looked for


def compress(config: CompressConfig, out: str | Path) -> list[Evaluation]:
    """Run the whole method; everything it makes is in the folder `out`.

    run.yaml              the settings
    energies.safetensors  what the energy is computed from; for the gradients, A
    spectrum.json         the lowest-energy removals, and what is proven of them
    profile.json          with a target of time and no table for it: what each kind of block takes on this machine
    goals.json            with targets: what the chosen removal leaves of everything that they count
    candidates.json       the choice: every removal that was measured, and how far the energies can be trusted
    checkpoint/           the smaller model, for from_pretrained of the class that opens the original
    repaired/             unless `repair` is off: the same with new weights in linear maps
    distilled/            with `distill`: the smaller model after training with the original as its teacher
    evaluation.json       original, ground state, chosen state and a random removal on text not used before
    report.html           all of it as one page
    scores/               their scores on the tasks of the settings, if any, each kept as soon as it is there

    Where a launcher has started several processes, they share the work.

    Returns the rows of evaluation.json: original, CBO:0 (the lowest state that can be saved), the chosen state, random,
    then repaired and distilled where wanted.

    Raises:
        ValueError: bad settings, unusable model, data or folder; what was finished before stays.
    """
    out = Path(out)
    say(config.unused())
    with locked(out):
        from_main(lambda: open_run(config, out))
        rows = from_main(lambda: read_rows(out)) or shorten(config, out)
        release_memory()  # of the original, which the stages below open again

        chosen = next(row for row in rows if row.name.startswith("chosen"))
        names = [row.name for row in rows]
        if config.repair and "repaired" not in names:
            rows.append(repair_stage(config, out, chosen))
            from_main(lambda: write_rows(rows, out))
        if config.distill is not None and "distilled" not in names:
            rows.append(distillation_stage(config, out, chosen))
            from_main(lambda: write_rows(rows, out))
    return rows


def shorten(config: CompressConfig, out: Path) -> list[Evaluation]:
    """All of `compress` but the repair and the training."""
    remote = config.trust_remote_code
    check_quantization(config.model, config)
    model_config = load_config(config.model, trust_remote_code=remote)
    from_main(lambda: check_before(config, model_config))
    tokenizer = load_tokenizer(config.model, trust_remote_code=remote)
    samples = from_main(lambda: load_samples(config, tokenizer, model_config))

    # What is used last must be there too: text for the training, and the tasks.
    _check_training_text(config, tokenizer)
    score = scorer(config, tokenizer, out / "scores")

    # The settings are recorded once nothing is left that could refuse them but the model itself.
    model = _model_to_shorten(config, samples, tokenizer, out)
    from_main(lambda: config.save(out / "run.yaml"))

    # The energies, made for what the run removes.
    times, budgets = _targets(config, model, out)
    energies = energies_stage(
        config,
        model,
        samples.calibration,
        out / "energies.safetensors",
        metadata_of(config),
        goal=config.remove,
        budgets=budgets,
        protect=config.protect,
    )

    # The removals of lowest energy, among those that a configuration can express.
    removable = Removable(model_config, energies.blocks, trust_remote_code=remote)
    problem = protect_what_must_stay(pose_problem(energies, config.remove, config, budgets), removable)
    spectrum = spectrum_stage(config, problem, out / "spectrum.json")

    # The best of them and of a few others, by measuring.
    text_for_repairs = samples.calibration if config.repair and config.choose_repaired else []
    selection = selection_stage(
        lambda partial: select_with_energies(
            model,
            energies,
            problem,
            spectrum,
            samples.selection,
            samples.calibration,
            removable,
            config,
            repair_samples=text_for_repairs,
            partial=partial,
        ),
        out / "candidates.json",
    )
    from_main(lambda: goals_stage(budgets, times, model, selection.chosen.removed, out / "goals.json"))
    about = {**describe_machine(), **describe_samples(samples)}
    from_main(lambda: checkpoint_stage(config, selection.chosen, energies, about, out / "checkpoint"))

    # The report: what was chosen between the lowest state and a random removal.
    compared = _compared(config, problem, spectrum, selection, removable)
    return report_stage(config, model, compared, samples.evaluation, score, out)


def _check_training_text(config: CompressConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the start of the text for the training, where it has text of its own or needs prompts.

    Raises:
        ValueError: it cannot be read, or holds no prompts.
    """
    training = config.distill
    if training is None:
        return
    if training.self_generated is not None:
        data = training.data or config.calibration
        next(prompts(data, tokenizer, config.max_length, seed=config.seed, split=config.split), None)
    elif training.data is not None:
        data, option = training.data, "--distill-data"
        next(tokenise(data, tokenizer, config.max_length, seed=config.seed, split=config.split, option=option))


def _model_to_shorten(
    config: CompressConfig, samples: Samples, tokenizer: PreTrainedTokenizerBase, out: Path
) -> PreTrainedModel:
    """The original. Said are the size of a batch, where it is lowered, and how long the run will take, where blocks
    stay on disk.

    Raises:
        ValueError: it cannot be opened, a setting needs it in memory, the goal is out of reach, or there is too little
            text for a repair.
    """
    model = load_as(config.model, config)
    measured = [*samples.calibration, *samples.selection]
    say(lowered_size(config.batch_size, measured, model, backward=config.keeps_activations))
    if is_offloaded(model):
        check_streaming(config)
        plan = from_main(lambda: plan_with(config, trace_model(model), samples, tokenizer, out))
        console.print(plan.estimate(), soft_wrap=True, highlight=False)

    units = find_units(model, config.units)
    if config.remove is not None:
        check_goal(units, config.remove, config.protect)
    check_repair_text(config, model, samples)
    return model


def _targets(config: CompressConfig, model: PreTrainedModel, out: Path) -> tuple[TimeTable | None, list[Budget]]:
    """What the targets ask for, and the times that those of time are stated in: of this machine, or of --profile.

    Raises:
        ValueError: the goal and the targets are out of reach.
    """
    units, remote = find_units(model, config.units), config.trust_remote_code
    times = from_main(lambda: times_stage(config, model, units, out / "profile.json"))
    budgets = from_main(lambda: goals_of(config, config.model, units, times, trust_remote_code=remote))
    check_goal(units, config.remove, config.protect, budgets)
    return times if config.needs_times else None, budgets


def _compared(
    config: CompressConfig, problem: RemovalProblem, spectrum: Spectrum, selection: Selection, removable: Removable
) -> list[Candidate]:
    """The removals of the report: the lowest state that can be saved, the choice and a random one."""
    lowest = removable.first_of(states_as_candidates(spectrum))
    chosen = replace(selection.chosen, source=f"chosen ({selection.chosen.source})")
    drawn = (random_candidate(problem, config.seed + k) for k in range(_RANDOM_DRAWS))
    return [*lowest, chosen, *removable.first_of(drawn)]


def report_stage(
    config: CompressConfig,
    model: PreTrainedModel,
    compared: Sequence[Candidate],
    samples: Sequence[Tensor],
    score: Scorer,
    out: Path,
) -> list[Evaluation]:
    """Measure the original and the removals that are compared; the rows are in the checkpoint's card too."""
    rows = evaluate_removals(config, model, compared, samples, score)
    where = measured_on(config, samples)
    from_main(lambda: add_results(out / "checkpoint", results_table(rows, config.units), where))
    from_main(lambda: write_rows(rows, out))
    return rows


def measured_on(config: CompressConfig, samples: Sequence[Tensor]) -> str:
    """What a table of results was measured on, in a sentence."""
    source = config.evaluation or config.calibration
    name = public_name(source)
    size = f"{len(samples)} samples ({sum(map(len, samples)):,} tokens)"
    loaded = f" All models were loaded in {config.quantization}." if config.quantization is not None else ""
    return f"Measured on {size} of {name} that nothing was chosen on; ± one standard error.{loaded}"


def read_rows(out: Path) -> list[Evaluation]:
    """What `compress` has returned before; nothing where it was not that far."""
    if not (out / "evaluation.json").is_file() or not (out / "checkpoint").is_dir():
        return []
    return list(map(Evaluation.from_json, json.loads((out / "evaluation.json").read_text())))


def _trusts_result(config: CompressConfig) -> bool:
    """Whether code in the folders of the run may be executed: that of the modelling file, where sub-layers are gone."""
    return config.trust_remote_code or config.units == "sublayers"


def write_rows(rows: Sequence[Evaluation], out: Path) -> None:
    """What `compress` returns, as evaluation.json, and the page of the run."""
    write_json(out / "evaluation.json", [row.as_json() for row in rows])
    write_run_report(out)


def result_folder(config: CompressConfig, out: Path) -> Path:
    """Where the last stage of a run leaves the model."""
    return out / "distilled" if config.distill is not None else _shortened_folder(out)


def _shortened_folder(out: Path) -> Path:
    """Where the smaller model is before a training."""
    return out / ("repaired" if (out / "repaired").is_dir() else "checkpoint")


def repair_stage(config: CompressConfig, out: Path, chosen: Evaluation) -> Evaluation:
    """Repair the smaller model, and measure it as the others were, on text that the repair has not seen.

    chosen: the row of the smaller model.
    """
    _, tokenizer, samples = _of_run(config)

    def repaired() -> None:
        if (out / "repaired").is_dir():
            return
        report = repair_checkpoint(
            out / "checkpoint",
            config.model,
            [*samples.calibration, *samples.selection],
            out / "repaired",
            dtype=config.dtype,
            device_map=config.place,
            batch_size=config.batch_size,
            seed=config.seed,
            own_text_share=config.own_text,
            trust_remote_code=_trusts_result(config),
            data=config.calibration,
            split=config.split,
        )
        config.save(out / "run.yaml")
        console.print(report.summary(), soft_wrap=True, highlight=False)

    from_main(repaired)
    return evaluated(config, out, "repaired", chosen, samples.evaluation, tokenizer)


def _of_run(config: CompressConfig) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Samples]:
    """The configuration and the tokenizer of the original, and the samples of a run, for a stage after the choice."""
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    return model_config, tokenizer, from_main(lambda: load_samples(config, tokenizer, model_config))


def evaluated(
    config: CompressConfig,
    out: Path,
    name: str,
    chosen: Evaluation,
    samples: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluation:
    """The row of the model in the folder `name` of the run.

    chosen: the row of the same model with its weights as they were. Its speed was measured in turns with the
    original's, and that of other weights of the same shapes is the same.
    """
    remote = _trusts_result(config)
    model = load_as(out / name, replace(config, trust_remote_code=remote))
    size = checkpoint_bytes(out / name, trust_remote_code=remote)
    losses = sample_losses_of(model, samples, config.batch_size)
    row = evaluation_of(name, model, losses, samples, num_bytes=size, tokens_per_second=chosen.tokens_per_second)
    return replace(row, removed=chosen.removed, scores=scorer(config, tokenizer, out / "scores")(model))


def distillation_stage(config: CompressConfig, out: Path, chosen: Evaluation) -> Evaluation:
    """Train the smaller model with the original as its teacher, and measure it as the others were.

    It is trained on the calibration set, or on data of its own, but never on the samples of the evaluation.

    chosen: the row of the smaller model.
    """
    assert config.distill is not None
    model_config, tokenizer, samples = _of_run(config)
    settings = replace(
        config.distill,
        teacher=config.model,
        data=config.distill.data or config.calibration,
        split=config.split,
        seed=config.seed,
        max_length=max_length(config, model_config),
        trust_remote_code=_trusts_result(config),
    )

    # The evaluation comes last in the order of the calibration set.
    first = len(samples.calibration) + len(samples.selection)
    held_out = settings.data == config.calibration and config.evaluation is None
    leave_out = range(first, first + len(samples.evaluation)) if held_out else range(0)
    if not from_main((out / "distilled").is_dir):
        distill_checkpoint(_shortened_folder(out), out / "distilled", settings, leave_out=leave_out)
        from_main(lambda: config.save(out / "run.yaml"))

    return evaluated(config, out, "distilled", chosen, samples.evaluation, tokenizer)
