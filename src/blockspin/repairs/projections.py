"""Finds the linear maps whose output is added to the residual stream, by watching what a change of it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.batches import frozen
from ..model.blocks import find_stack
from ..model.branches import followed, noise_like
from ..model.head import wide_dtype
from ..model.offload import resident
from ..model.probe import probe_ids
from ..model.residual import patched_forward, stream_of
from ..model.tracing import TracedModel

_TOLERANCE = 1e-3  # of the change, in float32
_TOLERANCE_HALF = 5e-2  # in dtypes of 16 bits


@dataclass(frozen=True)
class Projection:
    """A linear map of a block whose output reaches the residual stream as it is, but for a constant factor.

    name: inside the block, e.g. "mlp.down_proj".
    addition: which of the block's additions to the stream takes its output, from 0.
    factor: what its output is multiplied by on the way.
    """

    name: str
    addition: int
    factor: float


@dataclass
class Observation:
    """What a block did in one pass.

    inputs: what entered each watched module, (..., inputs).
    additions: the residual stream after each addition; the last is what the block returned.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    additions: list[Tensor] = field(default_factory=list)


def find_projections(traced: TracedModel) -> list[list[Projection]]:
    """The out-projections of every block, in the order in which they run.

    Noise is added to the output of each linear map in turn. The map is an out-projection where the first addition to
    the stream that changes, changes by a multiple of this very noise. Where routed experts see some of the tokens only,
    a norm follows the map, or a gate weighs its output token by token, it does not, and the map is left out; so are
    maps that share their weights with another place of the model.

    Raises:
        ValueError: the weights of an out-projection are quantised.
    """
    found: list[list[Projection]] = [[] for _ in traced.layers]

    def look(block: int, run: Callable[[], Any], stream: Tensor) -> None:
        found[block] = projections_of(traced, block, run, stream)

    look_at_blocks(traced, look)
    return found


def look_at_blocks(traced: TracedModel, look: Callable[[int, Callable[[], Any], Tensor], None]) -> None:
    """Run a few tokens through a model, and let `look` see each block, whose weights are read once for it.

    look: is given the block, a function that runs it, and the stream that enters it, (batch, length, width).
    """

    def looking(block: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with resident(traced.layers[block]):
                look(block, lambda: run(*args, **kwargs), stream_of(args, kwargs))
                return run(*args, **kwargs)

        return forward

    with frozen(traced.model), torch.no_grad(), ExitStack() as patches:
        for i, layer in enumerate(traced.layers):
            patches.enter_context(patched_forward(layer, looking(i, layer.forward)))
        traced.model(input_ids=probe_ids(traced.model), use_cache=False)


@contextmanager
def observed(traced: TracedModel, block: int, watched: Sequence[str] = ()) -> Iterator[Observation]:
    """Inside, a pass leaves in the observation what the block did.

    watched: modules inside the block whose inputs are kept.
    """
    layer = traced.layers[block]
    seen = Observation()

    def watching(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output, seen.additions = _followed(traced, block, lambda: run(*args, **kwargs), stream_of(args, kwargs))
            return output

        return forward

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen.inputs[name] = args[0]

        return hook

    with ExitStack() as undo:
        undo.enter_context(patched_forward(layer, watching(layer.forward)))
        for name in watched:
            undo.callback(layer.get_submodule(name).register_forward_pre_hook(keeping(name)).remove)
        yield seen


def change(module: nn.Module, solution: Tensor) -> None:
    """Add a solution to the weights of an out-projection. The old tensors stay as they are: others may share them.

    solution: (inputs, outputs), or (inputs + 1, outputs) where the map has a bias, whose change comes last.
    """
    weight: Any = module.weight
    bias: Any = module.bias
    step = solution if bias is None else solution[:-1]
    module.weight = _moved(weight, step if isinstance(module, Conv1D) else step.T)
    if bias is not None:
        module.bias = _moved(bias, solution[-1])


def matrix(module: nn.Module) -> Tensor:
    """What `with_constant` is multiplied by, (inputs, outputs), the bias last."""
    weight: Any = module.weight
    bias: Any = module.bias
    rows = weight.detach() if isinstance(module, Conv1D) else weight.detach().T
    return rows if bias is None else torch.cat([rows, bias.detach()[None]])


def with_constant(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear map multiplies: its inputs (tokens, inputs) and, where it has a bias, a column of ones."""
    if module.bias is None:
        return inputs
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def num_inputs(module: nn.Module) -> int:
    """The width of `with_constant`."""
    weight: Any = module.weight
    return int(weight.shape[0 if isinstance(module, Conv1D) else 1]) + (module.bias is not None)


def _followed(traced: TracedModel, block: int, run: Callable[[], Any], stream: Tensor) -> tuple[Any, list[Tensor]]:
    """What a block returns, and the residual stream after each of its additions; after the whole block, where its
    branches cannot be told apart."""
    output, additions = followed(run, stream)
    return output, additions if traced.traces[block].branches else additions[-1:]


def projections_of(traced: TracedModel, block: int, run: Callable[[], Any], stream: Tensor) -> list[Projection]:
    """The out-projections of one block. run: runs it on a few tokens, which enter as `stream`."""
    layer, shared = traced.layers[block], shared_weights(traced, block)
    outputs: dict[str, Tensor] = {}  # of each linear map that runs, in this order

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                hooks.callback(module.register_forward_hook(keeping(name)).remove)
        _, unchanged = _followed(traced, block, run, stream)

    found = []
    for name, output in outputs.items():
        module = layer.get_submodule(name)
        if output.shape[-1] != stream.shape[-1] or output.numel() != stream.numel():
            continue
        noise = noise_like(output)
        handle = module.register_forward_hook(lambda module, args, output, noise=noise: output + noise)
        try:
            _, changed = _followed(traced, block, run, stream)
        finally:
            handle.remove()
        projection = _explained(name, unchanged, changed, noise)
        if projection is not None and f"{name}.weight" not in shared:
            check_weights(module, name, block)
            found.append(projection)
    return found


def _explained(name: str, unchanged: list[Tensor], changed: list[Tensor], noise: Tensor) -> Projection | None:
    """The projection whose output the noise was added to, if the first addition that changed did so by a multiple."""
    tolerance = _TOLERANCE_HALF if noise.dtype.itemsize < 4 else _TOLERANCE
    flat = noise.flatten().double()
    for addition, (old, new) in enumerate(zip(unchanged, changed, strict=True)):
        difference = (new - old).flatten().double().to(flat.device)
        if not difference.any():
            continue
        factor = float(difference @ flat / (flat @ flat))
        left = float((difference - factor * flat).norm() / difference.norm())
        return Projection(name, addition, factor) if left < tolerance else None
    return None


def shared_weights(traced: TracedModel, block: int) -> set[str]:
    """The parameters of a block that another place of the model has too, by their names in the block."""
    uses = Counter(id(p) for _, p in traced.model.named_parameters(remove_duplicate=False))
    own = traced.layers[block].named_parameters(remove_duplicate=False)
    shared = {name for name, p in own if uses[id(p)] > 1}

    # Of offloaded ones, each place has an empty tensor of its own.
    stack = find_stack(traced.model).name
    for pair in getattr(traced.model, "all_tied_weights_keys", {}).items():
        shared.update(name.removeprefix(f"{stack}.{block}.") for name in pair)
    return shared


def check_weights(module: nn.Module, name: str, block: int) -> None:
    """Refuse weights that are quantised.

    Raises:
        ValueError: they are.
    """
    weight: Any = module.weight
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(
            f"the weights of {name} in block {block} are quantised ({type(module).__name__}, {weight.dtype}), and "
            "repair changes them; repair the model first and quantise it afterwards"
        )


def _moved(parameter: Tensor, step: Tensor) -> nn.Parameter:
    """A parameter with `step` added in float32 or wider."""
    wide = wide_dtype(parameter)
    moved = parameter.detach().to(wide) + step.to(parameter.device, wide)
    return nn.Parameter(moved.to(parameter.dtype).contiguous(), parameter.requires_grad)
