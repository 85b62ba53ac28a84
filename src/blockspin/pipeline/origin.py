"""What reports say of a run without naming folders of a machine: models, data, samples, options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..config import CompressConfig
from ..demo import MODEL
from ..problem import Goal
from ..settings import Settings, flag
from ..sources import public_name
from ..targets import TARGETS
from .stages import Samples

_ARGUMENTS = ("model", "remove", "distill")  # what no option of its own says, or another
_SOURCES = ("model", "calibration", "evaluation", "data", "profile", "include_path", "cache_teacher")  # maybe paths


def model_title(source: str) -> str:
    """What a page calls a model in its sentences."""
    return "the embedded model" if source == MODEL else public_name(source)


def describe_samples(samples: Samples) -> dict[str, str]:
    """How much text each set has, by heading."""
    described = {}
    for name in ("calibration", "selection", "evaluation"):
        own = getattr(samples, name)
        described[f"{name} text"] = f"{len(own):,} samples, {sum(map(len, own)):,} tokens"
    return described


def command_options(settings: Mapping[str, Any], kind: type[Settings] = CompressConfig, prefix: str = "") -> str:
    """The options that differ from the defaults of `kind`, as they are typed. prefix: of their names."""
    defaults = {found.name: found.default for found in fields(kind)}
    words = []
    for name, value in settings.items():
        if name in _ARGUMENTS or value in (None, [], ()) or value == defaults.get(name):
            continue
        option = flag(prefix + name)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif name in TARGETS:  # bytes and parameters in full, not as 5e+09
            words.append(f"{option} {value:.12g}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"{option} {shlex.quote(text)}")
    return " ".join(words)


def goal_text(goal: Goal | None) -> str:
    """A goal as the option --remove; nothing where targets decide."""
    if goal is None:
        return ""
    return f"--remove {_as_typed(goal)}"


def goals_text(goals: Sequence[Goal | None]) -> str:
    """Several goals as --remove: numbers and shares in one, numbers by kind in one each."""
    together = [_as_typed(goal) for goal in goals if goal is not None and not isinstance(goal, dict)]
    options = [f"--remove {','.join(together)}"] if together else []
    options += [goal_text(goal) for goal in goals if isinstance(goal, dict)]
    return " ".join(options)


def _as_typed(goal: Goal) -> str:
    if isinstance(goal, dict):
        return ",".join(f"{kind}={number}" for kind, number in goal.items())
    return f"{100 * goal:g}%" if isinstance(goal, float) else str(goal)


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say something, without the folders of models and data. Lists, not tuples, as YAML has them."""
    shown = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):  # of a training, or numbers of blocks by kind
            value = public_settings(value)
        if value not in (None, [], "", {}):
            shown[name] = public_name(value) if name in _SOURCES else value
    return shown
