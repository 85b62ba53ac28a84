"""Multiplies the residual branches of blocks by gates alpha, and skips blocks; leaves the model as it was.

A block adds its branches to the residual stream: h <- h + branch(h), once or twice. Which additions those are is not
listed per architecture but observed: while a block runs, every addition to the very tensor that entered it is a
residual addition, its result is the stream from there on, and what was added is a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .batches import frozen, input_device
from .blocks import check_removal, find_blocks, find_stack, looks_at_images

_ADDITIONS = {"add", "__add__", "__radd__", "__iadd__", "add_"}


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


class _Residual(TorchFunctionMode):
    """Follows the residual stream through one block and passes each branch through `gate` before it is added."""

    def __init__(self, stream: Tensor, gate: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.stream, self.gate, self.branches = stream, gate, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS and len(args) == 2 and any(a is self.stream for a in args):
            if self.gate is not None:
                args = tuple(a if a is self.stream else self.gate(a) for a in args)
            self.stream = func(*args, **(kwargs or {}))
            self.branches += 1
            return self.stream
        result = func(*args, **(kwargs or {}))
        # accelerate moves the stream between devices; it stays the stream.
        if name == "to" and args[0] is self.stream and result.dtype == self.stream.dtype:
            self.stream = result
        return result


class _Gate(torch.autograd.Function):
    """alpha * branch; the gradient of alpha is summed in float32 or wider whatever the dtype of the branch.

    open_: all gates are 1, as they are where gradients are taken; then nothing needs to be multiplied.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, alpha: Tensor, open_: bool) -> Tensor:
        ctx.save_for_backward(branch, alpha)
        ctx.open_ = open_
        return branch.view_as(branch) if open_ else branch * _broadcast(alpha, branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        branch, alpha = ctx.saved_tensors
        wide = torch.promote_types(branch.dtype, torch.float32)
        products = torch.linalg.vecdot(grad.to(wide).flatten(1), branch.to(wide).flatten(1))  # (batch,)
        if not ctx.needs_input_grad[0]:
            return None, products.to(alpha.dtype), None
        return grad if ctx.open_ else grad * _broadcast(alpha, branch), products.to(alpha.dtype), None


def _broadcast(alpha: Tensor, branch: Tensor) -> Tensor:
    return alpha.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def _gate_branch(branch: Tensor, alpha: Tensor, open_: bool) -> Tensor:
    """branch: (batch, ...); alpha: (batch,)."""
    assert branch.shape[0] == alpha.shape[0], f"{alpha.shape[0]} gates for a branch of shape {tuple(branch.shape)}"
    gated: Tensor = _Gate.apply(branch, alpha.to(branch.device), open_)  # type: ignore[no-untyped-call]
    return gated


@contextmanager
def _patched_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = layer.__dict__.get("forward")  # set where accelerate hooks the layer
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def trace_blocks(model: nn.Module) -> list[BlockTrace]:
    """Run a few tokens through the model, note what each block does, and prove that gates can act on it.

    Returns one trace a block. Proven at run time: gates of one change no bit of a block's output; gates of zero on the
    branches found make it the identity, otherwise the gate acts on the whole block; each block receives what the one
    before it returned.

    Raises:
        ValueError: one of these does not hold, a block did not run exactly once (those that attend to images may rest),
            or the model is not causal.
    """
    stack = find_stack(model)[1]
    traces: list[list[BlockTrace]] = [[] for _ in stack]
    streams: list[tuple[Tensor, Tensor]] = []
    further: list[Any] = []

    def tracing(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_of(args, kwargs)
            branches = _proven_branches(run, args, kwargs)
            output = run(*args, **kwargs)
            whole, outputs = _whole(output)
            if not isinstance(whole, Tensor) or whole.shape != stream.shape:
                raise ValueError(f"block {i} of {type(model).__name__} does not return the residual stream")
            batch_dim = next((d for d, size in enumerate(stream.shape) if size == len(token_ids)), 0)
            if further:
                passed = tuple(next((key for key, v in kwargs.items() if v is x is not None), "") for x in further[-1])
                traces[i - 1][:] = [replace(trace, passed=passed) for trace in traces[i - 1]]
            further.append(output[1:] if outputs else ())
            traces[i].append(BlockTrace(branches, outputs, batch_dim))
            streams.append((stream, whole))
            return output

        return forward

    token_ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [5, 6, 7, 8]], device=input_device(model))
    with ExitStack() as patches, torch.no_grad():
        patches.enter_context(frozen(model))
        for i, layer in enumerate(stack):
            patches.enter_context(_patched_forward(layer, tracing(i, layer.forward)))
        logits = model(input_ids=token_ids, use_cache=False).logits[:, :3]
    rounding = 50 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0] - logits[1]).abs().max() > rounding:
        raise ValueError(
            f"{type(model).__name__} is not causal: a token changes the predictions before it. "
            "blockspin shortens decoder-only language models, not encoders"
        )
    for block, trace in zip(find_blocks(model), traces, strict=True):
        if not trace and looks_at_images(block):
            trace.append(BlockTrace(0, 0, rests=True))
    for i, trace in enumerate(traces):
        if len(trace) != 1:
            raise ValueError(f"block {i} of {type(model).__name__} ran {len(trace)} times in one pass, not once")
    for i, ((_, left), (entered, _)) in enumerate(pairwise(streams)):
        if not torch.equal(left.to(entered.device), entered):
            raise ValueError(f"{type(model).__name__} changes the hidden states between its blocks {i} and {i + 1}")
    return [trace[0] for trace in traces]


def _proven_branches(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The residual branches of a block; 0 unless gates of zero on them make it the identity, of one nothing."""
    stream = stream_of(args, kwargs)
    untouched, _ = _whole(run(*args, **kwargs))
    with _Residual(stream, torch.zeros_like) as closed:
        identity, _ = _whole(run(*args, **kwargs))
    with _Residual(stream, torch.clone) as opened:
        same, _ = _whole(run(*args, **kwargs))
    if identity is not closed.stream or same is not opened.stream:
        return 0
    rounding = 50 * torch.finfo(stream.dtype).eps * float(untouched.abs().max())
    proven = torch.equal(identity, stream.to(identity.device)) and torch.allclose(
        same, untouched, rtol=0, atol=rounding
    )
    return opened.branches if proven else 0


def _with_stream(output: Any, stream: Tensor) -> Any:
    """What a block returned with another residual stream, in a tuple of the same type; named ones are made by _make."""
    make = getattr(output, "_make", type(output))
    return make((stream, *output[1:]))


def _whole(output: Any) -> tuple[Any, int]:
    """The residual stream in what a block returned, and the length of the tuple or list that held it."""
    return (output[0], len(output)) if isinstance(output, tuple | list) else (output, 0)


@contextmanager
def gated(
    model: nn.Module, alphas: Tensor, traces: Sequence[BlockTrace], gradient_checkpointing: bool = False
) -> Iterator[None]:
    """Inside, block i of `model` computes h <- h + alpha_i * branch(h) for each of its branches.

    alphas: (batch, num_blocks), a gate for every sample and block; all ones leaves the logits bit-identical.
    traces: from `trace_blocks`. Where a block's branches cannot be told apart, the gate acts on the whole block:
    h <- h + alpha_i * (block(h) - h).
    gradient_checkpointing: keep only the input of each block and compute it again in the backward pass.
    """
    _, stack = find_stack(model)
    open_ = bool((alphas == 1).all())

    def gating(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def gate(branch: Tensor) -> Tensor:
            return _gate_branch(branch, alphas[:, i], open_)

        def by_branch(*args: Any, **kwargs: Any) -> Any:
            with _Residual(stream_of(args, kwargs), gate):
                return run(*args, **kwargs)

        def by_block(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            whole, outputs = _whole(output)
            delta = (whole - stream_of(args, kwargs).to(whole.device)).movedim(traces[i].batch_dim, 0)
            change = (gate(delta) - delta).movedim(0, traces[i].batch_dim)
            whole = whole + change  # in this order it is exactly the block's output at alpha = 1
            return _with_stream(output, whole) if outputs else whole

        forward = by_branch if traces[i].branches else by_block
        if not gradient_checkpointing:
            return forward
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    with ExitStack() as patches:
        for i, layer in enumerate(stack):
            patches.enter_context(_patched_forward(layer, gating(i, layer.forward)))
        yield


@contextmanager
def skipped(model: nn.Module, removed: Sequence[int], traces: Sequence[BlockTrace]) -> Iterator[None]:
    """Inside, the removed blocks pass their input on at no cost: the shortened model without building it."""
    _, stack = find_stack(model)

    def passing(trace: BlockTrace) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_of(args, kwargs)
            further = [kwargs.get(name) for name in trace.passed] or [None] * (trace.outputs - 1)
            return (stream, *further) if trace.outputs else stream

        return forward

    with ExitStack() as patches:
        for i in check_removal(removed, len(stack)):
            patches.enter_context(_patched_forward(stack[i], passing(traces[i])))
        yield


@contextmanager
def closed(model: nn.Module, removed: Sequence[int]) -> Iterator[None]:
    """Inside, the removed blocks run but leave the residual stream as it was: gates of zero without any rounding."""
    stack = find_stack(model)[1]

    def closing(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            stream = stream_of(args, kwargs)
            return _with_stream(output, stream) if _whole(output)[1] else stream

        return forward

    with ExitStack() as patches:
        for i in check_removal(removed, len(stack)):
            patches.enter_context(_patched_forward(stack[i], closing(stack[i].forward)))
        yield


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that enter a block, (batch, length, width)."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream
