"""The commands. Heavy imports are inside them, so that --help answers at once."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .config import GRADIENT_ENERGIES, CompressConfig, DistillConfig, EvaluateConfig, parse_indices, parse_remove
from .options import complete, with_settings
from .progress import console, terminal_width
from .tables import Table, ranges

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .energies import Energies
    from .problem import RemovalProblem

app = typer.Typer(
    name="blockspin",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation. "
    "Start with `blockspin demo`; for your own model use `blockspin compress`.",
)


Model = Annotated[str, typer.Argument(help="Hub id or local folder of a causal language model.")]
Data = Annotated[str, typer.Option("--data", help="Hub id or local file (.json, .jsonl, .parquet, .txt, also .gz).")]
Calibration = Annotated[
    str, typer.Option("--calibration", help="Text the gradients are computed on: hub id or local file.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder or file for the result.")]

SAMPLING = ("max_length", "seed", "split", "batch_size")
LOADING = ("dtype", "device_map", "trust_remote_code")
DISTILLING = [f.name for f in fields(DistillConfig)]
DECIDED = ("teacher", "split", "max_length", "seed", "trust_remote_code")  # of these, by the run that distils
SOLVING = ("protect", "beta", "solver", "states", "time_limit")


@app.command()
def demo(
    out: Out = Path("blockspin-demo"),
    remove: Annotated[str, typer.Option("--remove", help="How many of its 24 blocks go.")] = "8",
) -> None:
    """Compress the small model that comes with the package, and show what it costs and saves."""
    from .demo import CALIBRATION, MODEL, VALIDATION

    config = CompressConfig(
        model=MODEL,
        calibration=CALIBRATION,
        evaluation=VALIDATION,
        remove=parse_remove(remove),
        energy_samples=16,
        selection_samples=16,
        evaluation_samples=64,
        max_length=256,
        budget=24.0,
    )
    _compress(config, out)
    console.print(f"\nLoad it with AutoModelForCausalLM.from_pretrained({str(out / 'checkpoint')!r}).", soft_wrap=True)


@app.command()
@with_settings(
    of=DistillConfig, within="distillation", **{f"distill_{name}": name for name in DISTILLING if name not in DECIDED}
)
@with_settings(*(f.name for f in fields(CompressConfig) if f.name not in ("model", "distill")))
def compress(
    model: Annotated[str | None, typer.Argument(help="Hub id or local folder of a causal language model.")] = None,
    out: Out = Path("blockspin-run"),
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with settings; options given here win.")
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Train the result with the original as its teacher, and evaluate again.")
    ] = False,
    **settings: Any,
) -> None:
    """Compress a model: gradients, spectrum, choice, smaller checkpoint, evaluation; with --distill, training.

    Everything is in the folder --out. Run the same command again to continue a run that was cut off.

    Example: blockspin compress MODEL --remove 8 --calibration teknium/OpenHermes-2.5 --distill --out DIR
    """
    training = settings.pop("distillation")
    values = {**(CompressConfig.read(config) if config else {}), **settings, **({"model": model} if model else {})}
    if distill or training:
        values["distill"] = {**(values.get("distill") or {}), **training}
    missing = [name for name in ("model", "remove", "calibration") if name not in values]
    if missing:
        raise ValueError(f"compress needs {', '.join(missing)} (as an option or in --config)")
    _compress(CompressConfig(**values), out)


@app.command()
@with_settings("energy", "num_samples", "energy_samples", *SAMPLING, "gradient_checkpointing", *LOADING)
def gradients(model: Model, calibration: Calibration, out: Out = Path("energies.safetensors"), **settings: Any) -> None:
    """Compute what the energies of a model are made of once; solve for any number of removals from the file.

    Gradients for --energy fisher or empirical-fisher (the paper's); shortened models for the others.
    """
    from .pipeline import energies_stage

    if out.exists():
        raise ValueError(f"{out} exists already; choose another file (--out)")
    s = complete(settings)
    number = s.num_samples if s.energy in GRADIENT_ENERGIES else s.energy_samples
    samples = _samples(model, calibration, number, s)
    result = energies_stage(
        s.energy,
        _model(model, s),
        samples,
        out,
        batch_size=s.batch_size,
        gradient_checkpointing=s.gradient_checkpointing,
        metadata={"model": model, "calibration": calibration},
    )
    console.print(f"{s.energy} of {len(samples)} samples, {len(result.blocks)} blocks: {out}", soft_wrap=True)


@app.command()
@with_settings("remove", *SOLVING, "seed")
def solve(
    file: Annotated[Path, typer.Argument(help="A file made by `blockspin gradients`.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the spectrum to this JSON file.")] = None,
    **settings: Any,
) -> None:
    """Find the lowest-energy removals; say what is proven of them, and how they depend on the samples."""
    from . import solvers
    from .energies.robustness import robustness

    s, (energies, problem) = complete(settings), _posed(file, settings)
    spectrum = solvers.solve(problem, states=s.states, solver=s.solver, time_limit=s.time_limit, seed=s.seed)
    typer.echo(spectrum.render(limit=None, width=terminal_width()))
    typer.echo(robustness(energies, problem, seed=s.seed).summary())
    if out is not None:
        spectrum.save(out)


@app.command()
@with_settings(
    "remove",
    *SOLVING,
    "max_candidates",
    "objective",
    "budget",
    *SAMPLING,
    *LOADING,
    num_samples="selection_samples",
)
def select(
    model: Model,
    energies: Annotated[Path, typer.Option("--energies", help="A file made by `blockspin gradients`.")],
    data: Data,
    out: Out = Path("candidates.json"),
    **settings: Any,
) -> None:
    """Choose a removal by measuring: race the distinct low-energy states on held-out text, and polish the winner.

    Prints what was tried; the last line is the chosen blocks, as `blockspin prune --blocks` takes them.
    """
    from .model.loading import load_config
    from .pipeline import Samples, selection_stage
    from .solvers import solve
    from .surgery.feasible import Removable, protect_what_must_stay

    s, (found, problem) = complete(settings), _posed(energies, settings)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file (--out)")
    model_config = load_config(model, trust_remote_code=s.trust_remote_code)
    removable = Removable(model_config, trust_remote_code=s.trust_remote_code)
    problem = protect_what_must_stay(problem, removable)
    spectrum = solve(problem, states=s.states, solver=s.solver, time_limit=s.time_limit, seed=s.seed)
    samples = _samples(model, data, s.selection_samples, s)
    config = CompressConfig(model=model, calibration=data, **settings)
    sets = Samples(calibration=samples, selection=samples, evaluation=[])
    selection = selection_stage(config, _model(model, s), found, problem, spectrum, sets, removable, out)
    typer.echo(ranges(selection.chosen.removed))


@app.command()
@with_settings("trust_remote_code")
def prune(
    model: Model,
    blocks: Annotated[str, typer.Option("--blocks", help="The blocks to remove: 3-6,9,15.")],
    out: Out,
    **settings: Any,
) -> None:
    """Write a checkpoint without some blocks, shard by shard; the model is never loaded."""
    from .surgery.checkpoint import prune_checkpoint

    prune_checkpoint(model, parse_indices(blocks), out, trust_remote_code=complete(settings).trust_remote_code)
    console.print(f"Wrote {out}.", soft_wrap=True)


@app.command()
@with_settings(*(f.name for f in fields(EvaluateConfig)), of=EvaluateConfig)
@with_settings("max_length", "split", num_samples="evaluation_samples")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Hub ids or local folders; the first is the reference.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Perplexity and speed on samples of it: hub id or local file.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Perplexity of a whole text: wikitext2 or a text file.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens of a window of --text.")] = 2048,
    cost: Annotated[
        bool, typer.Option("--cost", help="Size, cache, prefill, decode, memory; models in turns.")
    ] = False,
    length: Annotated[int, typer.Option("--length", help="Tokens of a prompt of --cost.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens generated in --cost.")] = 64,
    print_nemo_skills: Annotated[
        bool, typer.Option("--print-nemo-skills", help="Only print the commands of NeMo-Skills for the same tasks.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the results to this JSON file, and tables to .md beside it.")
    ] = None,
    **settings: Any,
) -> None:
    """Benchmark scores, perplexity, size and speed of models side by side.

    Without --data, --text or --cost the models are scored on --tasks, by default those of the paper. The same command
    again continues with the next task, or shows the results at once.

    Example: blockspin evaluate MODEL MODEL-without-8-blocks --tasks mmlu,gsm8k --text wikitext2 --cost
    """
    from .evaluation.nemo_skills import commands
    from .evaluation.side_by_side import evaluate_side_by_side

    names = {f.name for f in fields(EvaluateConfig)}
    config = EvaluateConfig(**{name: value for name, value in settings.items() if name in names})
    if print_nemo_skills:
        typer.echo(commands(models, config))
        return
    s = complete({name: value for name, value in settings.items() if name not in names or name == "seed"})
    s.trust_remote_code = config.trust_remote_code
    batch = {} if config.batch_size == "auto" else {"batch_size": int(config.batch_size)}
    result = evaluate_side_by_side(
        models,
        config,
        tasks=bool({"tasks", "rollouts"} & set(settings)) or not (data or text or cost),
        samples=_samples(models[0], data, s.evaluation_samples, s) if data else (),
        texts=text or (),
        window=window,
        cost={"length": length, "new_tokens": new_tokens, **batch} if cost else None,
        show=_print,
    )
    if out is not None:
        result.save(out)


@app.command()
@with_settings(*(f.name for f in fields(CompressConfig) if f.name not in ("model", "calibration", "remove", "distill")))
def compare(
    model: Model,
    remove: Annotated[
        list[str],
        typer.Option("--remove", help="Goals: 4,8,12 or 10%,25%; by kind one goal an option: --remove moe=2,mlp=1."),
    ],
    calibration: Calibration,
    out: Out = Path("blockspin-comparison"),
    **settings: Any,
) -> None:
    """Which blocks would each method remove, and how good is the result? Tables, figures and one HTML page in --out.

    Run the same command again to continue; more goals may be added to a folder.

    Example: blockspin compare MODEL --remove 4,8,12 --calibration teknium/OpenHermes-2.5 --out DIR
    """
    from .comparison.report import terminal_tables, write_report
    from .comparison.run import compare as run

    texts = [part.strip() for text in remove for part in ([text] if "=" in text else text.split(","))]
    goals = {text: parse_remove(text) for text in texts}
    config = CompressConfig(model=model, calibration=calibration, remove=next(iter(goals.values())), **settings)
    comparison = run(config, goals, out)
    for table in terminal_tables([row for row in comparison.rows if row.goal in goals]):
        _print(table)
    console.print(f"Tables and figures: {write_report(out)}.", soft_wrap=True)


@app.command()
@with_settings(*DISTILLING, of=DistillConfig)
def distill(
    student: Annotated[str, typer.Argument(help="The shortened model: a folder that `blockspin prune` made.")],
    out: Out,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with settings; options given here win.")
    ] = None,
    **settings: Any,
) -> None:
    """Train a shortened model with the original as its teacher.

    Run the same command again to continue a run that was cut off. On several GPUs start it with accelerate:
    accelerate launch --num-processes 4 -m blockspin distill ...

    Example: blockspin distill smaller --teacher MODEL --data teknium/OpenHermes-2.5 --out retrained
    """
    from .distillation.run import distill_checkpoint

    values = {**(DistillConfig.read(config) if config else {}), **settings}
    result = distill_checkpoint(student, out, DistillConfig(**values))
    console.print(
        f"Perplexity {result.before['perplexity']:.2f} before, {result.after['perplexity']:.2f} after {result.steps} "
        f"steps, on the validation samples. Wrote {out}.",
        soft_wrap=True,
    )


@app.command()
def report(out: Annotated[Path, typer.Argument(help="The folder of a comparison.")]) -> None:
    """Make the tables, figures and the HTML page of a comparison again."""
    from .comparison.report import write_report

    console.print(f"Wrote {write_report(out)}.", soft_wrap=True)


def _compress(config: CompressConfig, out: Path) -> None:
    from .evaluation.perplexity import results_table
    from .pipeline import compress

    rows = compress(config, out)
    _print(results_table(rows))
    console.print(f"The run is in {out}, the smaller model in {out / 'checkpoint'}.", soft_wrap=True)


def _posed(file: Path, settings: dict[str, Any]) -> tuple[Energies, RemovalProblem]:
    """The energies in a file, and the problem that the options state."""
    from .energies import load_energies
    from .pipeline import pose_problem

    if "remove" not in settings:
        raise ValueError("--remove is missing: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters")
    s, energies = complete(settings), load_energies(file)
    return energies, pose_problem(energies, s.remove, s.protect, s.beta)


def _samples(model: str, data: str, number: int, s: SimpleNamespace) -> list[Tensor]:
    from .data.calibration import load_calibration
    from .model.loading import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=s.trust_remote_code)
    return load_calibration(data, tokenizer, num_samples=number, max_length=s.max_length, seed=s.seed, split=s.split)


def _model(name: str, s: SimpleNamespace) -> PreTrainedModel:
    from .model.loading import load_model

    return load_model(name, dtype=s.dtype, device_map=s.device_map, trust_remote_code=s.trust_remote_code)


def _print(table: Table) -> None:
    typer.echo(table.text(terminal_width()) + "\n")


def main() -> None:
    """Entry point: users' mistakes end with one line and exit code 2, not with a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        console.quiet = False  # as it is in all processes of a distributed training but one
        message = " ".join(str(error).split())
        console.print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to continue.")
        sys.exit(130)
