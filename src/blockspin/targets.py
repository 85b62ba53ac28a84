"""The settings of targets: what the smaller model may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .quantities import parse_count, parse_size, parse_tokens
from .settings import Settings, flag, setting
from .tables import short

OF_TIME = ("target_speedup", "target_prefill_speedup")  # all others count what the units of the model take
TARGETS = (
    "target_params",
    "target_active_params",
    "target_size",
    "target_memory",
    *OF_TIME,
)
NO_GOAL = "say what to remove (--remove 8), or what the smaller model may cost (--target-size 5GB, ...)"


@dataclass(frozen=True, kw_only=True)
class TargetSettings(Settings):
    """What the smaller model may cost at most, as the user counts it. All that are given are kept at once.

    Numbers below 1 are shares of what the model has.
    """

    panel: ClassVar[str] = "Goals"

    target_params: float | None = setting("Parameters at most: 6e9, 6B, or 75%.", None, parse=parse_count, above=0)
    target_active_params: float | None = setting(
        "Parameters that a token uses at most: experts that are not chosen do not count.",
        None,
        parse=parse_count,
        above=0,
    )
    target_size: float | None = setting(
        "Bytes of weights on disk at most: 5GB, 5GiB, or 75%.", None, parse=parse_size, above=0
    )
    target_memory: float | None = setting(
        "Bytes of weights, key-value cache and recurrent states at most, for --batch texts of --context tokens.",
        None,
        parse=parse_size,
        above=0,
    )
    context: int | None = setting(
        "Tokens of a text in the cache, for --target-memory: 32k (default: 4,096, or what the model holds).",
        None,
        parse=parse_tokens,
        least=1,
        needs=("target_memory",),
    )
    batch: int = setting("Texts at a time, for --target-memory.", 1, least=1, needs=("target_memory",))
    target_speedup: float | None = setting("How many times as fast it decodes, at least: 1.4.", None, above=1)
    target_prefill_speedup: float | None = setting("How many times as fast it reads a text, at least.", None, above=1)
    profile: str | None = setting(
        "A table of times by `blockspin profile`, of this machine or of the one that the model is for.",
        None,
        needs=OF_TIME,
    )

    @property
    def has_targets(self) -> bool:
        """Whether there is any."""
        return bool(self.targets)

    @property
    def needs_costs(self) -> bool:
        """Whether one counts what the units of the model take."""
        return any(name not in OF_TIME for name in self.targets)

    @property
    def needs_times(self) -> bool:
        """Whether one counts time."""
        return any(name in OF_TIME for name in self.targets)

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are given, by their settings."""
        amounts = {name: getattr(self, name) for name in TARGETS}
        return {name: amount for name, amount in amounts.items() if amount is not None}


def target_text(name: str, amount: float) -> str:
    """A target as it is typed: "--target-size 5GB". name: its setting."""
    if name in OF_TIME:
        said = f"{amount:g}"
    elif amount < 1:
        said = f"{100 * amount:g}%"
    else:
        unit = "B" if name in ("target_size", "target_memory") else ""
        said = short(amount, unit).replace(" ", "")
    return f"{flag(name)} {said}"
