"""How long each kind of unit takes on a machine: measured once, by leaving half of them out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from ..evaluation.cost import Workload, check_workload, random_prompt, rounds_of_steps
from ..files import write_json
from ..machine import describe_machine
from ..model.loading import context_length
from ..model.offload import is_offloaded
from ..model.tracing import find_units
from ..problem import Block, Floats, Removal, Units, units_of
from ..progress import logger, track
from ..surgery.memory import remove_blocks
from ..tables import Column, Table

ROUNDS = 24  # at most, in which the whole model and those without some units take turns
LEAST_ROUNDS = 6  # before the times may count as steady
STEADY = 0.01  # the halves of the rounds agree to so much of the times
ROUNDING = 1e-6  # by such a share sums of times are off at most
WHOLE = "whole model"
_MACHINE = ("processor", "GPU")  # headings that tell machines apart


class Seconds(NamedTuple):
    """Of the prefill of a workload, and of decoding its new tokens."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class TimeTable:
    """Times of a model on a machine.

    whole: of the whole model. kinds: what one unit of each kind adds to that.
    units: blocks or sub-layers. about: the machine and the date, by heading.
    spread: how far apart the halves of the rounds were, as a share of the times (`_quiet_seconds`); None: not known.
    """

    whole: Seconds
    kinds: dict[str, Seconds]
    units: Units
    workload: Workload
    dtype: str
    device: str
    about: dict[str, str]
    spread: float | None = None

    def without(self, units: Sequence[Block], removed: Removal) -> Seconds:
        """The times that the model is expected to have without some of its units."""
        gone = [self.kinds[units[i].kind] for i in removed]
        prefill, decode = sum(one.prefill for one in gone), sum(one.decode for one in gone)
        return Seconds(self.whole.prefill - prefill, self.whole.decode - decode)

    def is_of_this_machine(self, device: str) -> bool:
        """Whether it was measured on this machine, with a model on such a device."""
        here = describe_machine()
        return self.device == device and all(self.about.get(name) == here.get(name) for name in _MACHINE)

    def table(self) -> Table:
        """Milliseconds of the whole model and of a unit of each kind."""
        rows = []
        for name, seconds in [(WHOLE, self.whole), *self.kinds.items()]:
            share = seconds.decode / self.whole.decode
            rows.append([name, f"{1e3 * seconds.prefill:.4g}", f"{1e3 * seconds.decode:.4g}", f"{share:.1%}"])
        columns = [Column("kind", words=True), Column("prefill, ms"), Column("decode, ms"), Column("of decode")]
        work = self.workload
        caption = (
            f"batch {work.batch_size}, {work.length} tokens in, {work.new_tokens} out, {self.dtype}, {self.device}"
        )
        if self.spread is not None:
            caption += f"; measured twice, times differ by {self.spread:.1%}"
        return Table(columns, rows, caption=caption)

    def save(self, path: str | Path) -> None:
        """Write as JSON. Raises ValueError if the file cannot be written."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> TimeTable:
        """Read what save wrote, or what was written by hand. Raises ValueError if the file is no such table."""
        try:
            values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            values["whole"] = _seconds(values["whole"])
            values["kinds"] = {kind: _seconds(pair) for kind, pair in values["kinds"].items()}
            _check_seconds(values["whole"], values["kinds"])
            return cls(**values | {"workload": Workload(**values["workload"])})
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); make it with blockspin profile") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of times ({error}); make it with blockspin profile") from None


def _seconds(pair: Sequence[float]) -> Seconds:
    """A pair of times in a file. Raises ValueError where one is no time."""
    prefill, decode = map(float, pair)
    if not (prefill >= 0 and decode >= 0):
        raise ValueError(f"{pair} are no times")
    return Seconds(prefill, decode)


def _check_seconds(whole: Seconds, kinds: Mapping[str, Seconds]) -> None:
    """Refuse times that say nothing. Only a kind of which no unit could be left out takes none.

    Raises:
        ValueError: the whole model takes no time, or no kind of unit does, or one is not finite.
    """
    if not all(math.isfinite(seconds) for pair in (whole, *kinds.values()) for seconds in pair):
        raise ValueError("every time must be a finite number of seconds")
    if min(whole) <= 0:
        raise ValueError(f"the whole model must take more than 0 s, not {list(whole)}")
    if not any(max(pair) > 0 for pair in kinds.values()):
        raise ValueError("one unit must take more than 0 s, at least of one kind")


def measure_times(
    model: PreTrainedModel,
    units: Units = "blocks",
    workload: Workload | None = None,
    *,
    rounds: int = ROUNDS,
    progress: bool = True,
) -> TimeTable:
    """Time a model whole, and without half of its units of each kind; the difference is what those take.

    Of a kind of which no unit can go, one takes nothing away. The default workload has a shorter prompt where the model
    holds fewer tokens.

    rounds: at most; fewer where the times are steady.

    Raises:
        ValueError: the workload does not fit the model.
    """
    workload = workload or _usual_workload(model)
    found = find_units(model, units)
    models: dict[str, PreTrainedModel] = {WHOLE: model}
    gone: dict[str, int] = {}
    for kind in dict.fromkeys(unit.kind for unit in found):
        indices = [unit.index for unit in found if unit.kind == kind]
        gone[kind], models[kind] = _without_some(model, indices, units)
    check_workload(models, workload, rounds)

    times, spread = _quiet_seconds(models, workload, rounds, progress)
    whole = times[WHOLE]
    kinds = {kind: one_of(whole, times[kind], number) for kind, number in gone.items()}
    return TimeTable(
        whole=whole,
        kinds=_within(whole, kinds, found),
        units=units,
        workload=workload,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        about=describe_machine(),
        spread=spread,
    )


def _quiet_seconds(
    models: Mapping[str, PreTrainedModel], workload: Workload, rounds: int, progress: bool
) -> tuple[dict[str, Seconds], float]:
    """The times of models that take turns, by name, and the largest spread.

    Other work on a machine only adds to a time, and seldom to that of the same token in every round: the least time of
    each token counts. Rounds are added, up to so many, until the times of the first, third ... and of the second,
    fourth ... agree; the spread is how far they are apart, as a share of the time.
    """
    prompts = {}
    for name, model in models.items():
        prompts[name] = random_prompt(model, workload.batch_size, workload.length)

    steps: dict[str, list[Floats]] = {name: [] for name in models}  # of each round (1 + new tokens,)
    spread = math.inf
    for turns in track(rounds_of_steps(models, prompts, workload.new_tokens, rounds), "Timing", rounds, show=progress):
        for name, seconds in turns.items():
            steps[name].append(seconds)
        if len(steps[WHOLE]) >= min(LEAST_ROUNDS, rounds):
            spread = max(_spread(np.stack(each)) for each in steps.values())
            if spread <= STEADY:
                break
    return {name: _quietest(np.stack(each)) for name, each in steps.items()}, spread


def _spread(steps: Floats) -> float:
    """How far the times of the halves of the rounds are apart; nothing of a single round. steps: (rounds, tokens)."""
    if len(steps) < 2:
        return 0.0
    one, other = np.array(_quietest(steps[::2])), np.array(_quietest(steps[1::2]))
    return float((np.abs(one - other) / np.minimum(one, other)).max())


def _quietest(steps: Floats) -> Seconds:
    """The sums over tokens of the least times of any round. steps: (rounds, tokens)."""
    least = steps.min(axis=0)
    return Seconds(float(least[0]), float(least[1:].sum()))


@dataclass(frozen=True)
class Check:
    """How many times as fast a shortened model is as the whole one: predicted from a table, and measured.

    measured: None where the table is of another machine, or the model not in memory.
    spread: how far apart the halves of the rounds were, as a share of the times.
    """

    predicted: Seconds
    measured: Seconds | None
    spread: float | None = None

    def as_json(self) -> dict[str, Any]:
        measured = None if self.measured is None else self.measured._asdict()
        return {"predicted": self.predicted._asdict(), "measured": measured, "spread": self.spread}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Check:
        """The inverse of as_json."""
        given = values["measured"]
        measured = None if given is None else Seconds(**given)
        return cls(Seconds(**values["predicted"]), measured, values.get("spread"))

    def summary(self) -> str:
        """Both, and how far they are apart."""
        parts = []
        if self.measured is None:
            for name, predicted in zip(Seconds._fields, self.predicted, strict=True):
                parts.append(f"{name} {predicted:.2f}x as fast")
            return f"Predicted from the table of times, and not measured here: {', '.join(parts)}."
        for name, predicted, measured in zip(Seconds._fields, self.predicted, self.measured, strict=True):
            off = measured / predicted - 1
            note = f"{abs(off):.1%} {'above' if off >= 0 else 'below'} what was predicted"
            parts.append(f"{name} {measured:.2f}x as fast ({predicted:.2f}x predicted; {note})")
        if self.spread is not None:
            parts.append(f"measured twice, times differ by {self.spread:.1%}")
        return "Measured on the result: " + ", ".join(parts) + "."


def check_prediction(
    model: PreTrainedModel, times: TimeTable, removed: Removal, *, rounds: int = ROUNDS, progress: bool = True
) -> Check:
    """Compare what a table predicts of a model without some of its units with its time in turns with the whole one.

    Nothing is timed where the table is of another machine, or where blocks are read from disk while they are used.
    """
    left = times.without(find_units(model, times.units), removed)
    predicted = speedup(times.whole, left)
    if is_offloaded(model) or not times.is_of_this_machine(model.device.type):
        return Check(predicted, None)

    shortened = remove_blocks(model, removed, units=times.units, copy=False)
    models = {WHOLE: model, "shortened": shortened}
    seconds, spread = _quiet_seconds(models, times.workload, rounds, progress)
    return Check(predicted, speedup(seconds[WHOLE], seconds["shortened"]), spread)


def speedup(whole: Seconds, shorter: Seconds) -> Seconds:
    """How many times as fast, for the prefill and for decoding."""
    return Seconds(whole.prefill / shorter.prefill, whole.decode / shorter.decode)


def one_of(whole: Seconds, without: Seconds, number: int) -> Seconds:
    """What one unit takes, from the times with and without so many of them; never less than nothing."""
    if number == 0:
        return Seconds(0.0, 0.0)
    prefill, decode = whole.prefill - without.prefill, whole.decode - without.decode
    return Seconds(max(0.0, prefill / number), max(0.0, decode / number))


def _of_all(kinds: Mapping[str, Seconds], units: Sequence[Block]) -> Seconds:
    """What all units take together."""
    each = [kinds[unit.kind] for unit in units]
    return Seconds(sum(one.prefill for one in each), sum(one.decode for one in each))


def _within(whole: Seconds, kinds: Mapping[str, Seconds], units: Sequence[Block]) -> dict[str, Seconds]:
    """The times of units of each kind, smaller where all together would take longer than the whole model.

    They do so by the errors of measuring, on a machine with other work.
    """
    together = _of_all(kinds, units)
    prefill, decode = [min(1.0, most / max(taken, most)) for most, taken in zip(whole, together, strict=True)]
    return {kind: Seconds(prefill * one.prefill, decode * one.decode) for kind, one in kinds.items()}


def _usual_workload(model: PreTrainedModel) -> Workload:
    """The default one; a shorter prompt where the model does not hold so many tokens."""
    usual = Workload()
    longest = context_length(model.config) or usual.length + usual.new_tokens + 1
    return replace(usual, length=max(1, min(usual.length, longest - usual.new_tokens - 1)))


def _without_some(model: PreTrainedModel, indices: Sequence[int], units: Units) -> tuple[int, PreTrainedModel]:
    """The model without every second of some units, without one of them, or whole; and how many are gone."""
    every_second = list(indices[1::2]) or list(indices)
    for removed in (every_second, *([i] for i in reversed(indices))):
        try:
            return len(removed), remove_blocks(model, removed, units=units, copy=False)
        except ValueError as error:
            logger.debug("%s cannot be left out to time them: %s", removed, error)
    return 0, model


def check_table(times: TimeTable, units: Sequence[Block], path: str) -> None:
    """Refuse a table of another model, or of other units, or whose units take longer than the whole model.

    Raises:
        ValueError: it is such a table.
    """
    kinds = sorted({unit.kind for unit in units})
    if times.units != units_of(units) or not {*kinds} <= {*times.kinds}:
        raise ValueError(
            f"{path} has times of {times.units} of the kinds {', '.join(times.kinds)}; the model's "
            f"{units_of(units)} are of {', '.join(kinds)}: make a table for it with blockspin profile (--profile)"
        )
    for name, taken, most in zip(Seconds._fields, _of_all(times.kinds, units), times.whole, strict=True):
        if taken > most * (1 + ROUNDING):
            raise ValueError(
                f"{path}: {name} takes {taken:.4g} s in all {len(units)} {times.units} together, and {most:.4g} s in "
                "the whole model; the times under `kinds` are those of one: correct the table, or measure again with "
                "blockspin profile (--profile)"
            )
