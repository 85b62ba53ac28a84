"""The commands about the quality of models: evaluate, distill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import CompressConfig, DataSettings, EvaluateConfig
from ..lock import locked
from ..processes import from_main
from ..progress import console
from ..settings import say, unused_split, without_effect
from ..training import DistillConfig
from .app import AsJson, OutFolder, SettingsFile, app, load_samples, show, show_json
from .help import Command
from .options import Given, with_settings

if TYPE_CHECKING:
    from ..evaluation.cost import Workload

NUM_SAMPLES = CompressConfig.evaluation_samples
WINDOW = 2048  # tokens of a window of a text
LENGTH, NEW_TOKENS = 512, 64  # tokens of a prompt that is timed, and after it

Models = Annotated[list[str], typer.Argument(help="Hub ids, local folders or GGUF files; the first is the reference.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Perplexity of a whole text: wikitext2 or a text file; may be repeated.", metavar="<str>"
    ),
]
ResultFile = Annotated[
    Path | None, typer.Option("--out", help="Write the results to this JSON file, and tables to .md beside it.")
]


@app.command(cls=Command)
@with_settings
def evaluate(
    models: Models,
    settings: Given[EvaluateConfig],
    drawing: DataSettings,
    data: Annotated[
        str | None, typer.Option("--data", help="Perplexity and speed on samples of it: hub id or local file.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="Samples of --data.")] = NUM_SAMPLES,
    text: Texts = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of a window of --text.")] = WINDOW,
    cost: Annotated[
        bool,
        typer.Option("--cost", help="Size, cache, memory, and times of prefill and decoding; the models take turns."),
    ] = False,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a prompt of --cost.")] = LENGTH,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated in --cost.")] = NEW_TOKENS,
    print_nemo_skills: Annotated[
        bool, typer.Option("--print-nemo-skills", help="Only print the commands of NeMo-Skills for the same tasks.")
    ] = False,
    out: ResultFile = None,
    json: AsJson = False,
) -> None:
    """Show scores, perplexity, size and speed of models side by side.

    Without --data, --text or --cost the models are scored on --tasks, by default those of the paper. The same command
    again continues with the next task, or shows the results at once.

    Example: blockspin evaluate MODEL MODEL-without-8-blocks --tasks mmlu,gsm8k --text wikitext2 --cost
    """
    from ..evaluation.cost import Workload
    from ..evaluation.nemo_skills import commands
    from ..evaluation.side_by_side import evaluate_side_by_side, no_table

    config = EvaluateConfig(**settings.values)
    if print_nemo_skills:
        typer.echo(commands(models, config))
        return

    scored = not settings.values.keys().isdisjoint(("tasks", "rollouts")) or not (data or text or cost)
    batch_size = 1 if config.batch_size == "auto" else int(config.batch_size)
    workload = Workload(batch_size, length, new_tokens)
    asked = {"--tasks": scored, "--data": data, "--text": text, "--cost": cost}
    _say_unused(config, drawing, workload, num_samples, window, asked)

    _check_quantization(models, config)
    with locked(out):
        result = evaluate_side_by_side(
            models,
            config,
            tasks=scored,
            samples=load_samples(models[0], data, num_samples, drawing, config) if data else (),
            texts=text or (),
            window=window,
            cost=workload if cost else None,
            show=no_table if json else show,
        )
        if out is not None:
            from_main(lambda: result.save(out))
    if json:
        show_json(result.as_json())


def _say_unused(
    config: EvaluateConfig,
    drawing: DataSettings,
    workload: Workload,
    num_samples: int,
    window: int,
    asked: Mapping[str, object],
) -> None:
    """Name the options that have no effect. asked: --tasks, --data, --text and --cost -> whether it is measured."""
    changed = {
        "--data": {
            "--num-samples": num_samples != NUM_SAMPLES,
            "--max-length": drawing.max_length != DataSettings.max_length,
            "--split": drawing.split != DataSettings.split,
        },
        "--text": {"--window": window != WINDOW},
        "--cost": {"--length": workload.length != LENGTH, "--new-tokens": workload.new_tokens != NEW_TOKENS},
    }
    say(config.unused(missing=[] if asked["--tasks"] else ["tasks"]))
    for option, given in changed.items():
        if not asked[option]:
            say(without_effect(f"without {option}", given))


def _check_quantization(models: list[str], config: EvaluateConfig) -> None:
    """Refuse models that cannot be quantised as they are loaded, before anything else is read."""
    from ..model.loading import check_quantization

    for model in models:
        check_quantization(model, config)


@app.command(cls=Command)
@with_settings
def distill(
    student: Annotated[str, typer.Argument(help="The shortened model: a folder that `blockspin prune` made.")],
    out: OutFolder,
    settings: Given[DistillConfig],
    config: SettingsFile = None,
) -> None:
    """Train a shortened model with the original as its teacher.

    Run the same command again to continue a run that was cut off. On several GPUs start it with accelerate:
    accelerate launch --num-processes 4 -m blockspin distill ...

    Example: blockspin distill smaller --teacher MODEL --data teknium/OpenHermes-2.5 --out retrained
    """
    from ..distillation.run import distill_checkpoint

    checked = DistillConfig(**settings.over(config))
    if checked.data is not None:
        say(unused_split(checked.split, checked.data))
    result = distill_checkpoint(student, out, checked)
    console.print(
        f"Perplexity {result.before['perplexity']:.2f} before, {result.after['perplexity']:.2f} after {result.steps} "
        f"steps, on the validation samples. Wrote {out}.",
        soft_wrap=True,
    )
