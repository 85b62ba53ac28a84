"""The application, and what several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..config import DataSettings, LoadingSettings
from ..progress import terminal_width
from ..tables import Table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

app = typer.Typer(
    name="blockspin",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress language models by removing whole transformer blocks, chosen by constrained binary optimisation. "
    "Start with `blockspin demo`; for your own model use `blockspin compress`.",
)

Model = Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file of a causal language model.")]
Data = Annotated[str, typer.Option("--data", help="Hub id or local file (.json, .jsonl, .parquet, .txt, also .gz).")]
Calibration = Annotated[
    str, typer.Option("--calibration", help="Text the energy is computed on: hub id or local file.")
]
Remove = Annotated[
    str,
    typer.Option("--remove", help="What to remove: 8 blocks, moe=2 for each kind, or 25% of the blocks' parameters."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder or file for the result.")]
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


def load_samples(model: str, data: str, number: int, how: DataSettings, loading: LoadingSettings) -> list[Tensor]:
    """Samples of a text as the tokenizer of a model has it."""
    from ..data.calibration import load_calibration
    from ..model.loading import load_config, load_tokenizer, vocabulary_size

    config = load_config(model, trust_remote_code=loading.trust_remote_code)
    return load_calibration(
        data,
        load_tokenizer(model, trust_remote_code=loading.trust_remote_code),
        num_samples=number,
        max_length=how.max_length,
        seed=how.seed,
        split=how.split,
        vocabulary=vocabulary_size(config),
    )


def open_model(name: str, loading: LoadingSettings) -> PreTrainedModel:
    """The model as the settings say."""
    from ..model.loading import load_model

    return load_model(name, dtype=loading.dtype, device_map=loading.place, trust_remote_code=loading.trust_remote_code)


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
