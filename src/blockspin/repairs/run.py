"""Repairs a shortened model in closed form, so that its hidden states follow the original's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..model import fingerprint
from ..model.batches import BatchSize, Room
from ..model.largest_batch import tokens_that_fit
from ..model.offload import ReadAhead, check_in_memory, forget, is_offloaded, replace_weights, restore_weights
from ..model.placement import delete_with, resaving_folder
from ..model.quality import quality_of
from ..model.tracing import TracedModel, trace_model
from ..progress import track
from .aims import aims_at
from .finished import FinishedBlocks
from .fitting import TOKENS_PER_INPUT, Fitting, Maps, Text, find_maps
from .least_squares import READING_RIDGE, RIDGE
from .pairing import Kept, kept_blocks, kept_branches
from .projections import num_inputs
from .report import RepairReport, Step
from .shelf import open_shelf
from .walk import Walk

_TANGLED = "a repair of a model whose blocks take more from each other than hidden states"


def repair(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    *,
    removed: Sequence[int] | None = None,
    ridge: float = RIDGE,
    reading_ridge: float | None = READING_RIDGE,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    partial: str | Path | None = None,
    progress: bool = False,
) -> RepairReport:
    """Give linear maps of a shortened model new weights, in place, so that it follows the original.

    Blocks may be gone, or sub-layers of blocks. Block by block from the first cut on, every linear map whose output is
    added to the residual stream is changed by a ridge least-squares solution. With the inputs a_t of the map in the
    shortened and so far repaired model, the stream s_t there after the addition and the aim z_t, it is the D that
    minimises the sum over tokens of |z_t - s_t - a_t D|^2 / |z_t|^2, plus the penalty of `NormalEquations.solution`.

    The aim after a block is what enters the next kept sub-layer in the original; after an earlier addition of the block
    it is the original's stream there and, of what the removed ones add, the share of the additions done so far. Maps
    that read the stream get a linear map in front, so that they see what they see in the original. Only what helps on
    held-out samples is kept. The original keeps its weights, also where `shortened` shares them.

    samples: 1-D int64 tensors of token ids, tens of thousands of tokens in all.
    removed: the blocks that are gone; None: found by comparing weights.
    ridge: how strongly the change is held small, relative to the inputs' own size. reading_ridge: the same for the maps
    that read the stream; None leaves them alone.
    seed: draws the samples that are held out.
    partial: a folder for finished blocks, from which the same call continues; it goes when the repair is done.
    Weights of either model may be offloaded: a block of one of them is in memory, and the next is read. New ones of an
    offloaded `shortened` stay in `partial`, or in the folder for temporary files, until the model is gone.

    Raises:
        ValueError: the models do not belong together, weights are quantised, or offloaded where blocks take more from
            each other than hidden states, there is too little text, or a hidden state is not finite.
    """
    if partial is None and is_offloaded(shortened):
        partial = resaving_folder(0)
        delete_with(shortened, partial)

    report, finished = run_repair(
        shortened,
        original,
        samples,
        partial,
        removed=removed,
        ridge=ridge,
        reading_ridge=reading_ridge,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )

    if finished.folder is not None and is_offloaded(shortened):
        delete_with(shortened, finished.folder)
    else:
        finished.remove()
    return report


def run_repair(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    partial: str | Path | None,
    *,
    removed: Sequence[int] | None,
    batch_size: BatchSize,
    seed: int,
    progress: bool,
    ridge: float = RIDGE,
    reading_ridge: float | None = READING_RIDGE,
) -> tuple[RepairReport, FinishedBlocks]:
    """As `repair`. What `partial` holds stays there, and is returned besides.

    Raises:
        ValueError: as `repair`.
    """
    ours, theirs = trace_model(shortened), trace_model(original)
    for traced in (ours, theirs):
        if traced.is_offloaded and not traced.shares_passes:
            check_in_memory(traced.model, _TANGLED)

    kept = kept_blocks(shortened, original, removed)
    text = Text(samples, batch_size, seed)
    maps = find_maps(ours)
    text.check_enough(_widest(ours.layers, maps))
    settings = (kept, ridge, reading_ridge, batch_size, seed)
    finished = _finished_before(partial, shortened, original, samples, settings)

    kl_before = quality_of(shortened, original, text.held_out, batch_size).kl
    old = _weights(ours.layers, maps)
    turns = _turns(kept_branches(shortened, original, kept), theirs.depth)
    room = Room(tokens_that_fit(shortened, original))

    def walk_through() -> tuple[Fitting, Walk, list[Step]]:
        """Once more from the first block on where memory ran out, most often at the first block that is repaired."""
        _put_back(old)
        restore_weights(ours.layers)
        batches = room.cut(text.batches)
        with open_shelf(original, batches) as shelf, ReadAhead(_reading_order(turns, ours, theirs)) as ahead:
            fitting = Fitting(Walk(ours, batches, shelf, ahead), maps, text, ridge, reading_ridge)
            through_original = Walk(theirs, batches, shelf, ahead)
            return fitting, through_original, _repair_blocks(fitting, through_original, turns, finished, progress)

    fitting, through_original, steps = room.together(text.batches, walk_through)
    forget(shortened, fingerprint.OF_WEIGHTS)
    kl_after = quality_of(shortened, original, text.held_out, batch_size).kl

    undone = not kl_after < kl_before
    if undone:
        _put_back(old)
        restore_weights(ours.layers)
    report = _report(fitting, through_original, kept, steps, kl_before, kl_before if undone else kl_after, undone)
    return report, finished


def check_inputs(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    removed: Sequence[int] | None,
    batch_size: BatchSize,
    seed: int,
) -> None:
    """Refuse what `repair` would refuse before it begins, where other work comes first.

    Raises:
        ValueError: the models do not belong together, or there is too little text.
    """
    kept_blocks(shortened, original, removed)
    check_text(shortened, samples, batch_size, seed)


def check_text(model: nn.Module, samples: Sequence[Tensor], batch_size: BatchSize, seed: int) -> None:
    """Refuse text that is too little for a repair of a model, shortened or not yet.

    Raises:
        ValueError: says how much is needed.
    """
    traced = trace_model(model)
    Text(samples, batch_size, seed).check_enough(_widest(traced.layers, find_maps(traced)))


def least_tokens(model: nn.Module) -> int:
    """How many tokens a repair must have to fit to, without those held out; 0: there is nothing that it could change.

    Raises:
        ValueError: the weights of a map that it would change are quantised.
    """
    traced = trace_model(model)
    return TOKENS_PER_INPUT * _widest(traced.layers, find_maps(traced))


def _finished_before(
    partial: str | Path | None,
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    settings: Sequence[object],
) -> FinishedBlocks:
    """The blocks that an earlier call with the same models, samples and settings has finished."""
    identity = ""
    if partial is not None:
        identity = fingerprint.of_results(shortened, samples, fingerprint.of_model(original), *settings)
    return FinishedBlocks(partial, identity)


@dataclass(frozen=True)
class _Turn:
    """A block of the shortened model, which a repair comes to.

    following: the next one. same: whether up to that one nothing is gone, so that the models are the same.
    """

    block: Kept
    following: Kept
    same: bool


def _turns(kept: Sequence[Kept], depth: int) -> list[_Turn]:
    """The blocks of the shortened model in order. depth: of the original."""
    behind = Kept(depth)  # as if a block followed the last
    turns, same = [], True
    for position, (block, following) in enumerate(zip(kept, [*kept[1:], behind], strict=True)):
        same &= not block.branches and block.index == position
        nothing_between = following.index == position + 1 and following.first == 0
        turns.append(_Turn(block, following, same and nothing_between))
    return turns


def _reading_order(turns: Sequence[_Turn], ours: TracedModel, theirs: TracedModel) -> list[nn.Module]:
    """The blocks of both models as `_repair_blocks` comes to them."""
    layers, order = list(theirs.layers), list[nn.Module]()
    reached = 0
    for position, turn in enumerate(turns):
        order += layers[reached : turn.following.index]
        reached = turn.following.index
        if turn.following.first > 0:
            order.append(layers[reached])
        if not turn.same:
            order.append(ours.layers[position])
    return order


def _repair_blocks(
    fitting: Fitting, theirs: Walk, turns: Sequence[_Turn], finished: FinishedBlocks, progress: bool
) -> list[Step]:
    """Walk through both models side by side and change the shortened one."""
    ours = fitting.walk
    steps: list[Step] = []
    for turn in track(turns, "Repairing", len(turns), show=progress):
        block, following = turn.block, turn.following
        aims = aims_at(theirs, block.index, following.index, block.branches, following.first)
        if turn.same:
            ours.follow(theirs)
            continue

        layer = ours.layer
        with ours.resident():
            done = finished.restore(block.index, layer)
            if done is None:
                done = fitting.refit(block.index, aims)
                finished.add(block.index, layer, done)
            steps += done
            ours.step()
        replace_weights(layer, finished.stored(block.index))
    return steps


def _report(
    fitting: Fitting,
    theirs: Walk,
    kept: Sequence[int],
    steps: Sequence[Step],
    kl_before: float,
    kl_after: float,
    undone: bool,
) -> RepairReport:
    """What was done, when both walks are at their ends. kept: the blocks that are left."""
    untouched = []
    for block, found in zip(kept, fitting.maps, strict=True):
        if not found.projections:
            untouched.append(block)

    return RepairReport(
        removed=tuple(block for block in range(theirs.depth) if block not in kept),
        tokens=fitting.text.num_tokens,
        steps=tuple(steps),
        untouched=tuple(untouched),
        kl_before=kl_before,
        kl_after=kl_after,
        undone=undone,
        passes=_passes(fitting.walk, theirs, fitting.text),
    )


def _passes(ours: Walk, theirs: Walk, text: Text) -> float:
    """What a repair cost, in forward passes of the original over the text."""
    walked = (ours.ran + theirs.ran) / theirs.depth / len(ours.batches)
    held_out = sum(map(len, text.held_out)) / (text.num_tokens + sum(map(len, text.held_out)))
    compared = 2 * (1 + ours.depth / theirs.depth) * held_out  # before and after
    return walked + compared


def _weights(layers: nn.ModuleList, maps: Sequence[Maps]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that a repair may replace: (module, name in it, parameter)."""
    found = []
    for layer, own in zip(layers, maps, strict=True):
        for map_name in own.names:
            module = layer.get_submodule(map_name)
            found += [(module, name, parameter) for name, parameter in module.named_parameters()]
    return found


def _put_back(weights: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Undo a repair: give modules the parameters that they had before."""
    for module, name, parameter in weights:
        setattr(module, name, parameter)


def _widest(layers: nn.ModuleList, maps: Sequence[Maps]) -> int:
    """Inputs of the widest map; 0 where there is none."""
    widths = []
    for layer, own in zip(layers, maps, strict=True):
        widths += [num_inputs(layer.get_submodule(name)) for name in own.names]
    return max(widths, default=0)
