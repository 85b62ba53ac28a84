"""Blocks whose weights accelerate keeps in host memory or on disk, in memory for as long as they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import named_module_tensors
from safetensors import safe_open
from torch import Tensor, nn

from ..memory import map_tensors

T = TypeVar("T")
_MEMORY = "_blockspin_memory"  # the attribute of a model with what `remembered` keeps


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

    @property
    def num_bytes(self) -> int:
        """What it takes where it is loaded."""
        empty: Tensor = getattr(self.owner, self.name)
        return empty.numel() * empty.itemsize

    def load(self) -> Tensor:
        """A copy of the tensor in the dtype that the model has, where the module runs.

        What accelerate gives may be a file in the address space, which is only read when the module uses it.
        """
        found: Tensor = self.hook.weights_map[self.key]
        return found.to(self.device, getattr(self.owner, self.name).dtype, copy=True)


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


def check_in_memory(model: nn.Module, purpose: str) -> None:
    """Refuse an offloaded model for what needs the weights themselves.

    purpose: what does, as the subject of a sentence: "a repair".

    Raises:
        ValueError: weights of the model are offloaded.
    """
    if is_offloaded(model):
        raise ValueError(
            f"{purpose} needs all weights where they run, and some of {type(model).__name__} are on disk or in another "
            "memory; load the model whole (--device-map cpu, or a GPU that holds it)"
        )


def offloaded_by_name(model: nn.Module) -> dict[str, OffloadedTensor]:
    """What the hooks in a model load, by the names in its state."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for tensor in offloaded_tensors(model):
        owner = names[id(tensor.owner)]
        found[f"{owner}.{tensor.name}" if owner else tensor.name] = tensor
    return found


def remembered(model: nn.Module, what: Hashable, compute: Callable[[], T]) -> T:
    """What was computed of an offloaded model before, by name, else computed now; of other models always computed.

    It takes a reading of all weights, which change only by `replace_weights`. The model keeps it, so that it goes with
    it.
    """
    if not is_offloaded(model):
        return compute()
    memory: dict[Hashable, T] = vars(model).setdefault(_MEMORY, {})
    if what not in memory:
        memory[what] = compute()
    return memory[what]


def forget(model: nn.Module, what: Hashable) -> None:
    """Have `remembered` compute something anew, because the weights were replaced."""
    vars(model).get(_MEMORY, {}).pop(what, None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. name: there."""

    path: Path
    name: str

    def load(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(self.name)
        return found


@dataclass(frozen=True)
class _WithReplaced(Mapping[str, Tensor]):
    """The weights of a hook, some of them from other files than the model's. before: what they were."""

    before: Mapping[str, Tensor]
    replaced: dict[str, StoredTensor] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Tensor:
        return self.replaced[key].load() if key in self.replaced else self.before[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.before)

    def __len__(self) -> int:
        return len(self.before)


def replace_weights(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """From now on, load some of the offloaded tensors of a module from other files.

    stored: by names in the module; those that are not offloaded are left alone.
    """
    for name, tensor in offloaded_by_name(module).items():
        if name in stored:
            if not isinstance(tensor.hook.weights_map, _WithReplaced):
                tensor.hook.weights_map = _WithReplaced(tensor.hook.weights_map)
            tensor.hook.weights_map.replaced[tensor.key] = stored[name]


def restore_weights(module: nn.Module) -> None:
    """Undo `replace_weights`."""
    for _, hook in offloading_hooks(module):
        if isinstance(hook.weights_map, _WithReplaced):
            hook.weights_map = hook.weights_map.before


def running_device(module: nn.Module) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them."""
    for tensor in offloaded_tensors(module):
        return tensor.device
    return next(module.parameters()).device


def load_weights(module: nn.Module) -> list[Tensor]:
    """The offloaded tensors in and below a module, in the order of `offloaded_tensors`."""
    map_tensors()  # these go again, and should leave nothing behind
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


class ReadAhead:
    """Modules that become resident one after another; a thread loads the weights of the next one meanwhile.

    So the weights of two modules are held at most. To be used as a context manager.

    order: the modules, each as often as it becomes resident. Those whose weights stay where they run may be in it.
    """

    def __init__(self, order: Iterable[nn.Module]) -> None:
        self._waiting = deque(filter(is_offloaded, order))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._load_next()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    @contextmanager
    def resident(self, module: nn.Module) -> Iterator[None]:
        """As `resident`, for the module whose turn it is; nothing happens where the module is resident already."""
        if not is_offloaded(module):
            yield
            return

        turn = self._waiting.popleft()
        assert module is turn, "modules become resident in the order that was given"
        weights = self._coming.result()
        again = bool(self._waiting) and self._waiting[0] is module  # what is resident cannot be loaded
        if not again:
            self._load_next()
        with resident(module, weights):
            del weights
            yield
        if again:
            self._load_next()

    def _load_next(self) -> None:
        if self._waiting:
            self._coming = self._thread.submit(load_weights, self._waiting[0])


def resident_in_turn(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Each module, resident until the next one is asked for; a thread loads the weights of the next meanwhile."""
    with ReadAhead(modules) as ahead:
        for module in modules:
            with ahead.resident(module):
                yield module
