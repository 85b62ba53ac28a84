"""A model, its stack of blocks and how they run: observed and proven once, so that passes can leave blocks out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..problem import Block, Removal
from .batches import Batch, frozen, input_device
from .blocks import check_removal, find_blocks, find_stack, looks_at_images
from .calls import BlockCall, noted_calls
from .offload import is_offloaded, resident
from .residual import ResidualBranches, patched_forward, stream_in, stream_of, with_entering, with_stream

_ROUNDING = 50  # differences up to so many units of the last place, of the largest value, are rounding
_NOT_COMPUTED = (KeyError, IndexError, AttributeError, TypeError, ValueError)  # how models say what they miss
_TRACED_IDS = [[1, 2, 3, 4], [1, 2, 3, 5], [5, 6, 7, 8]]  # the first two differ in the last token only
_TRIAL = Batch((0,), torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]))


@dataclass(frozen=True)
class BlockTrace:
    """What a block did when it ran.

    branches: its number of residual branches; 0: they could not be told apart, so the gate acts on the whole block.
    outputs: the length of the tuple or list that it returns; 0: a bare tensor.
    batch_dim: the dimension of the residual stream that counts samples.
    passed: for each further output, the argument in which the next block takes it ("": it does not).
    rests: it attends to images and does not run on text.
    """

    branches: int
    outputs: int
    batch_dim: int = 0
    passed: tuple[str, ...] = ()
    rests: bool = False


@dataclass(frozen=True)
class TracedModel:
    """A model, its stack of blocks, and how they run. Made by `trace_model`; valid as long as the model is unchanged.

    layers: the modules of the blocks. blocks: what they are. traces: what each did when it ran.
    tried: the removals that were tried (`can_bypass`), and whether the model runs without them.
    """

    model: nn.Module
    layers: nn.ModuleList
    blocks: tuple[Block, ...]
    traces: tuple[BlockTrace, ...]
    tried: dict[Removal, bool] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether weights of blocks are loaded for each pass through them, so that passes should share the loading."""
        return is_offloaded(self.layers)

    @cached_property
    def has_independent_blocks(self) -> bool:
        """Whether no block needs another one to run: all that it takes from those before are the hidden states.

        Found by passes of four tokens without some of the blocks. Two blocks differ in at least one binary digit of
        their indices, so that leaving out those with a digit of 0, then those with 1, for every digit, leaves each
        block out while each other one runs: 2 log2(N) passes of half the model. Where each pass reads the weights anew,
        one pass first tries to show more than that.
        """
        if self.is_offloaded and self._runs_block_by_block:
            return True
        for digit in range((self.depth - 1).bit_length()):
            for value in (0, 1):
                half = [i for i in range(self.depth) if i >> digit & 1 == value]
                if not _runs_without(self, half):
                    return False
        return True

    def can_bypass(self, removed: Collection[int]) -> bool:
        """Whether the model runs while these blocks do not. Where blocks need others, that is tried on four tokens."""
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
        tokens: passes that start at the middle and at the last block give the logits of the whole pass.
        """
        if not self.has_independent_blocks or any(trace.rests for trace in self.traces):
            return False
        if self.is_offloaded:
            return self._runs_block_by_block

        starts = (self.depth // 2, self.depth - 1)
        with frozen(self.model), torch.no_grad():
            with kept_streams(self, starts) as streams:
                whole = _TRIAL.forward(self.model)  # (1, 4, vocabulary)
            for start in starts:
                try:
                    with resumed(self, (), start, streams[start]):
                        logits = _TRIAL.forward(self.model)
                except _NOT_COMPUTED:
                    return False
                if not _same(logits, whole):
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
                equal.append(_same(stream_in(alone), stream_in(output)))
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


def trace_model(model: nn.Module) -> TracedModel:
    """Find the blocks, run a few tokens through the model, note what each block does, and prove that gates can act.

    Proven at run time: gates of one change no bit of a block's output; gates of zero on the branches found make it the
    identity, otherwise the gate acts on the whole block; each block receives what the one before it returned.

    Raises:
        ValueError: one of these does not hold, a block did not run exactly once (those that attend to images may rest),
            or the model is not causal.
    """
    layers, blocks = find_stack(model).layers, find_blocks(model)
    ran: list[int] = []  # the blocks in the order in which they ran; then what entered and what left each:
    streams: list[tuple[Tensor, Tensor]] = []
    further: tuple[Any, ...] = ()  # what the last block returned besides the stream
    traces: dict[int, BlockTrace] = {}

    def tracing(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal further
            stream = stream_of(args, kwargs)
            with resident(layers[i]):
                branches = _proven_branches(run, args, kwargs)
                output = run(*args, **kwargs)
            left = stream_in(output)
            if not isinstance(left, Tensor) or left.shape != stream.shape:
                raise ValueError(f"block {i} of {type(model).__name__} does not return the residual stream")

            if i - 1 in traces:
                passed = [_argument_that_is(value, kwargs) for value in further]
                traces[i - 1] = replace(traces[i - 1], passed=tuple(passed))

            samples, shape = len(_TRACED_IDS), stream.shape
            batch_dim = shape.index(samples) if samples in shape else 0
            further = () if left is output else tuple(output[1:])
            traces[i] = BlockTrace(branches, 0 if left is output else len(output), batch_dim)
            ran.append(i)
            streams.append((stream, left))
            return output

        return forward

    token_ids = torch.tensor(_TRACED_IDS, device=input_device(model))  # (3, 4)
    with ExitStack() as patches, torch.no_grad():
        patches.enter_context(frozen(model))
        for i, layer in enumerate(layers):
            patches.enter_context(patched_forward(layer, tracing(i, layer.forward)))
        logits = model(input_ids=token_ids, use_cache=False).logits  # (3, 4, vocabulary)

    _check_causal(model, logits)
    for i, block in enumerate(blocks):
        if i not in traces and looks_at_images(block):
            traces[i] = BlockTrace(0, 0, rests=True)
        elif ran.count(i) != 1:
            raise ValueError(f"block {i} of {type(model).__name__} ran {ran.count(i)} times in one pass, not once")
    for i, ((_, left), (entered, _)) in enumerate(pairwise(streams)):
        if not torch.equal(left.to(entered.device), entered):
            raise ValueError(f"{type(model).__name__} changes the hidden states between its blocks {i} and {i + 1}")

    in_order = [traces[i] for i in range(len(blocks))]
    return TracedModel(model, layers, tuple(blocks), tuple(in_order))


def _argument_that_is(value: Any, kwargs: dict[str, Any]) -> str:
    """The name of the argument that has this very value; "" if there is none."""
    for name, given in kwargs.items():
        if given is value and value is not None:
            return name
    return ""


def _check_causal(model: nn.Module, logits: Tensor) -> None:
    """Refuse a model in which the last token changes the predictions before it. logits: of _TRACED_IDS."""
    before = logits[:, :-1]
    rounding = _ROUNDING * torch.finfo(logits.dtype).eps * before.abs().max()
    if (before[0] - before[1]).abs().max() > rounding:
        raise ValueError(
            f"{type(model).__name__} is not causal: a token changes the predictions before it. "
            "blockspin shortens decoder-only language models, not encoders"
        )


def _proven_branches(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of residual branches; 0 unless gates of 0 make the block the identity and gates of 1 do nothing."""
    stream = stream_of(args, kwargs)
    untouched = stream_in(run(*args, **kwargs))
    with ResidualBranches(stream, torch.zeros_like) as closed_branches:
        identity = stream_in(run(*args, **kwargs))
    with ResidualBranches(stream, torch.clone) as open_branches:
        same = stream_in(run(*args, **kwargs))

    if identity is not closed_branches.stream or same is not open_branches.stream:
        return 0
    proven = torch.equal(identity, stream.to(identity.device)) and _same(same, untouched)
    return open_branches.number if proven else 0


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal to rounding; weights that are not numbers are refused where the loss shows them."""
    largest = float(expected.abs().nan_to_num(0.0).max())
    rounding = _ROUNDING * torch.finfo(expected.dtype).eps * largest
    return torch.allclose(found, expected, rtol=0, atol=rounding, equal_nan=True)


@contextmanager
def skipped(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, the removed blocks pass their input on at no cost: the shortened model without building it.

    Where other blocks need them, they run all the same and leave the stream as it was.
    """
    removed = check_removal(removed, traced.depth)
    leaving_out = _bypassed if traced.can_bypass(removed) else closed
    with leaving_out(traced, removed):
        yield


@contextmanager
def _bypassed(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, these blocks do not run."""

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
        for i in removed:
            patches.enter_context(patched_forward(traced.layers[i], passing(traced.traces[i])))
        yield


@contextmanager
def closed(traced: TracedModel, removed: Collection[int]) -> Iterator[None]:
    """Inside, the removed blocks run but leave the residual stream as it was: gates of zero without any rounding."""

    def closing(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return with_stream(run(*args, **kwargs), stream_of(args, kwargs))

        return forward

    with ExitStack() as patches:
        for i in check_removal(removed, traced.depth):
            layer = traced.layers[i]
            patches.enter_context(patched_forward(layer, closing(layer.forward)))
        yield


@contextmanager
def kept_streams(
    traced: TracedModel, blocks: Collection[int], memory_limit: int = 2**63
) -> Iterator[dict[int, Tensor]]:
    """Keeps the hidden states that enter some blocks in the pass made inside: block -> (batch, length, width).

    memory_limit: bytes; where they do not suffice, the states of the deepest blocks are kept.
    """
    streams: dict[int, Tensor] = {}

    def keeping(block: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            streams[block] = stream_of(args, kwargs)
            drop_shallowest(streams, memory_limit)

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            handle = traced.layers[block].register_forward_pre_hook(keeping(block), with_kwargs=True)
            hooks.callback(handle.remove)
        yield streams


def drop_shallowest(streams: dict[int, Tensor], memory_limit: int) -> None:
    """Delete hidden states, those of the first blocks first, until the others fit into so many bytes."""
    held = 0  # bytes
    for stream in streams.values():
        held += stream.nbytes
    while streams and held > memory_limit:
        held -= streams.pop(min(streams)).nbytes


@contextmanager
def resumed(traced: TracedModel, removed: Collection[int], start: int, stream: Tensor) -> Iterator[None]:
    """Inside, a pass starts at a block with the hidden states that enter it, and goes on without the removed blocks.

    The rest of the model (embeddings, masks, final norm, head) runs as always, so that nothing needs to be known about
    it. Only for models that share passes.
    """

    def entering(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return with_entering(args, kwargs, stream)

    # `skipped` refuses to skip every block; what block 0 computes here is not used.
    skip = {*removed, *range(start)}
    if len(skip) == traced.depth:
        skip.remove(0)
    with ExitStack() as undo:
        undo.enter_context(skipped(traced, skip))
        handle = traced.layers[start].register_forward_pre_hook(entering, with_kwargs=True)
        undo.callback(handle.remove)
        yield


@contextmanager
def at_the_end(traced: TracedModel, stream: Tensor) -> Iterator[None]:
    """Inside, no block runs in a pass: the rest of the model goes on with the hidden states that leave the last one."""

    def entering(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return with_entering(args, kwargs, stream)

    with ExitStack() as undo:
        undo.enter_context(_bypassed(traced, range(traced.depth)))
        handle = traced.layers[0].register_forward_pre_hook(entering, with_kwargs=True)
        undo.callback(handle.remove)
        yield


def block_calls(traced: TracedModel, batch: Batch) -> list[BlockCall]:
    """What each block is given in a pass over a batch in which no block runs."""
    with _bypassed(traced, range(traced.depth)), noted_calls(list(traced.layers)) as calls:
        batch.forward(traced.model, last_logits=True)
    return calls


def _runs_without(traced: TracedModel, removed: Collection[int]) -> bool:
    """Whether the model runs on a few tokens while these blocks do not."""
    try:
        with frozen(traced.model), torch.no_grad(), _bypassed(traced, removed):
            _TRIAL.forward(traced.model)
    except _NOT_COMPUTED:
        return False
    return True
