"""The whole method on one page: calibrate, energies, solve, select, prune, evaluate; each stage is a file of the run.

A stage whose file exists is not done again, so a run that was cut off continues where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .config import GRADIENT_ENERGIES, CompressConfig
from .data.calibration import load_calibration, tokenise
from .distillation.preflight import check_requirements, check_room, choose_quantization, free_memory, memory_estimate
from .distillation.run import distill_checkpoint
from .energies import Energies, estimate_energies, load_energies
from .evaluation.perplexity import Evaluation, evaluate_models
from .evaluation.scores import Score
from .evaluation.tasks import scorer
from .files import write_json
from .model.blocks import find_blocks
from .model.loading import context_length, load_config, load_model, load_tokenizer, model_without_weights
from .problem import Block, Goal, RemovalProblem, check_goal
from .progress import console
from .selection.select import ACTIVATION_SAMPLES, Selection, select_with_energies
from .solvers import SOLVERS, Spectrum, solve
from .solvers.candidates import Candidate, random_candidate, states_as_candidates
from .surgery.checkpoint import checkpoint_bytes, prune_checkpoint
from .surgery.feasible import Removable, protect_what_must_stay
from .surgery.memory import remove_blocks


@dataclass(frozen=True)
class Samples:
    """Three sets of token samples that share none: for the energies, for the choice, for the report."""

    calibration: list[Tensor]
    selection: list[Tensor]
    evaluation: list[Tensor]


def compress(config: CompressConfig, out: str | Path) -> list[Evaluation]:
    """Run the whole method; everything it makes is in the folder `out`.

    run.yaml              the settings
    energies.safetensors  what the energy is computed from; for the gradients, A
    spectrum.json         the lowest-energy removals, and what is proven of them
    candidates.json       the choice: every removal that was measured, and how far the energies can be trusted
    checkpoint/           the smaller model, for from_pretrained of the class that opens the original
    distilled/            with `distill`: the smaller model after training with the original as its teacher
    evaluation.json       original, ground state, chosen state and a random removal on text not used before
    scores/               their scores on the tasks of the settings, if any, each kept as soon as it is there

    Returns the rows of evaluation.json: original, CBO:0 (the lowest state that can be saved), the chosen state, random,
    and distilled where wanted.

    Raises:
        ValueError: bad settings, unusable model, data or folder; what was finished before stays.
    """
    out = Path(out)
    check_folder(config, out)
    if (out / "evaluation.json").is_file() and (out / "checkpoint").is_dir():
        rows = [Evaluation.from_json(row) for row in json.loads((out / "evaluation.json").read_text())]
    else:
        rows = shorten(config, out)
    if config.distill is not None and rows[-1].name != "distilled":
        chosen = next(row for row in rows if row.name.startswith("chosen"))
        rows.append(distillation_stage(config, out, chosen.removed))
        write_json(out / "evaluation.json", [row.as_json() for row in rows])
    return rows


def shorten(config: CompressConfig, out: Path) -> list[Evaluation]:
    """All of `compress` but the training."""
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    check_before(config, model_config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    samples = load_samples(config, tokenizer, model_config)
    if config.distill is not None and config.distill.data is not None:
        next(tokenise(config.distill.data, tokenizer, config.max_length, seed=config.seed, split=config.split))
    score = scorer(config, tokenizer, out / "scores")
    config.save(out / "run.yaml")
    model = load_model(
        config.model,
        dtype=config.dtype,
        device_map=config.device_map,
        trust_remote_code=config.trust_remote_code,
    )
    energies = energies_stage(
        config.energy,
        model,
        samples.calibration,
        out / "energies.safetensors",
        batch_size=config.batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        metadata={name: str(getattr(config, name)) for name in ("model", "calibration", "seed", "max_length")},
    )
    removable = Removable(model_config, trust_remote_code=config.trust_remote_code)
    problem = protect_what_must_stay(pose_problem(energies, config.remove, config.protect, config.beta), removable)
    spectrum = spectrum_stage(config, problem, out / "spectrum.json")
    selection = selection_stage(config, model, energies, problem, spectrum, samples, removable, out / "candidates.json")
    chosen = selection.chosen
    if not (out / "checkpoint").is_dir():
        details = {"candidate": asdict(chosen), "blocks": [asdict(block) for block in energies.blocks]}
        prune_checkpoint(
            config.model,
            chosen.removed,
            out / "checkpoint",
            details=details,
            trust_remote_code=config.trust_remote_code,
        )
    named = replace(chosen, source=f"chosen ({chosen.source})")
    states, drawn = states_as_candidates(spectrum), (random_candidate(problem, config.seed + k) for k in range(100))
    compared = [*removable.first_of(states), named, *removable.first_of(drawn)]
    rows = evaluate_removals(config, model, compared, samples.evaluation, score)
    write_json(out / "evaluation.json", [row.as_json() for row in rows])
    return rows


def check_folder(config: CompressConfig, out: Path) -> None:
    """Refuse a folder that holds another run or other files."""
    if (out / "run.yaml").is_file():
        stored = CompressConfig(**CompressConfig.read(out / "run.yaml"))
        differing = [name for name, value in asdict(config).items() if asdict(stored)[name] != value]
        if differing:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(differing)}); choose another folder (--out)"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a run of blockspin; choose another folder (--out)")


def check_before(config: CompressConfig, model_config: PretrainedConfig) -> None:
    """Refuse what cannot end well before anything is loaded: impossible removals, weights that cannot be rewritten."""
    blocks = find_blocks(model_without_weights(model_config, trust_remote_code=config.trust_remote_code))
    check_goal(blocks, config.remove, config.protect)
    if config.beta != 0 and config.energy not in GRADIENT_ENERGIES:
        raise ValueError(f"--beta weighs a gradient: choose --energy {' or '.join(GRADIENT_ENERGIES)}, or leave it out")
    checkpoint_bytes(config.model, trust_remote_code=config.trust_remote_code)
    if config.solver != "auto" and config.solver not in SOLVERS:
        raise ValueError(f"unknown solver {config.solver!r}; choose auto or one of {', '.join(SOLVERS)} (--solver)")
    if config.distill is not None:
        check_distillation(config, model_config, blocks)


def check_distillation(config: CompressConfig, model_config: PretrainedConfig, blocks: Sequence[Block]) -> None:
    """Refuse a training that lacks packages or room, even where the largest blocks are the ones that go."""
    assert config.distill is not None
    check_requirements(config.distill)
    model = model_without_weights(model_config, trust_remote_code=config.trust_remote_code)
    teacher = sum(p.numel() for p in model.parameters())
    if isinstance(config.remove, float):
        gone = int(config.remove * sum(block.num_parameters for block in blocks))
    else:
        number = sum(config.remove.values()) if isinstance(config.remove, dict) else config.remove
        gone = sum(sorted(block.num_parameters for block in blocks)[-number:])
    settings = replace(config.distill, teacher=config.model, max_length=_max_length(config, model_config))
    settings = replace(settings, teacher_quantization=choose_quantization(settings))
    vocabulary = model_config.get_text_config(decoder=True).vocab_size
    check_room(memory_estimate(teacher - gone, teacher, vocabulary, settings, 1), free_memory())


def load_samples(config: CompressConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> Samples:
    """Draw the three sets; where the calibration set is too small for all, each gets its share.

    Raises:
        ValueError: the data cannot be read or is too small.
    """
    max_length = _max_length(config, model_config)

    def draw(source: str, number: int) -> list[Tensor]:
        return load_calibration(
            source, tokenizer, num_samples=number, max_length=max_length, seed=config.seed, split=config.split
        )

    sizes = [
        config.calibration_samples,
        config.selection_samples,
        0 if config.evaluation else config.evaluation_samples,
    ]
    drawn = draw(config.calibration, sum(sizes))
    wanted = len([size for size in sizes if size])
    if len(drawn) < wanted:
        raise ValueError(f"the calibration set has {len(drawn)} samples; at least {wanted} are needed (--calibration)")
    selection, evaluation = (max(size * len(drawn) // sum(sizes), min(size, 1)) for size in sizes[1:])
    calibration = len(drawn) - selection - evaluation
    return Samples(
        calibration=drawn[:calibration],
        selection=drawn[calibration : calibration + selection],
        evaluation=draw(config.evaluation, config.evaluation_samples)
        if config.evaluation
        else drawn[calibration + selection :],
    )


def _max_length(config: CompressConfig, model_config: PretrainedConfig) -> int:
    return min(config.max_length, context_length(model_config) or config.max_length)


def energies_stage(
    energy: str,
    model: nn.Module,
    samples: Sequence[Tensor],
    path: Path,
    *,
    batch_size: int,
    gradient_checkpointing: bool,
    metadata: dict[str, str],
) -> Energies:
    """The energies file: read, or computed, continuing where an interrupted run stopped."""
    partial = path.with_name(f"{path.stem}.partial.jsonl")
    if not path.is_file():
        estimate_energies(
            energy,
            model,
            samples,
            batch_size=batch_size,
            gradient_checkpointing=gradient_checkpointing,
            partial=partial,
            metadata=metadata,
        ).save(path)
    partial.unlink(missing_ok=True)
    return load_energies(path)


def pose_problem(energies: Energies, remove: Goal, protect: Sequence[int], beta: float) -> RemovalProblem:
    """The removal problem for a goal as the settings state it.

    Raises:
        ValueError: no removal meets the goal.
    """
    goal: dict[str, Any] = {"remove_parameters" if isinstance(remove, float) else "remove": remove}
    gradient = energies.mean_gradient
    return RemovalProblem(
        energies.hessian, blocks=energies.blocks, protect=protect, beta=beta, gradient=gradient, **goal
    )


def spectrum_stage(config: CompressConfig, problem: RemovalProblem, path: Path) -> Spectrum:
    """The spectrum file: read, or solved for."""
    if not path.is_file():
        with console.status("Solving"):
            spectrum = solve(
                problem, states=config.states, solver=config.solver, time_limit=config.time_limit, seed=config.seed
            )
        spectrum.save(path)
        console.print(spectrum.summary(), soft_wrap=True)
    return Spectrum.load(path)


def selection_stage(
    config: CompressConfig,
    model: nn.Module,
    energies: Energies,
    problem: RemovalProblem,
    spectrum: Spectrum,
    samples: Samples,
    removable: Removable,
    path: Path,
) -> Selection:
    """The choice: read, or made, continuing where an interrupted run stopped."""
    partial = path.with_name(f"{path.stem}.partial.json")
    if not path.is_file():
        selection, trust = select_with_energies(
            model,
            energies,
            problem,
            spectrum,
            samples.selection,
            samples.calibration[:ACTIVATION_SAMPLES],
            removable,
            seed=config.seed,
            max_candidates=config.max_candidates,
            batch_size=config.batch_size,
            objective=config.objective,
            budget=config.budget,
            partial=partial,
        )
        shown = selection.table().text(console.width)
        console.print(trust.summary(), shown, selection.summary(), sep="\n", soft_wrap=True, highlight=False)
        write_json(path, {**selection.as_json(), "robustness": trust.as_json()})
    partial.unlink(missing_ok=True)
    return Selection.load(path)


def distillation_stage(config: CompressConfig, out: Path, removed: tuple[int, ...]) -> Evaluation:
    """Train the smaller model with the original as its teacher, and measure it as the others were.

    It is trained on the calibration set, or on data of its own, but never on the samples of the evaluation.
    """
    assert config.distill is not None
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    samples = load_samples(config, tokenizer, model_config)
    settings = replace(
        config.distill,
        teacher=config.model,
        data=config.distill.data or config.calibration,
        **{name: getattr(config, name) for name in ("split", "seed", "trust_remote_code")},
        max_length=_max_length(config, model_config),
    )
    first = len(samples.calibration) + len(samples.selection)
    held_out = settings.data == config.calibration and config.evaluation is None
    leave_out = range(first, first + len(samples.evaluation)) if held_out else range(0)
    if not (out / "distilled").is_dir():
        distill_checkpoint(out / "checkpoint", out / "distilled", settings, leave_out=leave_out)
    remote = config.trust_remote_code
    model = load_model(
        str(out / "distilled"), dtype=config.dtype, device_map=config.device_map, trust_remote_code=remote
    )
    size = checkpoint_bytes(out / "distilled", trust_remote_code=remote)
    (row,) = evaluate_models({"distilled": model}, [size], samples.evaluation, batch_size=config.batch_size)
    score = scorer(config, tokenizer, out / "scores")
    return replace(row, removed=removed, scores=score(model))


def evaluate_removals(
    config: CompressConfig,
    model: nn.Module,
    candidates: Sequence[Candidate],
    samples: Sequence[Tensor],
    score: Callable[[Any], tuple[Score, ...]],
) -> list[Evaluation]:
    """The original and each candidate, built in memory, measured on `samples` and scored on the tasks of the run."""
    rows = {"original": Candidate((), "original")} | {candidate.source: candidate for candidate in candidates}
    models = {name: remove_blocks(model, row.removed) if row.removed else model for name, row in rows.items()}
    remote = config.trust_remote_code
    sizes = [checkpoint_bytes(config.model, row.removed, trust_remote_code=remote) for row in rows.values()]
    measured = evaluate_models(models, sizes, samples, batch_size=config.batch_size)
    return [
        replace(evaluation, removed=row.removed, energy=row.energy, scores=score(models[name]))
        for evaluation, (name, row) in zip(measured, rows.items(), strict=True)
    ]
