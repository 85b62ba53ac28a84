"""The command that makes text to calibrate on: write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import LoadingSettings
from ..lock import locked
from ..progress import console
from .app import Model, Out, app, refuse_existing
from .help import Command
from .options import Options, with_settings


@app.command(cls=Command)
@with_settings
def write(
    model: Model,
    loading: Annotated[LoadingSettings, Options(without=("stream",))],
    out: Out = Path("own.jsonl"),
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens in all, at least.")] = 65_536,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens of a text at most.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides what is drawn.")] = 42,
) -> None:
    """Let a model write text, to calibrate on. It is of all the kinds that the model knows; mix it with text of yours.

    Run the same command again to continue one that was cut off.

    Example: blockspin write MODEL --out own.jsonl, then blockspin compress MODEL --calibration
    conversations.jsonl,own.jsonl ...
    """
    from ..model.generation import check_generates
    from ..model.loading import check_quantization, load_as, load_tokenizer
    from ..model.offload import check_in_memory
    from ..model.own_text import write_own_text

    check_quantization(model, loading)
    with locked(out):
        refuse_existing(out)
        tokenizer = load_tokenizer(model, trust_remote_code=loading.trust_remote_code)
        opened = load_as(model, loading)
        check_in_memory(opened, "text that a model writes itself")
        check_generates(opened, "calibrate on texts or conversations of others")
        rows = write_own_text(opened, tokenizer, out, tokens, max_length, seed)
    console.print(f"{rows:,} texts: {out}", soft_wrap=True, highlight=False)
