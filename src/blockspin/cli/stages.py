"""The commands for one stage of the method each, and what comes before: info, energies, solve, select, prune,
repair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import (
    BatchSettings,
    ChoosingSettings,
    DataSettings,
    EnergySettings,
    LoadingSettings,
    SolvingSettings,
    parse_indices,
    parse_remove,
)
from ..lock import locked
from ..problem import Units
from ..progress import console, terminal_width
from ..tables import ranges
from .app import (
    AsJson,
    Calibration,
    Data,
    Model,
    Out,
    Remove,
    app,
    load_samples,
    open_model,
    refuse_existing,
    show,
    show_json,
)
from .options import Options, with_settings

EnergiesFile = Annotated[Path, typer.Option("--energies", help="A file made by `blockspin energies`.")]


@app.command()
@with_settings
def info(
    model: Model,
    loading: Annotated[LoadingSettings, Options(without=("dtype", "device_map", "stream"))],
    json: AsJson = False,
) -> None:
    """Show the blocks of a model, which of them can be removed, and what removing some would save; reads no weights."""
    from ..overview import overview

    found = overview(model, trust_remote_code=loading.trust_remote_code)
    if json:
        show_json(found.as_json())
        return
    typer.echo(found.summary() + "\n")
    show(found.blocks_table())
    show(found.savings_table())


@app.command()
@app.command("gradients", hidden=True)
@with_settings
def energies(
    model: Model,
    calibration: Calibration,
    energy: EnergySettings,
    data: DataSettings,
    loading: LoadingSettings,
    out: Out = Path("energies.safetensors"),
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove",
            help="What they are for (8, 25%, moe=2): `fitted` energies are more accurate for one goal than for all.",
        ),
    ] = None,
) -> None:
    """Compute what the energies of a model are made of once; solve for any number of removals from the file.

    Gradients for --energy fisher or empirical-fisher (the paper's); shortened models for the others.
    """
    from ..pipeline.stages import energies_stage

    goal = None if remove is None else parse_remove(remove)

    with locked(out):
        refuse_existing(out)
        samples = load_samples(model, calibration, energy.samples_for(energy.energy), data, loading)
        metadata = {"model": model, "calibration": calibration}
        result = energies_stage(energy, open_model(model, loading), samples, out, metadata, goal=goal)
    console.print(f"{energy.energy} of {len(samples)} samples, {len(result.blocks)} blocks: {out}", soft_wrap=True)


@app.command()
@with_settings
def solve(
    file: Annotated[Path, typer.Argument(help="A file made by `blockspin energies`.")],
    remove: Remove,
    solving: SolvingSettings,
    out: Annotated[Path | None, typer.Option("--out", help="Write the spectrum to this JSON file.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="States to print at most (default: all that are found).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Find the lowest-energy removals; say what is proven of them, and how they depend on the samples."""
    from ..energies import load_energies
    from ..energies.robustness import robustness
    from ..pipeline.stages import find_states, pose_problem

    goal, found = parse_remove(remove), load_energies(file)
    with locked(out):
        problem = pose_problem(found, goal, solving)
        spectrum = find_states(problem, solving)
        trust = robustness(found, problem, seed=solving.seed)
        if out is not None:
            spectrum.save(out)

    if json:
        shown = spectrum.as_json()
        shown["states"] = shown["states"][:limit]
        show_json({**shown, "robustness": trust.as_json()})
        return
    typer.echo(spectrum.render(limit=limit, width=terminal_width()))
    typer.echo(trust.summary())


@app.command()
@with_settings
def select(
    model: Model,
    energies: EnergiesFile,
    remove: Remove,
    data: Data,
    solving: SolvingSettings,
    choosing: Annotated[ChoosingSettings, Options(renamed={"selection_samples": "num_samples"})],
    drawing: DataSettings,
    loading: LoadingSettings,
    out: Out = Path("candidates.json"),
    json: AsJson = False,
) -> None:
    """Choose a removal by measuring: race the distinct low-energy states on held-out text, and polish the winner.

    Prints what was tried; the last line is the chosen blocks, as `blockspin prune --blocks` takes them.
    """
    from ..energies import load_energies
    from ..model.loading import load_config
    from ..pipeline.stages import find_states, pose_problem, selection_stage
    from ..surgery.feasible import Removable, protect_what_must_stay

    with locked(out):
        refuse_existing(out)
        goal, found = parse_remove(remove), load_energies(energies)
        model_config = load_config(model, trust_remote_code=loading.trust_remote_code)
        removable = Removable(model_config, found.blocks, trust_remote_code=loading.trust_remote_code)
        problem = protect_what_must_stay(pose_problem(found, goal, solving), removable)
        spectrum = find_states(problem, solving)

        number = choosing.selection_samples  # and as many for repairs
        drawn = load_samples(model, data, (1 + choosing.choose_repaired) * number, drawing, loading)
        samples = drawn[:number]
        selection = selection_stage(
            choosing,
            open_model(model, loading),
            found,
            problem,
            spectrum,
            samples,
            samples,
            removable,
            out,
            repair_samples=drawn[number:],
        )
    if json:
        show_json(selection.as_json())
    else:
        typer.echo(ranges(selection.chosen.removed))


@app.command()
@with_settings
def prune(
    model: Model,
    blocks: Annotated[str, typer.Option("--blocks", help="The blocks, or sub-layers, to remove: 3-6,9,15.")],
    out: Out,
    loading: Annotated[LoadingSettings, Options(without=("dtype", "device_map", "stream"))],
    units: Annotated[
        Units, typer.Option("--units", help="What the numbers stand for: blocks or sublayers.")
    ] = "blocks",
) -> None:
    """Write a checkpoint without some blocks, shard by shard, or without sub-layers, for which the model is loaded."""
    from ..surgery.checkpoint import prune_checkpoint
    from ..surgery.sublayer_checkpoint import prune_sublayers

    remove = prune_checkpoint if units == "blocks" else prune_sublayers
    remove(model, parse_indices(blocks), out, trust_remote_code=loading.trust_remote_code)
    console.print(f"The smaller model is in {out}.", soft_wrap=True)


@app.command()
@with_settings
def repair(
    shortened: Annotated[str, typer.Argument(help="The shortened model: a folder that `blockspin prune` made.")],
    original: Annotated[str, typer.Option("--original", help="The model it was made of: hub id or local folder.")],
    data: Data,
    out: Out,
    drawing: DataSettings,
    batches: BatchSettings,
    loading: LoadingSettings,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Samples of the text.")] = 128,
) -> None:
    """Give linear maps of a shortened model new weights, in closed form, so that it follows the original.

    Run the same command again to continue a repair that was cut off.

    Example: blockspin repair smaller --original MODEL --data teknium/OpenHermes-2.5 --out repaired
    """
    from ..repairs.checkpoint import repair_checkpoint

    report = repair_checkpoint(
        shortened,
        original,
        load_samples(original, data, num_samples, drawing, loading),
        out,
        dtype=loading.dtype,
        device_map=loading.place,
        batch_size=batches.batch_size,
        seed=drawing.seed,
        trust_remote_code=loading.trust_remote_code,
    )
    console.print(report.summary(), f"The repaired model is in {out}.", sep="\n", soft_wrap=True, highlight=False)
