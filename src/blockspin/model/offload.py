"""Blocks whose weights accelerate keeps in host memory or on disk, in memory for as long as they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import named_module_tensors
from torch import Tensor, nn


@dataclass(frozen=True)
class OffloadedTensor:
    """A parameter or buffer of a module that accelerate's hook loads before each pass through it.

    owner: the module that has it. name: there. key: its name in the weights of the hook.
    """

    owner: nn.Module
    name: str
    key: str
    hook: AlignDevicesHook

    @property
    def device(self) -> torch.device:
        """Where the module runs."""
        return torch.device(self.hook.execution_device)

    def load(self) -> Tensor:
        """The tensor in the dtype that the model has, where the module runs."""
        found: Tensor = self.hook.weights_map[self.key]
        return found.to(self.device, getattr(self.owner, self.name).dtype)


def offloading_hooks(module: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """The hooks in and below a module that load weights before a pass and drop them afterwards, with their modules."""
    for part in module.modules():
        attached = getattr(part, "_hf_hook", None)
        for hook in getattr(attached, "hooks", [attached]):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                yield part, hook


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights in or below a module are loaded for each pass through it, and not kept where it runs."""
    return any(True for _ in offloading_hooks(module))


def offloaded_tensors(module: nn.Module) -> list[OffloadedTensor]:
    """What the hooks in and below a module load."""
    found = []
    for part, hook in offloading_hooks(module):
        tensors = named_module_tensors(
            part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
        for key, _ in tensors:
            path, _, name = key.rpartition(".")
            found.append(OffloadedTensor(part.get_submodule(path), name, key, hook))
    return found


def running_device(module: nn.Module) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them."""
    for tensor in offloaded_tensors(module):
        return tensor.device
    return next(module.parameters()).device


def load_weights(module: nn.Module) -> list[Tensor]:
    """The offloaded tensors in and below a module, in the order of `offloaded_tensors`."""
    return [tensor.load() for tensor in offloaded_tensors(module)]


@contextmanager
def resident(module: nn.Module, weights: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Inside, the weights of a module stay where it runs, however often it runs; nothing happens where they do anyway.

    weights: what `load_weights` gave, where that has been called already.
    """
    tensors = offloaded_tensors(module)
    if weights is None:
        weights = load_weights(module)

    empty: list[tuple[OffloadedTensor, Tensor]] = []
    for tensor, value in zip(tensors, weights, strict=True):
        own = getattr(tensor.owner, tensor.name)
        empty.append((tensor, own))
        _put(tensor, nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value)

    # A hook that does not offload only moves what enters the module.
    hooks = {tensor.hook for tensor in tensors}
    for hook in hooks:
        hook.offload = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.offload = True
        for tensor, own in empty:
            _put(tensor, own)


def _put(tensor: OffloadedTensor, value: Tensor) -> None:
    """Give a module another tensor, without the checks of devices that `setattr` of a quantised module makes."""
    own = tensor.owner._parameters if isinstance(value, nn.Parameter) else tensor.owner._buffers
    own[tensor.name] = value  # type: ignore[assignment]


def resident_in_turn(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Each module, resident until the next one is asked for; a thread loads the weights of the next meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(load_weights, modules[0]) if modules else None
        for place, module in enumerate(modules):
            assert coming is not None
            weights = coming.result()
            following = modules[place + 1 : place + 2]
            coming = reader.submit(load_weights, following[0]) if following else None
            with resident(module, weights):
                del weights
                yield module
