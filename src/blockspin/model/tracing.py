"""A model, its stack of blocks and how they run: observed and proven once, so that passes can leave blocks out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..problem import Block, Removal, Sublayer, Units, block_of
from .batches import Batch, Room, frozen, input_device
from .blocks import check_removal, find_blocks, find_stack
from .branches import BlockTrace, Part, same, without_branches
from .calls import BlockCall, noted_calls
from .head import SplitModel, split_model
from .largest_batch import tokens_that_fit
from .observing import observe_blocks
from .offload import is_offloaded, remembered, resident
from .residual import entered_by, kept_streams, patched_forward, stream_in, stream_of, with_entering, with_stream
from .units import lacking_modules, sublayers_of

_NOT_COMPUTED = (KeyError, IndexError, AttributeError, TypeError, ValueError)  # how models say what they miss
_TRIAL = Batch((0,), torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]))


@dataclass(frozen=True)
class TracedModel:
    """A model, its stack of blocks, and how they run. Made by `trace_model`; valid as long as the model is unchanged.

    layers: the modules of the blocks. blocks: what they are. traces: what each did when it ran.
    units: what the numbers of a removal stand for: the blocks, or their sub-layers.
    room: how large the batches of passes without gradients may be.
    tried: the removals that were tried (`can_bypass`), and whether the model runs without them.
    """

    model: nn.Module
    layers: nn.ModuleList
    blocks: tuple[Block, ...]
    traces: tuple[BlockTrace, ...]
    units: tuple[Block, ...]
    room: Room = field(repr=False)
    tried: dict[Removal, bool] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def num_units(self) -> int:
        """The number of units, N."""
        return len(self.units)

    @cached_property
    def units_in(self) -> tuple[tuple[int, ...], ...]:
        """For each block the numbers of the units in it."""
        numbers: list[list[int]] = [[] for _ in self.blocks]
        for number, unit in enumerate(self.units):
            numbers[block_of(unit)].append(number)
        return tuple(map(tuple, numbers))

    @cached_property
    def branches_in(self) -> tuple[dict[int, int], ...]:
        """For each block whose branches are units apart the number of the unit that each branch is."""
        branches: list[dict[int, int]] = [{} for _ in self.blocks]
        for number, unit in enumerate(self.units):
            if isinstance(unit, Sublayer) and unit.branch is not None:
                branches[unit.block][unit.branch] = number
        return tuple(branches)

    def whole_and_partial(self, removed: Collection[int]) -> tuple[list[int], dict[int, set[int]]]:
        """The blocks of which all units are among these, and for each other block the branches that are."""
        whole: list[int] = []
        partial: dict[int, set[int]] = {}
        for block, numbers in enumerate(self.units_in):
            gone = [number for number in numbers if number in removed]
            if len(gone) == len(numbers):
                whole.append(block)
            elif gone:
                partial[block] = {branch for branch, unit in self.branches_in[block].items() if unit in gone}
        return whole, partial

    @cached_property
    def halves(self) -> SplitModel:
        """The decoder and the head apart, so that logits are made only where they are used.

        That they give what the whole model gives shows without blocks too, where these would have to be read for it.
        """
        with bypassed(self, range(self.num_units) if self.is_offloaded else ()):
            return split_model(self.model)

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether weights of blocks are loaded for each pass through them, so that passes should share the loading."""
        return is_offloaded(self.layers)

    @cached_property
    def has_independent_blocks(self) -> bool:
        """Whether no unit needs another one to run: all that it takes from those before are the hidden states.

        Found by passes of four tokens without some of the units. Two units differ in at least one binary digit of
        their numbers, so that leaving out those with a digit of 0, then those with 1, for every digit, leaves each
        unit out while each other one runs: 2 log2(N) passes of half the model. Where each pass reads the weights anew,
        one pass first tries to show more than that of whole blocks.
        """
        if self.is_offloaded and self.units == self.blocks and self._runs_block_by_block:
            return True
        for digit in range((self.num_units - 1).bit_length()):
            for value in (0, 1):
                half = [i for i in range(self.num_units) if i >> digit & 1 == value]
                if not _runs_without(self, half):
                    return False
        return True

    def can_bypass(self, removed: Collection[int]) -> bool:
        """Whether the model runs while these units do not. Where units need others, that is tried on four tokens."""
        removal = tuple(sorted(removed))
        if not removal or self.has_independent_blocks:
            return True
        if removal not in self.tried:
            self.tried[removal] = _runs_without(self, removal)
        return self.tried[removal]

    @cached_property
    def shares_passes(self) -> bool:
        """Whether a pass can start in the middle of the stack, with the hidden states of an earlier pass.

        It cannot where a block takes more from the blocks before it than their hidden states, or rests. Proven on four
        tokens: passes that start at the middle and at the last block give the head what the whole pass gives it.
        """
        if not self.has_independent_blocks or any(trace.rests for trace in self.traces):
            return False
        if self.is_offloaded:
            return self._runs_block_by_block

        starts = (self.depth // 2, self.depth - 1)
        with frozen(self.model), torch.no_grad():
            with kept_streams(self.layers, starts) as streams:
                whole = self.halves.hidden_by_call(_TRIAL)
            for start in starts:
                try:
                    with resumed(self, (), start, streams[start]):
                        hidden = self.halves.hidden_by_call(_TRIAL)
                except _NOT_COMPUTED:
                    return False
                if not same(hidden, whole):
                    return False
        return True

    @cached_property
    def _runs_block_by_block(self) -> bool:
        """Whether every block, given what it gets in a pass in which no block runs, computes what it does in a whole
        pass. Proven on four tokens; reads the weights once."""
        if any(trace.rests for trace in self.traces):
            return False

        equal: list[bool] = []

        def comparing(call: BlockCall, run: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                stream = stream_of(args, kwargs)
                with resident(call.layer):
                    output = run(*args, **kwargs)
                    alone_args, alone_kwargs = with_entering(call.args, call.kwargs, stream)
                    alone = run(*alone_args, **alone_kwargs)
                equal.append(same(stream_in(alone), stream_in(output)))
                return output

            return forward

        with frozen(self.model), torch.no_grad(), ExitStack() as patches:
            try:
                calls = block_calls(self, _TRIAL)
                for call in calls:
                    patches.enter_context(patched_forward(call.layer, comparing(call, call.layer.forward)))
                _TRIAL.forward(self.model)
            except _NOT_COMPUTED:
                return False
        return len(equal) == self.depth and all(equal)


def trace_model(model: nn.Module, units: Units = "blocks") -> TracedModel:
    """Find the blocks, run a few tokens through the model, note what each block does, and prove that gates can act.

    units: what can be removed: whole blocks, or each of their residual branches.

    Proven at run time: gates of one change no bit of a block's output; gates of zero on the branches found make it the
    identity, otherwise the gate acts on the whole block; each block receives what the one before it returned.

    Raises:
        ValueError: one of these does not hold, a block did not run exactly once (those that attend to images may rest),
            or the model is not causal.
    """
    return remembered(model, ("trace", units), lambda: _trace(model, units))


def _trace(model: nn.Module, units: Units) -> TracedModel:
    layers, blocks = find_stack(model).layers, find_blocks(model)
    traces = observe_blocks(model, layers, blocks, with_parts=units == "sublayers")
    found = blocks
    if units == "sublayers":
        seen = [(trace.branches, trace.parts) for trace in traces]
        found = [*sublayers_of(layers, blocks, seen, lacking_modules(model, find_stack(model).name))]

    # What stacks removals on a GPU runs out of memory however few samples there are.
    stacks = input_device(model).type == "cuda" and not is_offloaded(layers)
    room = Room(tokens_that_fit(model), fallback="one removal at a time" if stacks else None)
    traced = TracedModel(model, layers, tuple(blocks), tuple(traces), tuple(found), room)
    _ = traced.halves  # found now, as later something may watch the blocks
    return traced


def find_units(model: nn.Module, units: Units = "blocks") -> list[Block]:
    """What can be removed of a model, in order: its blocks, or its sub-layers, which a few tokens show.

    Raises:
        ValueError: as `find_blocks` and `trace_model` say.
    """
    return find_blocks(model) if units == "blocks" else list(trace_model(model, units).units)


@contextmanager
def skipped(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, the removed units pass their input on at no cost: the shortened model without building it.

    Where other units need them, they run all the same and leave the stream as it was.
    """
    removed = check_removal(removed, traced.num_units)
    leaving_out = bypassed if traced.can_bypass(removed) else closed
    with leaving_out(traced, removed):
        yield


@contextmanager
def bypassed(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, these units do not run."""
    whole, partial = traced.whole_and_partial(removed)

    def passing(trace: BlockTrace) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_of(args, kwargs)
            if not trace.outputs:
                return stream

            # What the block before has handed on goes on to the next; a first block has been given nothing.
            further = list(map(kwargs.get, trace.passed)) or [None] * (trace.outputs - 1)
            return (stream, *further)

        return forward

    with ExitStack() as patches:
        for i in whole:
            patches.enter_context(patched_forward(traced.layers[i], passing(traced.traces[i])))
        for i, branches in partial.items():
            patches.enter_context(branches_bypassed(traced, i, branches))
        yield


def branches_bypassed(traced: TracedModel, block: int, branches: Collection[int]) -> AbstractContextManager[None]:
    """Inside, some of the branches of a block do not run."""
    parts: list[Part] = []
    for branch in sorted(branches):
        parts += traced.traces[block].parts[branch]
    return without_branches(traced.layers[block], branches, parts)


@contextmanager
def closed(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, the removed units run but leave the residual stream as it was: gates of zero without any rounding."""
    whole, partial = traced.whole_and_partial(check_removal(removed, traced.num_units))

    def closing(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return with_stream(run(*args, **kwargs), stream_of(args, kwargs))

        return forward

    with ExitStack() as patches:
        for i in whole:
            layer = traced.layers[i]
            patches.enter_context(patched_forward(layer, closing(layer.forward)))
        for i, branches in partial.items():
            patches.enter_context(without_branches(traced.layers[i], branches))
        yield


@contextmanager
def resumed(traced: TracedModel, removed: Collection[int], start: int, stream: Tensor) -> Iterator[None]:
    """Inside, a pass starts at a block with the hidden states that enter it, and goes on without the removed units.

    The rest of the model (embeddings, masks, final norm, head) runs as always, so that nothing needs to be known about
    it. Only for models that share passes.
    """
    # `skipped` refuses to skip every unit; what unit 0 computes here is not used.
    skip = {*removed}
    for numbers in traced.units_in[:start]:
        skip.update(numbers)
    if len(skip) == traced.num_units:
        skip.remove(0)
    with skipped(traced, skip), entered_by(traced.layers[start], stream):
        yield


def block_calls(traced: TracedModel, batch: Batch) -> list[BlockCall]:
    """What each block is given in a pass over a batch in which no block runs."""
    with bypassed(traced, range(traced.num_units)), noted_calls(list(traced.layers)) as calls:
        traced.halves.hidden_of(batch)
    return calls


def _runs_without(traced: TracedModel, removed: Collection[int]) -> bool:
    """Whether the model runs on a few tokens while these units do not; sub-layers must leave the others as they are."""
    with frozen(traced.model), torch.no_grad():
        try:
            with bypassed(traced, removed):
                hidden = traced.halves.hidden_by_call(_TRIAL)
        except _NOT_COMPUTED:
            return False

        if len(removed) == traced.num_units or not traced.whole_and_partial(removed)[1]:
            return True
        with closed(traced, removed):
            return same(hidden, traced.halves.hidden_by_call(_TRIAL))
