"""Repairs a shortened model in closed form, so that its hidden states follow the original's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..model import fingerprint
from ..model.quality import quality_of
from ..model.tracing import trace_model
from ..progress import track
from .finished import FinishedBlocks
from .fitting import Fitting, Text
from .least_squares import RIDGE
from .pairing import kept_blocks
from .projections import Projection, find_projections, num_inputs
from .report import RepairReport, Step
from .walk import Walk


def repair(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    *,
    removed: Sequence[int] | None = None,
    ridge: float = RIDGE,
    batch_size: int = 8,
    seed: int = 0,
    partial: str | Path | None = None,
    progress: bool = False,
) -> RepairReport:
    """Give the out-projections of a shortened model new weights, in place, so that it follows the original.

    Block by block from the first cut on, every linear map whose output is added to the residual stream is changed by
    a ridge least-squares solution. With the inputs a_t of the map in the shortened and so far repaired model, the
    stream s_t there after the addition and the aim z_t, it is the D that minimises the sum over tokens of
    |z_t - s_t - a_t D|^2 / |z_t|^2, plus the penalty of `NormalEquations.solution`.

    The aim after a block is what enters the next kept block in the original; after an earlier addition of the block it
    is the original's stream there and, of what the removed blocks add, the share of the additions done so far. Only
    what helps on held-out samples is kept. The original keeps its weights, also where `shortened` shares them.

    samples: 1-D int64 tensors of token ids, tens of thousands of tokens in all.
    removed: the blocks that are gone; None: found by comparing weights.
    ridge: how strongly the change is held small, relative to the inputs' own size.
    seed: draws the samples that are held out.
    partial: a folder for finished blocks, from which the same call continues; it goes when the repair is done.

    Raises:
        ValueError: the models do not belong together, weights are quantised, there is too little text, or a hidden
            state is not finite.
    """
    kept = kept_blocks(shortened, original, removed)
    text = Text(samples, batch_size, seed)
    ours, theirs = trace_model(shortened), trace_model(original)
    projections = find_projections(ours)
    text.check_enough(_widest(ours.layers, projections))
    identity = fingerprint.of_results(shortened, samples, fingerprint.of_model(original), kept, ridge, batch_size, seed)
    finished = FinishedBlocks(partial, identity)

    kl_before = quality_of(shortened, original, text.held_out, batch_size).kl
    old = _weights(ours.layers, projections)
    fitting = Fitting(Walk(ours, text.batches), projections, text, ridge)
    steps = _repair_blocks(fitting, Walk(theirs, text.batches), kept, finished, progress)
    kl_after = quality_of(shortened, original, text.held_out, batch_size).kl
    undone = not kl_after < kl_before
    _put_back(old if undone else [])
    finished.remove()

    return RepairReport(
        removed=tuple(i for i in range(theirs.depth) if i not in kept),
        tokens=text.num_tokens,
        steps=tuple(steps),
        untouched=tuple(block for block, found in zip(kept, projections, strict=True) if not found),
        kl_before=kl_before,
        kl_after=kl_before if undone else kl_after,
        undone=undone,
    )


def _repair_blocks(
    fitting: Fitting, theirs: Walk, kept: Sequence[int], finished: FinishedBlocks, progress: bool
) -> list[Step]:
    """Walk through both models side by side and change the shortened one. kept: its blocks in the original."""
    ours = fitting.walk
    steps: list[Step] = []
    ends = [*kept[1:], theirs.depth]
    for position in track(range(len(kept)), "Repairing", len(kept), show=progress):
        block, end = kept[position], ends[position]
        aims = _aims(theirs, block, end)
        if block == position and end == block + 1:  # nothing is gone up to here: the models are the same
            ours.follow(theirs)
            continue

        done = finished.restore(block, ours.layer)
        if done is None:
            done = fitting.refit(block, aims)
            finished.add(block, ours.layer, done)
        steps += done
        ours.step()
    return steps


def _aims(theirs: Walk, block: int, end: int) -> list[list[Tensor]]:
    """What the streams of the shortened model should be after each addition of a block, for each batch.

    Takes the original's walk from before `block` to `end`, where the block's successor begins. What the blocks between
    add is shared out evenly over the additions: of two, the first should bring half of it.
    """
    while theirs.block < block:
        theirs.step()
    between = theirs.step()  # [batch][addition but the last], (batch, length, width)
    after = list(theirs.streams)
    while theirs.block < end:
        theirs.step()

    aims = []
    for additions, here, there in zip(between, after, theirs.streams, strict=True):
        number = len(additions) + 1
        shared = [state + (there - here) * ((k + 1) / number) for k, state in enumerate(additions)]
        aims.append([*shared, there])
    return aims


def _weights(
    layers: nn.ModuleList, projections: Sequence[Sequence[Projection]]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that a repair may replace: (module, name in it, parameter)."""
    found = []
    for layer, own in zip(layers, projections, strict=True):
        for projection in own:
            module = layer.get_submodule(projection.name)
            found += [(module, name, parameter) for name, parameter in module.named_parameters()]
    return found


def _put_back(weights: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Undo a repair: give modules the parameters that they had before."""
    for module, name, parameter in weights:
        setattr(module, name, parameter)


def _widest(layers: nn.ModuleList, projections: Sequence[Sequence[Projection]]) -> int:
    """Inputs of the widest out-projection; 0 where there is none."""
    widths = [
        num_inputs(layer.get_submodule(projection.name))
        for layer, own in zip(layers, projections, strict=True)
        for projection in own
    ]
    return max(widths, default=0)
