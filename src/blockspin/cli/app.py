"""The application, and what several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..config import DataSettings, LoadingSettings, parse_remove
from ..problem import Goal
from ..progress import terminal_width
from ..settings import say, unused_split
from ..tables import Table
from ..targets import NO_GOAL, TargetSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ..energies import Energies

app = typer.Typer(
    name="blockspin",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut the names of options short
    context_settings={"max_content_width": 120},
    help="Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation. "
    "Start with `blockspin demo`; for your own model use `blockspin compress`.",
)

Model = Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file of a causal language model.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Texts or conversations: hub id or local file (.jsonl, .json, .parquet, .csv, .txt, also .gz or .xz); "
        "a,b mixes two.",
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text the energy is computed on: hub id, or local file of texts or conversations; a,b mixes two.",
        rich_help_panel="Run",
    ),
]
Remove = Annotated[
    str | None,
    typer.Option(
        "--remove",
        help="What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters; targets may decide "
        "instead.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="File for the result.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
SettingsFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings; options given here win.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockspin {__version__}")
        raise typer.Exit


@app.callback()
def blockspin(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The options of the command without a subcommand."""


def parse_goal(remove: str | None, targets: TargetSettings) -> Goal | None:
    """What --remove says; None where targets decide. Raises ValueError where nothing does."""
    if remove is not None:
        return parse_remove(remove)
    if not targets.has_targets:
        raise ValueError(NO_GOAL)
    return None


def model_of(energies: Energies) -> str:
    """The model that energies were computed of. Raises ValueError where the file does not say."""
    model = energies.metadata.get("model", "")
    if not model:
        raise ValueError("the energies do not say of which model they are; compute them with `blockspin energies`")
    return model


def load_samples(
    model: str, data: str, number: int, how: DataSettings, loading: LoadingSettings, option: str = "--data"
) -> list[Tensor]:
    """Samples of a text as the tokenizer of a model has it. option: that names the text."""
    from ..data.calibration import load_calibration
    from ..model.loading import load_config, load_tokenizer, vocabulary_size

    say(unused_split(how.split, data))
    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    return load_calibration(
        data,
        load_tokenizer(model, trust_remote_code=loading.trust_remote_code),
        num_samples=number,
        max_length=how.max_length,
        seed=how.seed,
        split=how.split,
        vocabulary=vocabulary_size(config),
        option=option,
    )


def refuse_existing(out: Path) -> None:
    """Raise ValueError where the output exists already."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file (--out)")


def show_json(value: Any) -> None:
    """A result as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2))


def show(table: Table) -> None:
    """A table on standard output."""
    typer.echo(table.text(terminal_width()) + "\n")
