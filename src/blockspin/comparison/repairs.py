"""The choices of a comparison after repairs: ours on every choice, and those of others on what we choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from .. import baselines
from ..model.batches import BatchSize
from ..model.quality import quality_of
from ..model.quantization import is_quantized
from ..problem import Removal, Units
from ..progress import console
from ..repairs.fitting import Text
from ..repairs.run import least_tokens, repair
from ..scatter import plus_minus
from ..surgery.memory import remove_blocks
from ..tables import Column, Table
from .methods import TO_BE_REPAIRED, Setup
from .results import RANDOM, Choice, Comparison, Repaired, goal_title

OURS = "blockspin"


class Repair(Protocol):
    """What changes a shortened model in place, so that it follows the original."""

    def __call__(
        self, shortened: nn.Module, original: nn.Module, samples: Sequence[Tensor], *, batch_size: BatchSize
    ) -> object: ...


_REPAIRS: dict[str, Repair] = {
    OURS: repair,
    "ReplaceMe": baselines.replaceme,
    "ReplaceMe, cosine": partial(baselines.replaceme, cosine=True),
    "LinearPatch": baselines.linear_patch,
    "Ghosted Layers": baselines.ghosted_layers,
}
_OTHERS = tuple(name for name in _REPAIRS if name != OURS)
_CAPTION = (
    "KL: divergence from the original after the repair, in nats a token, ± one standard error; plain: before it; "
    "share: how much of it is left. Of random removals the first."
)


def repair_choices(setup: Setup, goal: str, comparison: Comparison, save: Callable[[], None]) -> None:
    """Repair the choices of a goal in memory and measure them, each as soon as it is done.

    The text is that of the energies and of the choice, as in `compress`. Random draws but the first and merged models
    are left out. Where the model is quantised or there is too little text, nothing is done, and `left_out` says so.

    save: writes the comparison.

    Raises:
        ValueError: a hidden state is not finite.
    """
    if is_quantized(setup.traced.model):
        comparison.left_out[f"repairs, {goal}"] = "the weights of the model are quantised"
        return
    text = [*setup.samples.calibration, *setup.samples.selection]
    needed, given = least_tokens(setup.traced.model), Text(text, setup.config.batch_size, setup.config.seed).num_tokens
    if not 0 < needed <= given:
        comparison.left_out[f"repairs, {goal}"] = f"a repair needs {needed:,} tokens of text to fit to, not {given:,}"
        return

    if setup.config.units == "sublayers":
        reason = "they put a linear map where whole blocks are gone, and here sub-layers go"
        comparison.left_out[f"repairs by {', '.join(_OTHERS)}, {goal}"] = reason
    for choice, name in _wanted(comparison.choices_for(goal), setup.config.units):
        of_removal = [row for row in comparison.repaired if (row.removed, row.repair) == (choice.removed, name)]
        if any(row.goal == goal for row in of_removal):
            continue

        # Another goal may have led to the same removal.
        if of_removal:
            comparison.repaired.append(replace(of_removal[0], goal=goal))
        else:
            console.print(f"{goal}: {choice.method}, repaired by {name}", highlight=False)
            comparison.repaired.append(_repaired(setup, goal, choice.removed, name, text))
        save()


def _wanted(choices: Sequence[Choice], units: Units) -> list[tuple[Choice, str]]:
    """Which choices get which repairs. units: what the choices remove; the others' repairs are of whole blocks."""
    plain = [choice for choice in choices if choice.removed and not choice.windows]
    first_draw = next((choice for choice in plain if choice.method == RANDOM), None)
    wanted = [(choice, OURS) for choice in plain if choice.method != RANDOM or choice is first_draw]
    for choice in plain:
        if choice.method == TO_BE_REPAIRED and units == "blocks":
            wanted += [(choice, name) for name in _OTHERS]
    return wanted


def _repaired(setup: Setup, goal: str, removed: Removal, name: str, text: Sequence[Tensor]) -> Repaired:
    """One removal after one repair, measured as the others are."""
    model, config = setup.traced.model, setup.config
    shortened = remove_blocks(model, removed, units=config.units, copy=False)
    started = time.perf_counter()
    _REPAIRS[name](shortened, model, text, batch_size=config.batch_size)
    seconds = time.perf_counter() - started
    return Repaired(goal, removed, name, seconds, **vars(quality_of(shortened, model, setup.samples.evaluation)))


def repairs_tables(comparison: Comparison) -> list[Table]:
    """A table for each goal whose choices were repaired."""
    goals = list(dict.fromkeys(row.goal for row in comparison.repaired))
    return [_table(comparison, goal) for goal in goals]


def _table(comparison: Comparison, goal: str) -> Table:
    """The choices for a goal after their repairs, the lowest KL divergence first, beside what they have plain."""
    found = {(row.removed, row.repair): row for row in comparison.repaired if row.goal == goal}
    columns = [Column("method", words=True), Column("repair", words=True)]
    columns += [Column(heading) for heading in ("KL", "plain", "share", "top-1", "seconds")]

    # Another random draw may have been repaired as the choice of a method.
    shown = [row for row in comparison.rows if row.goal == goal and not row.windows]
    first_draw = next((row for row in shown if row.method == RANDOM), None)
    lines = []
    for plain in shown:
        for name in _REPAIRS if plain.method != RANDOM or plain is first_draw else ():
            row = found.get((plain.removed, name))
            if row is None or (name != OURS and plain.method != TO_BE_REPAIRED):
                continue
            cells = [
                plain.method,
                name,
                f"{row.kl:.4f}{plus_minus(row.kl_error)}",
                f"{plain.kl:.4f}",
                f"{row.kl / plain.kl:.0%}",
            ]
            lines.append((row.kl, [*cells, f"{row.agreement:.1%}", f"{row.seconds:.3g}"]))

    lines.sort(key=lambda line: line[0])
    return Table(columns, [cells for _, cells in lines], f"{goal_title(goal)}, after a repair", _CAPTION)
