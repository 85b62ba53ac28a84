"""The residual branches of a block: which modules serve each of them, and running the block without some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import count_parameters
from .residual import ResidualBranches, patched_forward, stream_in, stream_of, with_stream

ROUNDING = 50  # differences up to so many units of the last place, of the largest value, are rounding


@dataclass(frozen=True)
class Part:
    """A module that serves one residual branch alone.

    name: inside the block, e.g. "self_attn".
    outputs: the length of the tuple or list that it returns; 0: a bare tensor.
    passes_on: its first input and its first output have the shape of the residual stream, so that the one can stand in
        for the other where only the shape matters.
    """

    name: str
    outputs: int
    passes_on: bool


@dataclass(frozen=True)
class BlockTrace:
    """What a block did when it ran.

    branches: its number of residual branches; 0: they could not be told apart, so the gate acts on the whole block.
    outputs: the length of the tuple or list that it returns; 0: a bare tensor.
    batch_dim: the dimension of the residual stream that counts samples.
    passed: for each further output, the argument in which the next block takes it ("": it does not).
    rests: it attends to images and does not run on text.
    parts: for each branch the modules that serve it alone; empty where that was not asked for.
    """

    branches: int
    outputs: int
    batch_dim: int = 0
    passed: tuple[str, ...] = ()
    rests: bool = False
    parts: tuple[tuple[Part, ...], ...] = ()


def proven_branches(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], untouched: Tensor) -> int:
    """The number of residual branches; 0 unless gates of 0 make the block the identity and gates of 1 do nothing.

    untouched: the stream as the block leaves it without gates.
    """
    stream = stream_of(args, kwargs)
    with ResidualBranches(stream, torch.zeros_like) as closed_branches:
        identity = stream_in(run(*args, **kwargs))
    with ResidualBranches(stream, torch.clone) as open_branches:
        opened = stream_in(run(*args, **kwargs))

    if identity is not closed_branches.stream or opened is not open_branches.stream:
        return 0
    proven = torch.equal(identity, stream.to(identity.device)) and same(opened, untouched)
    return open_branches.number if proven else 0


def find_parts(layer: nn.Module, run: Callable[[], Any], stream: Tensor) -> tuple[tuple[Part, ...], ...]:
    """For each residual branch of a block the modules that serve it alone, the outermost ones.

    A module serves a branch if noise on its output changes what the branch adds, while the stream is held as it was.
    Where it serves several, like a norm before parallel branches, the modules inside it are tried.

    run: runs the block on a few tokens, which enter as `stream`.
    """
    clean: list[Tensor] = []  # what each branch adds

    def keep(branch: Tensor) -> Tensor:
        clean.append(branch)
        return branch

    with ResidualBranches(stream, keep):
        run()

    parts: list[list[Part]] = [[] for _ in clean]

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if not count_parameters(child):
                continue
            served, part = _served_branches(child, prefix + name, run, stream, clean)
            if len(served) == 1 and part is not None:
                parts[served.pop()].append(part)
            else:
                search(child, f"{prefix}{name}.")

    search(layer, "")
    return tuple(map(tuple, parts))


def _served_branches(
    module: nn.Module, name: str, run: Callable[[], Any], stream: Tensor, clean: Sequence[Tensor]
) -> tuple[set[int], Part | None]:
    """The branches that noise on the output of a module changes, and how the module runs; None if it does not."""
    served: set[int] = set()
    part: Part | None = None

    def disturb(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal part
        first = stream_in(output)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return output

        entered = args[0] if args else kwargs.get("hidden_states")
        same_shape = isinstance(entered, Tensor) and entered.shape == first.shape == stream.shape
        part = Part(name, 0 if first is output else len(output), same_shape)
        return with_stream(output, first + noise_like(first))

    def compare(branch: Tensor) -> Tensor:
        expected: Tensor = clean[branches.number]
        rounding = torch.finfo(expected.dtype).eps ** 0.5  # far above what rounding does, far below the noise
        if (branch - expected).float().norm() > rounding * expected.float().norm():
            served.add(branches.number)
        return expected

    handle = module.register_forward_hook(disturb, with_kwargs=True)
    try:
        with ResidualBranches(stream, compare) as branches:
            run()
    finally:
        handle.remove()
    return served, part


def followed(run: Callable[[], Any], stream: Tensor) -> tuple[Any, list[Tensor]]:
    """What a block returns, and the residual stream after each of its additions to it.

    run: runs the block; stream: what enters it.
    """
    before: list[Tensor] = []  # each addition

    def keep(branch: Tensor) -> Tensor:
        before.append(branches.stream)
        return branch

    with ResidualBranches(stream, keep) as branches:
        output = run()
    return output, [*before[1:], stream_in(output)]


@contextmanager
def without_branches(layer: nn.Module, gone: Collection[int], bypassed: Sequence[Part] = ()) -> Iterator[None]:
    """Inside, a block adds nothing of some of its branches to the residual stream.

    gone: the branches. bypassed: modules that serve these alone and do not run; what they would return plays no part.
    """

    def closing(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            def gate(branch: Tensor) -> Tensor:
                return torch.zeros_like(branch) if branches.number in gone else branch

            with ResidualBranches(stream_of(args, kwargs), gate) as branches:
                return run(*args, **kwargs)

        return forward

    def passing(outputs: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered = stream_of(args, kwargs)
            stand_in = entered.view_as(entered)  # another tensor than the stream, which is known by its identity
            return (stand_in, *[None] * (outputs - 1)) if outputs else stand_in

        return forward

    with ExitStack() as patches:
        patches.enter_context(patched_forward(layer, closing(layer.forward)))
        for part in bypassed:
            if part.passes_on:
                patches.enter_context(patched_forward(layer.get_submodule(part.name), passing(part.outputs)))
        yield


def noise_like(output: Tensor) -> Tensor:
    """Noise as large as an output, the same in every call."""
    size = float(output.float().square().mean().sqrt()) or 1.0
    noise: Tensor = size * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(output.device, output.dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal to rounding; weights that are not numbers are refused where the loss shows them."""
    largest = float(expected.abs().nan_to_num(0.0).max())
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * largest
    equal: bool = torch.allclose(found, expected, rtol=0, atol=rounding, equal_nan=True)
    return equal
