"""The commands for one stage of the method each, and what comes before: info, energies, solve, select, prune,
repair."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

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
from ..settings import flag, say, without_effect
from ..tables import ranges
from ..targets import OF_TIME, TargetSettings
from .app import (
    AsJson,
    Calibration,
    Data,
    Model,
    Out,
    OutFolder,
    Remove,
    app,
    load_samples,
    model_of,
    parse_goal,
    refuse_existing,
    show,
    show_json,
)
from .help import Command
from .options import Options, with_settings

POINTS = 10  # of a sweep
EnergiesFile = Annotated[Path, typer.Option("--energies", help="A file made by `blockspin energies`.")]


@app.command(cls=Command)
@with_settings
def info(
    model: Model,
    loading: Annotated[LoadingSettings, Options(without=("dtype", "device_map", "stream", "quantization"))],
    json: AsJson = False,
) -> None:
    """Show the blocks of a model, and what removing some would save. Reads no weights.

    Example: blockspin info MODEL
    """
    from ..overview import overview

    found = overview(model, trust_remote_code=loading.trust_remote_code)
    if json:
        show_json(found.as_json())
        return
    typer.echo(found.summary() + "\n")
    show(found.blocks_table())
    show(found.savings_table())


@app.command(cls=Command)
@with_settings
def profile(
    model: Model,
    loading: Annotated[LoadingSettings, Options(without=("quantization",))],
    out: Out = Path("profile.json"),
    units: Annotated[
        Literal["blocks", "sublayers"], typer.Option("--units", help="Time whole blocks, or attention and MLP apart.")
    ] = "blocks",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 1,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated for each.")] = 64,
    json: AsJson = False,
) -> None:
    """Measure how long each kind of block takes on this machine. For --target-speedup; about a minute.

    The table is plain JSON: one for another machine can be written by hand.

    Example: blockspin profile MODEL --out table.json, then blockspin compress MODEL --target-speedup 1.4 --profile
    table.json ...
    """
    from ..costs.timing import measure_times
    from ..evaluation.cost import Workload
    from ..model.loading import load_as

    with locked(out):
        refuse_existing(out)
        times = measure_times(load_as(model, loading), units, Workload(batch_size, length, new_tokens))
        times.save(out)
    if json:
        show_json(asdict(times))
        return
    show(times.table())
    console.print(f"Wrote {out}.", soft_wrap=True)


@app.command(cls=Command)
@app.command("gradients", cls=Command, hidden=True)
@with_settings
def energies(
    model: Model,
    calibration: Calibration,
    energy: EnergySettings,
    data: DataSettings,
    loading: LoadingSettings,
    targets: TargetSettings,
    out: Out = Path("energies.safetensors"),
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove",
            help="What they are for (8, 25%, moe=2); targets may say it too: `fitted` energies are more accurate for "
            "one goal than for all.",
            rich_help_panel="Run",
        ),
    ] = None,
) -> None:
    """Compute what predicts the loss without any set of blocks. `solve` and `select` read the file.

    Gradients for --energy fisher or empirical-fisher (the paper's); shortened models for the others.

    Example: blockspin energies MODEL --remove 8 --calibration teknium/OpenHermes-2.5 --out energies.safetensors
    """
    from ..costs.targets import goals_of, read_times
    from ..model.largest_batch import lowered_size
    from ..model.loading import check_quantization, load_as
    from ..model.tracing import find_units
    from ..pipeline.stages import energies_stage
    from ..problem import NOUNS

    goal, times = None if remove is None else parse_remove(remove), read_times(targets)
    check_quantization(model, loading)
    say([*energy.unused(), *targets.unused()])
    if energy.energy != "fitted":
        goals = {"--remove": remove is not None, **dict.fromkeys(map(flag, targets.targets), True)}
        say(without_effect(f"with --energy {energy.energy}", goals))
    with locked(out):
        refuse_existing(out)
        number = energy.samples_for(energy.energy)
        samples = load_samples(model, calibration, number, data, loading, "--calibration")
        metadata = {"model": model, "calibration": calibration}

        opened, budgets = load_as(model, loading), []
        say(lowered_size(energy.batch_size, samples, opened, backward=energy.keeps_activations))
        if targets.has_targets:
            remote = loading.trust_remote_code
            budgets = goals_of(targets, model, find_units(opened, energy.units), times, trust_remote_code=remote)
        result = energies_stage(energy, opened, samples, out, metadata, goal=goal, budgets=budgets)
    found = f"{len(result.blocks)} {NOUNS[energy.units]}"
    console.print(f"{energy.energy} of {len(samples)} samples, {found}: {out}", soft_wrap=True)


@app.command(cls=Command)
@with_settings
def solve(
    file: Annotated[Path, typer.Argument(help="A file made by `blockspin energies`.")],
    solving: SolvingSettings,
    targets: TargetSettings,
    remove: Remove = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the spectrum to this JSON file.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="States to print at most (default: all that are found).")
    ] = None,
    sweep: Annotated[
        Literal["params", "active-params", "size", "memory", "speedup", "prefill-speedup"] | None,
        typer.Option("--sweep", help="The least energy for every budget in this: a table, and with --out a figure."),
    ] = None,
    points: Annotated[int, typer.Option("--points", min=2, help="Budgets of a --sweep.")] = POINTS,
    json: AsJson = False,
) -> None:
    """Find the lowest-energy removals, and say what is proven of them. Also how they depend on the samples.

    Example: blockspin solve energies.safetensors --remove 8 --states 20 --out spectrum.json

    Example: blockspin solve energies.safetensors --target-memory 24GB --context 32k --batch 8 --target-params 6e9

    Example: blockspin solve energies.safetensors --sweep size --out front.json
    """
    if sweep is not None:
        of_states = {"--limit": limit is not None, "--states": solving.states != SolvingSettings.states}
        say(without_effect("with --sweep", of_states))
        _sweep(file, f"target_{sweep.replace('-', '_')}", remove, solving, targets, out, points, json)
        return
    from ..costs.targets import goals_of, goals_table, read_times, what_is_left
    from ..energies import load_energies
    from ..energies.robustness import robustness
    from ..pipeline.stages import find_states, pose_problem

    goal, found = parse_goal(remove, targets), load_energies(file)
    say(targets.unused())
    say(without_effect("without --sweep", {"--points": points != POINTS}))
    with locked(out):
        budgets = goals_of(targets, model_of(found), found.blocks, read_times(targets)) if targets.has_targets else []
        problem = pose_problem(found, goal, solving, budgets)
        spectrum = find_states(problem, solving)
        trust = robustness(found, problem, seed=solving.seed)
        if out is not None:
            spectrum.save(out)

    if json:
        shown = spectrum.as_json()
        shown["states"] = shown["states"][:limit]
        left = list(map(asdict, what_is_left(budgets, spectrum.states[0].removed)))
        show_json({**shown, "robustness": trust.as_json(), "goals": left})
        return
    typer.echo(spectrum.render(limit=limit, width=terminal_width()))
    typer.echo(trust.summary())
    if budgets:
        show(goals_table(what_is_left(budgets, spectrum.states[0].removed)))


def _sweep(
    file: Path,
    counted: str,
    remove: str | None,
    solving: SolvingSettings,
    targets: TargetSettings,
    out: Path | None,
    points: int,
    json: bool,
) -> None:
    """What `solve --sweep` does. counted: the setting of the target that is swept."""
    from ..costs.targets import NO_TIMES, goals_of, quantity_of, read_times
    from ..energies import load_energies
    from ..pipeline.front import front_json, front_table, pareto_front, write_front

    found, times = load_energies(file), read_times(targets)
    if times is None and counted in OF_TIME:
        raise ValueError(f"--sweep of times needs a table: {NO_TIMES}")
    if out is not None and out.suffix == ".svg":
        raise ValueError(
            f"--out {out} is the name of the figure; give that of the JSON file ({out.with_suffix('.json')})"
        )
    model = model_of(found)
    say(targets.unused(given=[counted]))
    with locked(out):
        budgets = goals_of(targets, model, found.blocks, times)
        swept = quantity_of(counted, targets, model, found.blocks, times)
        goal = None if remove is None else parse_remove(remove)
        front = pareto_front(found, goal, solving, budgets, swept, points)
        picture = None if out is None else write_front(front, swept, out)

    if json:
        show_json(front_json(front, swept))
        return
    show(front_table(front, swept))
    if picture is not None:
        console.print(f"Wrote {out} and the figure {picture}.", soft_wrap=True)


@app.command(cls=Command)
@with_settings
def select(
    model: Model,
    energies: EnergiesFile,
    data: Data,
    solving: SolvingSettings,
    targets: TargetSettings,
    choosing: Annotated[ChoosingSettings, Options(renamed={"selection_samples": "num_samples"})],
    drawing: DataSettings,
    loading: LoadingSettings,
    remove: Remove = None,
    out: Out = Path("candidates.json"),
    json: AsJson = False,
) -> None:
    """Choose a removal by measuring low-energy ones on held-out text. They race, and the winner is polished.

    Prints what was tried; the last line is the chosen blocks, as `blockspin prune --blocks` takes them.

    Example: blockspin select MODEL --energies energies.safetensors --remove 8 --data teknium/OpenHermes-2.5
    """
    from ..costs.targets import goals_of, read_times
    from ..energies import load_energies
    from ..model.largest_batch import lowered_size
    from ..model.loading import check_quantization, load_as, load_config
    from ..pipeline.stages import check_same_units, find_states, pose_problem, selection_stage
    from ..selection.select import select_with_energies
    from ..surgery.feasible import Removable, protect_what_must_stay

    check_quantization(model, loading)
    say(targets.unused())
    with locked(out):
        refuse_existing(out)
        goal, found = parse_goal(remove, targets), load_energies(energies)
        remote = loading.trust_remote_code
        model_config = load_config(model, trust_remote_code=remote)
        removable = Removable(model_config, found.blocks, trust_remote_code=remote)
        budgets = goals_of(targets, model, found.blocks, read_times(targets), trust_remote_code=remote)
        problem = protect_what_must_stay(pose_problem(found, goal, solving, budgets), removable)

        number = choosing.selection_samples  # and as many for repairs
        drawn = load_samples(model, data, (1 + choosing.choose_repaired) * number, drawing, loading)
        samples, opened = drawn[:number], load_as(model, loading)
        say(lowered_size(choosing.batch_size, samples, opened))
        check_same_units(found, opened)

        spectrum = find_states(problem, solving)
        choose = functools.partial(
            select_with_energies, opened, found, problem, spectrum, samples, samples, removable, choosing
        )
        selection = selection_stage(lambda partial: choose(repair_samples=drawn[number:], partial=partial), out)
    console.print(f"Wrote {out}.", soft_wrap=True)
    if json:
        show_json(selection.as_json())
    else:
        typer.echo(ranges(selection.chosen.removed))


@app.command(cls=Command)
@with_settings
def prune(
    model: Model,
    blocks: Annotated[str, typer.Option("--blocks", help="The blocks, or sub-layers, to remove: 3-6,9,15.")],
    out: OutFolder,
    loading: Annotated[LoadingSettings, Options(without=("dtype", "device_map", "stream", "quantization"))],
    units: Annotated[
        Units, typer.Option("--units", help="What the numbers stand for: blocks or sublayers.")
    ] = "blocks",
) -> None:
    """Write a checkpoint without some blocks or sub-layers. Shard by shard; for sub-layers the model is loaded.

    Example: blockspin prune MODEL --blocks 3-6,9,15 --out smaller

    Example: blockspin prune MODEL --units sublayers --blocks 13,17,20-22 --out smaller
    """
    from ..surgery.checkpoint import prune_checkpoint
    from ..surgery.sublayer_checkpoint import prune_sublayers

    remove = prune_checkpoint if units == "blocks" else prune_sublayers
    remove(model, parse_indices(blocks), out, trust_remote_code=loading.trust_remote_code)
    console.print(f"The smaller model is in {out}.", soft_wrap=True)


@app.command(cls=Command)
@with_settings
def repair(
    shortened: Annotated[str, typer.Argument(help="The shortened model: a folder that `blockspin prune` made.")],
    original: Annotated[str, typer.Option("--original", help="The model it was made of: hub id or local folder.")],
    data: Data,
    out: OutFolder,
    drawing: DataSettings,
    batches: BatchSettings,
    loading: Annotated[LoadingSettings, Options(without=("quantization",))],
    num_samples: Annotated[int, typer.Option("--num-samples", help="Samples of the text.")] = 128,
    own_text: Annotated[
        float | None,
        typer.Option(
            "--own-text",
            min=0,
            max=0.9,
            help="Share of all text that the original writes itself (default: a third, where it can).",
        ),
    ] = None,
) -> None:
    """Repair a shortened model in closed form. Linear maps get new weights, with which it follows the original.

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
        own_text_share=own_text,
        trust_remote_code=loading.trust_remote_code,
        data=data,
        split=drawing.split,
    )
    console.print(report.summary(), f"The repaired model is in {out}.", sep="\n", soft_wrap=True, highlight=False)
