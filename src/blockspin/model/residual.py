"""The residual stream: how a block takes it, adds its branches to it and returns it; and how a block's forward is
replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ADDITIONS = {"add", "__add__", "__radd__", "__iadd__", "add_"}


class ResidualBranches(TorchFunctionMode):
    """Follows the residual stream through one block and passes each branch through `gate` before it is added.

    A block adds its branches to the residual stream: h <- h + branch(h), once or twice. Which additions those are is
    not listed per architecture but observed: while a block runs, every addition to the very tensor that entered it is
    a residual addition, its result is the stream from there on, and what was added is a branch.
    """

    def __init__(self, stream: Tensor, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stream, self.gate = stream, gate
        self.number = 0  # branches seen so far

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # A gate that asks for the number holds this object, and would keep the stream until the collector comes by.
        del self.gate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS and len(args) == 2 and (args[0] is self.stream or args[1] is self.stream):
            left, right = args
            if left is not self.stream:
                left = self.gate(left)
            if right is not self.stream:
                right = self.gate(right)
            self.stream = func(left, right, **(kwargs or {}))
            self.number += 1
            return self.stream

        result = func(*args, **(kwargs or {}))
        # accelerate moves the stream between devices; it stays the stream.
        if name == "to" and args[0] is self.stream and result.dtype == self.stream.dtype:
            self.stream = result
        return result


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that enter a block, (batch, length, width)."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def with_entering(args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor) -> tuple[Any, Any]:
    """The arguments of a block, with other hidden states that enter it."""
    return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})


def stream_in(output: Any) -> Any:
    """The residual stream in what a block returned: the first of several outputs, or the only one."""
    return output[0] if isinstance(output, tuple | list) else output


def argument_that_is(value: Any, kwargs: dict[str, Any]) -> str:
    """The name of the argument that has this very value; "" if there is none."""
    for name, given in kwargs.items():
        if given is value and value is not None:
            return name
    return ""


def with_stream(output: Any, stream: Tensor) -> Any:
    """What a block returned, with another residual stream in it."""
    if not isinstance(output, tuple | list):
        return stream
    make = getattr(output, "_make", type(output))  # named tuples are made by _make
    return make((stream, *output[1:]))


@contextmanager
def patched_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `layer` runs this function as its forward pass."""
    own = layer.__dict__.get("forward")  # set where accelerate hooks the layer
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


@contextmanager
def entered_by(layer: nn.Module, stream: Tensor) -> Iterator[None]:
    """Inside, these hidden states enter a block, whatever it is given."""

    def entering(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return with_entering(args, kwargs, stream)

    handle = layer.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def kept_streams(
    layers: nn.ModuleList, blocks: Collection[int], memory_limit: int = 2**63
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
            handle = layers[block].register_forward_pre_hook(keeping(block), with_kwargs=True)
            hooks.callback(handle.remove)
        yield streams


def drop_shallowest(streams: dict[int, Tensor], memory_limit: int) -> None:
    """Delete hidden states, those of the first blocks first, until the others fit into so many bytes."""
    held = 0  # bytes
    for stream in streams.values():
        held += stream.nbytes
    while streams and held > memory_limit:
        held -= streams.pop(min(streams)).nbytes
