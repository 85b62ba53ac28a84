"""Command-line options made from the fields of the settings, so that a flag, its default and its help are said once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer

from ..progress import set_messages
from ..settings import Rule, SettingError, Settings, flag, types_of

S = TypeVar("S", bound=Settings)

_MESSAGES = {
    "quiet": "No bars and no messages; results and errors only.",
    "verbose": "Also the messages of other packages, and where an error came from.",
}


@dataclass(frozen=True)
class Options:
    """How the settings of a parameter become options: all but `without`, some `renamed` (setting -> option name)."""

    without: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True)
class Given(Generic[S]):
    """The settings that were given as options; a file or the defaults have the others."""

    kind: type[S]
    values: dict[str, Any]

    def over(self, file: Path | None) -> dict[str, Any]:
        """The settings in a YAML file, replaced by those given."""
        return {**(self.kind.read(file) if file else {}), **self.values}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter of a settings class becomes options, one for each setting.

    A parameter `settings: DataSettings` receives the whole settings; `settings: Given[DataSettings]` only those that
    were given. `Annotated[DataSettings, Options(...)]` leaves some out, or calls them otherwise. Where two parameters
    have a setting of the same name, one option is for both. Every command gets --quiet and --verbose as well.
    """
    own: list[inspect.Parameter] = []
    groups: dict[str, _Group] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = _Group.of(parameter.annotation)
        if group is None:
            own.append(parameter)
        else:
            groups[parameter.name] = group

    made: dict[str, inspect.Parameter] = {}
    for group in groups.values():
        for option, found in group.settings.items():
            made.setdefault(option, _option(option, group.kind, found))

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        settings = {}
        for name, group in groups.items():
            settings[name] = group.read(arguments)
        for option in made:
            del arguments[option]
        set_messages(**{name: arguments.pop(name) for name in _MESSAGES})
        command(**arguments, **settings)

    # Typer reads the signature and the annotations.
    signature = inspect.Signature([*own, *made.values(), *map(_message_option, _MESSAGES)])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return run


@dataclass(frozen=True)
class _Group:
    """The settings of one parameter of a command. settings: option name -> field."""

    kind: type[Settings]
    partial: bool
    settings: dict[str, Field[Any]]

    @staticmethod
    def of(annotation: Any) -> _Group | None:
        """The group that an annotation asks for; None where it is no settings class."""
        options = Options()
        if get_origin(annotation) is Annotated:
            annotation, extra, *_ = get_args(annotation)
            options = extra if isinstance(extra, Options) else options

        partial = get_origin(annotation) is Given
        kind = get_args(annotation)[0] if partial else annotation
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            return None

        # Its own settings come before those of the groups that it is made of.
        settings = {}
        for found in sorted(fields(kind), key=lambda found: _panel(kind, found.name) != kind.panel):
            if "rule" in found.metadata and found.name not in options.without:
                settings[options.prefix + options.renamed.get(found.name, found.name)] = found
        return _Group(kind, partial, settings)

    def read(self, given: Mapping[str, Any]) -> Any:
        """The settings, or those of them that were given. Raises ValueError naming the option that is wrong."""
        values, option_of = {}, {}
        for option, found in self.settings.items():
            option_of[found.name] = option
            if given[option] is not None:
                values[found.name] = _parsed(option, found, given[option])

        if self.partial:
            return Given(self.kind, values)
        try:
            return self.kind(**values)
        except SettingError as error:
            raise SettingError(option_of[error.setting], error.problem) from None


def _option(name: str, kind: type[Settings], found: Field[Any]) -> inspect.Parameter:
    """The option as a parameter that typer understands; None means that it was not given."""
    rule: Rule = found.metadata["rule"]
    declared = types_of(kind)[found.name]
    without_default = found.default in (MISSING, None, ()) or found.default is False  # which 0.0 equals
    shown = "" if without_default else f"  [default: {'on' if found.default is True else found.default}]"
    required = " Required, here or in --config." if found.default is MISSING else ""

    # A switch that is on in a file can be turned off.
    flags = f"{flag(name)}/--no-{flag(name)[2:]}" if declared is bool else flag(name)
    names = [flags, flag(rule.old_name)] if rule.old_name else [flags]
    panel = _panel(kind, found.name)
    option = typer.Option(*names, help=rule.help + shown + required, show_default=False, rich_help_panel=panel)

    taken: Any = str if rule.parse else declared
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken | None, option]
    )


def _message_option(name: str) -> inspect.Parameter:
    """A switch for what is said on standard error."""
    option = typer.Option(flag(name), help=_MESSAGES[name], rich_help_panel="Messages")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _panel(kind: type[Settings], name: str) -> str:
    """The heading of the group that declares a setting first."""
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings) and name in inspect.get_annotations(base):
            return base.panel
    raise AssertionError(f"{kind.__name__} has no setting {name}")


def _parsed(option: str, found: Field[Any], value: Any) -> Any:
    parse = found.metadata["rule"].parse
    try:
        return parse(value) if parse else value
    except ValueError as error:
        raise ValueError(str(error) if flag(option) in str(error) else f"{flag(option)}: {error}") from None
