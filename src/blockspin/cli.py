"""The commands. Heavy imports are inside them, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import CompressConfig, default, parse_remove
from .progress import console

app = typer.Typer(
    name="blockspin",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation. "
    "Start with `blockspin demo`; for your own model use `blockspin compress`.",
)


def _option(flag: str, setting: str, text: str) -> Any:
    """An option whose default is that of the settings; None means that it was not given."""
    value = default(setting)
    shown = "" if value is None or value == () else f" (default: {value})"
    return typer.Option(flag, help=text + shown, show_default=False)


Model = Annotated[str, typer.Argument(help="Hub id or local folder of a causal language model.")]
_REMOVE = "What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters."
Remove = Annotated[str, typer.Option("--remove", help=_REMOVE)]
Data = Annotated[str, typer.Option("--data", help="Hub id or local file (.json, .jsonl, .parquet, .txt, also .gz).")]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", help="Text the gradients are computed on: hub id or local file.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", help="Folder or file for the result.")]
Split = Annotated[str | None, _option("--split", "split", "Split of a hub dataset.")]
NumSamples = Annotated[int | None, _option("--num-samples", "num_samples", "Calibration samples.")]
MaxLength = Annotated[int | None, _option("--max-length", "max_length", "Tokens of a sample at most.")]
Seed = Annotated[int | None, _option("--seed", "seed", "Decides the order of the data and the solver's start values.")]
BatchSize = Annotated[int | None, _option("--batch-size", "batch_size", "Samples in one pass.")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing", help="Less memory for the gradients, a third more time.", show_default=False
    ),
]
Dtype = Annotated[str | None, _option("--dtype", "dtype", "auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, _option("--device-map", "device_map", "auto spreads the model over several GPUs.")]
RemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", show_default=False),
]
Protect = Annotated[str | None, _option("--protect", "protect", "Blocks that must stay: 0,1,31.")]
Beta = Annotated[float | None, _option("--beta", "beta", "Weight of the first-order term.")]
Solver = Annotated[str | None, _option("--solver", "solver", "auto certifies its answer.")]
States = Annotated[int | None, _option("--states", "states", "How many lowest-energy removals to find.")]
TimeLimit = Annotated[float | None, _option("--time-limit", "time_limit", "Seconds the solver may take.")]
MaxCandidates = Annotated[int | None, _option("--max-candidates", "max_candidates", "States whose loss is measured.")]


@app.command()
def demo(
    out: Out = Path("blockspin-demo"),
    remove: Remove = "8",
) -> None:
    """Compress the small model that comes with the package, and show what it costs and saves."""
    from .demo import CALIBRATION, MODEL, VALIDATION

    config = CompressConfig(
        model=MODEL,
        calibration=CALIBRATION,
        evaluation=VALIDATION,
        remove=parse_remove(remove),
        num_samples=128,
        selection_samples=16,
        evaluation_samples=64,
        max_length=256,
    )
    _compress(config, out)
    console.print(f"\nLoad it with AutoModelForCausalLM.from_pretrained({str(out / 'checkpoint')!r}).", soft_wrap=True)


@app.command()
def compress(
    model: Annotated[str | None, typer.Argument(help="Hub id or local folder of a causal language model.")] = None,
    remove: Annotated[
        str | None,
        typer.Option("--remove", help=_REMOVE, show_default=False),
    ] = None,
    calibration: Calibration = None,
    out: Out = Path("blockspin-run"),
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with settings; options given here win.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--evaluation", help="Text for the report (default: held-out calibration samples)."),
    ] = None,
    num_samples: NumSamples = None,
    selection_samples: Annotated[
        int | None, _option("--selection-samples", "selection_samples", "Samples the choice is made on.")
    ] = None,
    evaluation_samples: Annotated[
        int | None, _option("--evaluation-samples", "evaluation_samples", "Samples of the report.")
    ] = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    split: Split = None,
    batch_size: BatchSize = None,
    gradient_checkpointing: Checkpointing = None,
    protect: Protect = None,
    beta: Beta = None,
    solver: Solver = None,
    states: States = None,
    max_candidates: MaxCandidates = None,
    time_limit: TimeLimit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Compress a model: gradients, problem, spectrum, choice, smaller checkpoint, evaluation.

    Everything is in the folder --out. Run the same command again to continue a run that was cut off.

    Example: blockspin compress MODEL --remove 8 --calibration teknium/OpenHermes-2.5 --out DIR
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("out", "config")}
    settings = {**(CompressConfig.read(config) if config else {}), **given}
    if remove is not None:
        settings["remove"] = parse_remove(remove)
    if protect is not None:
        settings["protect"] = tuple(_indices(protect, "--protect"))
    missing = [name for name in ("model", "remove", "calibration") if name not in settings]
    if missing:
        raise ValueError(f"compress needs {', '.join(missing)} (as an option or in --config)")
    _compress(CompressConfig(**settings), out)


@app.command()
def gradients(
    model: Model,
    calibration: Annotated[str, typer.Option("--calibration", help="Hub id or local file.")],
    out: Out = Path("gradients.safetensors"),
    num_samples: NumSamples = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    split: Split = None,
    batch_size: BatchSize = None,
    gradient_checkpointing: Checkpointing = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Compute the gate gradients of a model once; solve for any number of removals from the file."""
    from .calibration import load_calibration
    from .models import load_model, load_tokenizer
    from .pipeline import gradients_stage

    if out.exists():
        raise ValueError(f"{out} exists already; choose another file (--out)")
    remote = bool(trust_remote_code)
    samples = load_calibration(
        calibration,
        load_tokenizer(model, trust_remote_code=remote),
        num_samples=_or_default(num_samples, "num_samples"),
        max_length=_or_default(max_length, "max_length"),
        seed=_or_default(seed, "seed"),
        split=_or_default(split, "split"),
    )
    result = gradients_stage(
        load_model(model, dtype=_or_default(dtype, "dtype"), device_map=device_map, trust_remote_code=remote),
        samples,
        out,
        batch_size=_or_default(batch_size, "batch_size"),
        gradient_checkpointing=bool(gradient_checkpointing),
        metadata={"model": model, "calibration": calibration},
    )
    console.print(f"{len(result.matrix)} samples, {len(result.blocks)} blocks, loss {result.losses.mean():.4f}: {out}")


@app.command()
def solve(
    file: Annotated[Path, typer.Argument(help="A gradients file.")],
    remove: Remove,
    states: States = None,
    solver: Solver = None,
    time_limit: TimeLimit = None,
    protect: Protect = None,
    beta: Beta = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the spectrum to this JSON file.")] = None,
) -> None:
    """Find the lowest-energy removals, and say what is proven of them."""
    from . import solvers
    from .hessian import Gradients
    from .pipeline import pose_problem

    loaded = Gradients.load(file)
    problem = pose_problem(
        loaded.hessian,
        loaded.blocks,
        loaded.mean_gradient,
        parse_remove(remove),
        _indices(protect, "--protect") if protect else (),
        _or_default(beta, "beta"),
    )
    spectrum = solvers.solve(
        problem,
        states=_or_default(states, "states"),
        solver=_or_default(solver, "solver"),
        time_limit=time_limit,
        seed=_or_default(seed, "seed"),
    )
    typer.echo(spectrum.render(limit=None))
    if out is not None:
        spectrum.save(out)


@app.command()
def select(
    model: Model,
    spectrum: Annotated[Path, typer.Option("--spectrum", help="A spectrum file made by `blockspin solve --out`.")],
    data: Data,
    out: Out = Path("candidates.json"),
    num_samples: Annotated[
        int | None, _option("--num-samples", "selection_samples", "Samples the choice is made on.")
    ] = None,
    max_candidates: MaxCandidates = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    split: Split = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Measure the first states of a spectrum on held-out text and choose the best."""
    from .calibration import load_calibration
    from .candidates import best
    from .models import load_model, load_tokenizer
    from .pipeline import candidates_stage
    from .solvers import Spectrum

    remote = bool(trust_remote_code)
    states = Spectrum.load(spectrum)
    samples = load_calibration(
        data,
        load_tokenizer(model, trust_remote_code=remote),
        num_samples=_or_default(num_samples, "selection_samples"),
        max_length=_or_default(max_length, "max_length"),
        seed=_or_default(seed, "seed"),
        split=_or_default(split, "split"),
    )
    measured = candidates_stage(
        load_model(model, dtype=_or_default(dtype, "dtype"), device_map=device_map, trust_remote_code=remote),
        states,
        samples,
        out,
        max_candidates=_or_default(max_candidates, "max_candidates"),
        batch_size=_or_default(batch_size, "batch_size"),
    )
    chosen = best(measured)
    console.print(f"{chosen.source}, loss {chosen.loss:.4f}: {out}", soft_wrap=True)
    typer.echo(",".join(map(str, chosen.removed)))


@app.command()
def prune(
    model: Model,
    blocks: Annotated[str, typer.Option("--blocks", help="The blocks to remove: 20,23.")],
    out: Out,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Write a checkpoint without some blocks, shard by shard; the model is never loaded."""
    from .surgery import prune_checkpoint

    prune_checkpoint(model, _indices(blocks, "--blocks"), out, trust_remote_code=bool(trust_remote_code))
    console.print(f"Wrote {out}.", soft_wrap=True)


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Hub ids or local folders; the first is the reference.")],
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", help="Write the table to this JSON file.")] = None,
    num_samples: Annotated[int | None, _option("--num-samples", "evaluation_samples", "Samples measured.")] = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    split: Split = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Perplexity, parameters, size and speed of models side by side."""
    from .calibration import load_calibration
    from .evaluation import evaluate_models, results_table
    from .files import write_json
    from .models import load_model, load_tokenizer
    from .surgery import checkpoint_bytes

    remote = bool(trust_remote_code)
    samples = load_calibration(
        data,
        load_tokenizer(models[0], trust_remote_code=remote),
        num_samples=_or_default(num_samples, "evaluation_samples"),
        max_length=_or_default(max_length, "max_length"),
        seed=_or_default(seed, "seed"),
        split=_or_default(split, "split"),
    )
    loaded = {
        name: load_model(name, dtype=_or_default(dtype, "dtype"), device_map=device_map, trust_remote_code=remote)
        for name in models
    }
    sizes = [checkpoint_bytes(name, trust_remote_code=remote) for name in models]
    rows = evaluate_models(loaded, sizes, samples, batch_size=_or_default(batch_size, "batch_size"))
    _print(results_table(rows))
    if out is not None:
        write_json(out, [row.as_json() for row in rows])


@app.command()
def compare(
    model: Model,
    remove: Annotated[
        list[str],
        typer.Option("--remove", help="Goals: 4,8,12 or 10%,25%; by kind one goal an option: --remove moe=2,mlp=1."),
    ],
    calibration: Annotated[str, typer.Option("--calibration", help="Hub id or local file.")],
    out: Out = Path("blockspin-comparison"),
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", help="Text for the measures (default: held-out calibration samples).")
    ] = None,
    num_samples: NumSamples = None,
    selection_samples: Annotated[
        int | None,
        _option("--selection-samples", "selection_samples", "Samples on which methods measure shortened models."),
    ] = None,
    evaluation_samples: Annotated[
        int | None, _option("--evaluation-samples", "evaluation_samples", "Samples of the report.")
    ] = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    split: Split = None,
    batch_size: BatchSize = None,
    gradient_checkpointing: Checkpointing = None,
    protect: Protect = None,
    beta: Beta = None,
    solver: Solver = None,
    states: States = None,
    max_candidates: MaxCandidates = None,
    time_limit: TimeLimit = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Which blocks would each method remove, and how good is the result? Tables, figures and one HTML page in --out.

    Run the same command again to continue; more goals may be added to a folder.

    Example: blockspin compare MODEL --remove 4,8,12 --calibration teknium/OpenHermes-2.5 --out DIR
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("out", "remove")}
    from .comparison import compare as run
    from .report import terminal_table, write_report

    if protect is not None:
        given["protect"] = tuple(_indices(protect, "--protect"))
    texts = [part.strip() for text in remove for part in ([text] if "=" in text else text.split(","))]
    goals = {text: parse_remove(text) for text in texts}
    comparison = run(CompressConfig(remove=next(iter(goals.values())), **given), goals, out)
    _print(terminal_table([row for row in comparison.rows if row.goal in goals]))
    console.print(f"Tables and figures: {write_report(out)}.", soft_wrap=True)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="The folder of a comparison.")]) -> None:
    """Make the tables, figures and the HTML page of a comparison again."""
    from .report import write_report

    console.print(f"Wrote {write_report(out)}.", soft_wrap=True)


def _compress(config: CompressConfig, out: Path) -> None:
    from .evaluation import results_table
    from .pipeline import compress

    rows = compress(config, out)
    _print(results_table(rows))
    console.print(f"The run is in {out}, the smaller model in {out / 'checkpoint'}.", soft_wrap=True)


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _or_default(value: Any, setting: str) -> Any:
    return default(setting) if value is None else value


def _indices(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes block numbers separated by commas (20,23), not {text!r}") from None


def main() -> None:
    """Entry point: users' mistakes end with one line and exit code 2, not with a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        console.print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to continue.")
        sys.exit(130)


if __name__ == "__main__":
    main()
