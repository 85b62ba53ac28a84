"""Command-line options made from the fields of the settings, so that a flag, its default and its help are said once."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from .config import CompressConfig

Command = Callable[..., None]


def with_settings(
    *names: str, of: type = CompressConfig, within: str = "", **renamed: str
) -> Callable[[Command], Command]:
    """Give a command an option for each of these settings; it receives those that were given as keyword arguments.

    names: fields of the settings `of`. renamed: option=field, where the option has another name than the field.
    within: hand them over as one dictionary of this name, so that settings of two kinds do not mix.
    """
    wanted = {**{name: name for name in names}, **renamed}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in wanted}
            parsed = {wanted[name]: _parsed(name, of, wanted[name], v) for name, v in given.items() if v is not None}
            command(**arguments, **({within: parsed} if within else parsed))

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        options = [_option(name, of, wanted[name], within) for name in wanted]
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        return run

    return decorate


def complete(given: dict[str, Any], of: type = CompressConfig) -> SimpleNamespace:
    """The given settings, and the defaults of the others that have one."""
    return SimpleNamespace(**{f.name: f.default for f in fields(of) if f.default is not MISSING} | given)


def _field(of: type, name: str) -> Field[Any]:
    return next(f for f in fields(of) if f.name == name)


def _option(name: str, of: type, setting: str, panel: str) -> inspect.Parameter:
    """The option as a parameter that typer understands; None means that it was not given."""
    found = _field(of, setting)
    shown = "" if found.default in (MISSING, None, (), False) else f" (default: {found.default})"
    flag, help = f"--{name.replace('_', '-')}", found.metadata["help"] + shown
    option = typer.Option(flag, help=help, show_default=False, rich_help_panel=panel.capitalize() or None)
    kind: Any = str if found.metadata["parse"] else typing.get_type_hints(of)[setting]
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parsed(option: str, of: type, setting: str, value: Any) -> Any:
    parse = _field(of, setting).metadata["parse"]
    try:
        return parse(value) if parse else value
    except ValueError as error:
        flag = f"--{option.replace('_', '-')}"
        raise ValueError(str(error) if flag in str(error) else f"{flag}: {error}") from None
