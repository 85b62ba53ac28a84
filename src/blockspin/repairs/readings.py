"""Finds the linear maps that read the residual stream, most often through a norm, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.residual import ResidualBranches
from ..model.tracing import TracedModel
from .projections import check_weights, shared_weights


@dataclass(frozen=True)
class Reading:
    """Linear maps of a block that have the same input, made of the residual stream: in-projections.

    names: of the maps, inside the block. norm: the module that makes their input; "": they take the stream itself.
    additions: how many of the block's additions come before. has_bias: whether every one of the maps has a bias.
    """

    names: tuple[str, ...]
    norm: str
    additions: int
    has_bias: bool

    def of(self, layer: nn.Module, stream: Tensor) -> Tensor:
        """What the maps get when the stream is this one, (batch, length, width)."""
        read: Tensor = layer.get_submodule(self.norm)(stream) if self.norm else stream
        return read


@dataclass
class _Seen:
    """What one block did with its stream in one pass.

    made: what modules made of the stream, by identity: (the tensor, the module's name, additions before).
    read: for each linear map whose input is the stream, or was made of it, the norm and the additions before.
    """

    made: dict[int, tuple[Tensor, str, int]]
    read: dict[str, tuple[str, int]]


def readings_of(traced: TracedModel, block: int, run: Callable[[], Any], stream: Tensor) -> list[Reading]:
    """The in-projections of one block, those with the same input together, in the order in which they run.

    A map is one if its input is the very stream, or the very output of a module that was given the stream and nothing
    else. Maps that share their weights with another place of the model, and those that see some tokens only (routed
    experts), are left out.

    run: runs the block on a few tokens, which enter as `stream`.

    Raises:
        ValueError: the weights of such a map are quantised.
    """
    seen = _watched(traced.layers[block], run, stream)
    told_apart = traced.traces[block].branches > 0
    return _grouped(traced.layers[block], block, seen, shared_weights(traced, block), told_apart)


def _watched(layer: nn.Module, run: Callable[[], Any], stream: Tensor) -> _Seen:
    """What a block does with its stream."""
    seen = _Seen({}, {})
    branches = ResidualBranches(stream, lambda branch: branch)

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if args[0] is branches.stream:
                seen.read[name] = ("", branches.number)
            elif id(args[0]) in seen.made:
                seen.read[name] = seen.made[id(args[0])][1:]

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            if len(given) == 1 and given[0] is branches.stream and isinstance(output, Tensor):
                seen.made[id(output)] = (output, name, branches.number)  # held, so that no other gets its id

        return hook

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                hooks.callback(module.register_forward_pre_hook(entering(name), with_kwargs=True).remove)
            elif name:
                hooks.callback(module.register_forward_hook(leaving(name), with_kwargs=True).remove)
        with branches:
            run()
    return seen


def _grouped(layer: nn.Module, block: int, seen: _Seen, shared: set[str], told_apart: bool) -> list[Reading]:
    """The in-projections of one block by what they read.

    shared: weights that another place has too. told_apart: whether the additions of the block are known.
    """
    together: dict[tuple[str, int], list[str]] = {}
    for name, (norm, additions) in seen.read.items():
        module: Any = layer.get_submodule(name)
        if f"{name}.weight" in shared or (additions and not told_apart):
            continue
        check_weights(module, name, block)
        together.setdefault((norm, additions), []).append(name)

    readings = []
    for (norm, additions), names in together.items():
        biases = [layer.get_submodule(name).bias is not None for name in names]
        readings.append(Reading(tuple(names), norm, additions, all(biases)))
    return readings
