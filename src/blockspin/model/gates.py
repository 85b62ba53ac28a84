"""Multiplies the residual branches of blocks by gates alpha; leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .head import wide_dtype
from .residual import ResidualBranches, patched_forward, stream_in, stream_of, with_stream
from .tracing import TracedModel


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
        branch, alpha = ctx.saved_tensors  # (batch, ...), (batch,)
        wide = wide_dtype(branch)
        products = torch.linalg.vecdot(grad.to(wide).flatten(1), branch.to(wide).flatten(1))  # (batch,)

        # The stream that enters the first block needs no gradient, and then its branches need none either.
        if not ctx.needs_input_grad[0]:
            return None, products.to(alpha.dtype), None
        return grad if ctx.open_ else grad * _broadcast(alpha, branch), products.to(alpha.dtype), None


def _broadcast(alpha: Tensor, branch: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, ...), in the dtype of the branch."""
    return alpha.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def _gate_branch(branch: Tensor, alpha: Tensor, open_: bool) -> Tensor:
    """The branch (batch, ...) of each sample, multiplied by the sample's gate, alpha (batch,)."""
    assert branch.shape[0] == alpha.shape[0], f"{alpha.shape[0]} gates for a branch of shape {tuple(branch.shape)}"
    gated: Tensor = _Gate.apply(branch, alpha.to(branch.device), open_)  # type: ignore[no-untyped-call]
    return gated


@contextmanager
def gated(traced: TracedModel, alphas: Tensor, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Inside, block i of the model computes h <- h + alpha_i * branch(h) for each of its branches; where the units are
    sub-layers, each branch has a gate of its own.

    alphas: (batch, num_units), a gate for every sample and unit; all ones leaves the logits bit-identical. Where a
    block's branches cannot be told apart, the gate acts on the whole block: h <- h + alpha_i * (block(h) - h).
    gradient_checkpointing: keep only the input of each block and compute it again in the backward pass.
    """
    open_ = bool((alphas == 1).all())

    def gating(i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        trace, units, of_branch = traced.traces[i], traced.units_in[i], traced.branches_in[i]

        def by_branch(*args: Any, **kwargs: Any) -> Any:
            def gate(branch: Tensor) -> Tensor:
                # A branch that is gone adds nothing, and has no gate.
                unit = of_branch.get(branches.number) if of_branch else units[0]
                return branch if unit is None else _gate_branch(branch, alphas[:, unit], open_)

            with ResidualBranches(stream_of(args, kwargs), gate) as branches:
                return run(*args, **kwargs)

        def by_block(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            left = stream_in(output)  # (batch, length, width), but some models count samples in another dimension
            delta = (left - stream_of(args, kwargs).to(left.device)).movedim(trace.batch_dim, 0)
            change = (_gate_branch(delta, alphas[:, units[0]], open_) - delta).movedim(0, trace.batch_dim)
            return with_stream(output, left + change)  # in this order it is exactly the block's output at alpha = 1

        return by_branch if trace.branches else by_block

    with ExitStack() as patches:
        for i, layer in enumerate(traced.layers):
            patches.enter_context(patched_forward(layer, gating(i, layer.forward)))
        if gradient_checkpointing:
            patches.enter_context(checkpointed(traced.layers))
        yield


@contextmanager
def checkpointed(layers: nn.ModuleList) -> Iterator[None]:
    """Inside, only the input of each block is kept for the backward pass, which runs the block again."""

    def checkpointing(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(patched_forward(layer, checkpointing(layer.forward)))
        yield
