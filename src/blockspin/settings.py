"""What dataclasses of settings share: types and limits that are checked, help texts, and YAML in and out."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .files import replacing
from .progress import console
from .sources import sources_of

SPLIT = "train"  # of a dataset, by default

# What a type is called in messages.
_CALLED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    dict: "a mapping",
}


# The limits of a number: its name in `Rule`, in messages, and what must hold.
_LIMITS = (
    ("least", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
    ("below", "below", operator.lt),
)


class SettingError(ValueError):
    """A setting has a value that it cannot have. The message names its option."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{flag(setting)} {problem}")
        self.setting, self.problem = setting, problem


@dataclass(frozen=True)
class Rule:
    """What is known of a setting besides its type and default.

    help: of its command-line option. parse: reads text, where the option is not a plain value.
    least, most: the limits of a number; above, below: limits that it must not reach. choices: the values of a text.
    old_name: an option of this name means the same.
    needs: settings without any of which this one changes nothing.
    """

    help: str
    parse: Callable[[str], Any] | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    old_name: str | None = None
    needs: tuple[str, ...] = ()

    def problem(self, value: float | str) -> str | None:
        """What is wrong with a value of the right type; None where nothing is."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}, not {value!r}"
        if isinstance(value, str):
            return None

        # The limits are said together, so that the second try is right.
        limits, all_hold = [], True
        for name, words, holds in _LIMITS:
            limit = getattr(self, name)
            if limit is not None:
                limits.append("positive" if (name, limit) == ("above", 0) else f"{words} {limit}")
                all_hold = all_hold and holds(value, limit)
        return None if all_hold else f"must be {' and '.join(limits)}, not {value}"


def setting(help: str, default: Any = MISSING, **rule: Any) -> Any:
    """A field of a dataclass of settings. rule: see `Rule`."""
    return field(default=default, metadata={"rule": Rule(help, **rule)})


def parse_names(text: str) -> tuple[str, ...]:
    """ "mmlu,gsm8k" as names."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def flag(setting: str) -> str:
    """The option of a setting: --max-length."""
    return f"--{setting.replace('_', '-')}"


def without_effect(when: str, given: Mapping[str, bool]) -> list[str]:
    """The note that options have no effect; none where none of them was given.

    when: "without --repair". given: option -> whether it was given.
    """
    options = [option for option, was_given in given.items() if was_given]
    if not options:
        return []
    listed = " and ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
    return [f"Note: {when}, {listed} {'changes' if len(options) == 1 else 'change'} nothing."]


def unused_split(split: str, *sources: str | None) -> list[str]:
    """The note that --split has no effect: it is of hub datasets and folders, and all sources are single files.

    sources: texts as options name them; None: not given.
    """
    names = [name for source in sources if source is not None for name in sources_of(source)]
    of_files = all(Path(name).is_file() for name in names)
    return without_effect("with a local file as the text", {"--split": of_files and split != SPLIT})


def say(notes: Iterable[str]) -> None:
    """Each note on a line of its own."""
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Settings:
    """What the dataclasses of settings inherit.

    Every value is checked against its declared type and its `Rule` when an object is made, wherever it comes from. Text
    is accepted where the option takes text ("25%"), and a whole number where a number is wanted.

    Raises SettingError where a value is refused.
    """

    panel: ClassVar[str] = "Options"  # the heading of their options in --help

    def __post_init__(self) -> None:
        kinds = types_of(type(self))
        for found in fields(self):
            if "rule" in found.metadata:
                value = _checked(found.name, kinds[found.name], found.metadata["rule"], getattr(self, found.name))
                object.__setattr__(self, found.name, value)

    def unused(self, given: Collection[str] = (), missing: Collection[str] = ()) -> list[str]:
        """A note for each group of settings that were changed and have no effect, as what they need is not there.

        given, missing: settings that count as there, and as not there, whatever they are.
        """
        groups: dict[tuple[str, ...], dict[str, bool]] = {}  # what is needed -> option -> whether it was given
        for found in fields(self):
            needs = found.metadata["rule"].needs if "rule" in found.metadata else ()
            has_one = any(name in given or (getattr(self, name) and name not in missing) for name in needs)
            if needs and not has_one:
                groups.setdefault(needs, {})[flag(found.name)] = getattr(self, found.name) != found.default

        notes = []
        for needs, options in groups.items():
            notes += without_effect(f"without {' or '.join(map(flag, needs))}", options)
        return notes

    def save(self, path: str | Path) -> None:
        """Write YAML, what has no default first. Raises ValueError where the file cannot be written."""
        values, ordered = asdict(self), {}
        for found in sorted(fields(self), key=lambda found: found.default is not MISSING):
            ordered[found.name] = values[found.name]
        with replacing(path) as temporary:
            temporary.write_text(
                yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """The settings in a YAML file, which may leave some out.

        Raises:
            ValueError: the file is missing, not YAML, or names unknown settings.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(f"cannot read the settings {path}: {reason} (--config)") from error
        return cls.known({} if values is None else values, str(path))

    @classmethod
    def known(cls, values: Any, where: str) -> dict[str, Any]:
        """`values`, if it is a mapping that names settings only.

        Raises:
            ValueError: it is not.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{where} has no settings; write one in a line: name: value")

        names = list(cls.__dataclass_fields__)
        unknown = sorted(set(map(str, values)) - set(names))
        if unknown:
            raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}; known are {', '.join(names)}")
        return values


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everywhere else; by its standard of 2005 it is text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """YAML in which tuples are lists."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def types_of(cls: type[Settings]) -> dict[str, Any]:
    """The declared types of the settings by name."""
    return get_type_hints(cls)


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`: nothing stands for anything else, but whole numbers for numbers."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is float:
        return type(value) in (int, float) and math.isfinite(value)
    if type(value) is not origin:
        return False

    if origin is dict:
        return all(fits(key, parts[0]) and fits(entry, parts[1]) for key, entry in value.items())
    if origin is tuple and parts[-1] is Ellipsis:
        return all(fits(entry, parts[0]) for entry in value)
    if origin is tuple:
        return len(value) == len(parts) and all(map(fits, value, parts))
    return True


def _checked(name: str, kind: Any, rule: Rule, value: Any) -> Any:
    """The value as the settings hold it. Raises SettingError."""
    if rule.parse is not None and isinstance(value, str):
        value = rule.parse(value)
    value = str(value) if isinstance(value, Path) else _without_lists(value)

    if not fits(value, kind):
        # What YAML would read without the quotes shows whether they are the mistake.
        quoted = isinstance(value, str) and fits(yaml.load(value, Loader=_Loader), kind)
        remedy = "; leave out the quotes" if quoted else ""
        raise SettingError(name, f"must be {_called(kind, rule)}, not {value!r}{remedy}")

    problem = rule.problem(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    if problem is not None:
        raise SettingError(name, problem)
    return value


def _without_lists(value: Any) -> Any:
    """Lists as tuples, inside too: settings can be compared and do not change."""
    return tuple(map(_without_lists, value)) if isinstance(value, (list, tuple)) else value


def _called(kind: Any, rule: Rule) -> str:
    """What a type is called: "a whole number or null"."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_called(part, rule) for part in parts)
    if rule.choices and origin is str:
        return f"one of {', '.join(rule.choices)}"
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        inside = _called(parts[0], rule)
        return f"a list, each {inside}"
    return _CALLED[origin]
