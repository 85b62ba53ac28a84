"""What a shortened model saves: size, key-value cache, prefill and decode speed, peak memory; each with its due."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from ..model.batches import frozen, input_device
from ..model.loading import context_length
from ..progress import track
from ..tables import Column, Table, short


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Torch counts attention on a GPU, but not the kernel that does it on a CPU.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class ModelCost:
    """What a model costs at a batch of `batch_size` prompts of `length` tokens and `new_tokens` generated ones.

    num_bytes: of the weights on disk. cache_bytes: that one more token of one text adds to the key-value cache.
    prefill, decode: tokens per second; compare them only within one run. prefill_flops, decode_flops: floating-point
    operations in matrix products and attention for one token. peak_bytes: weights and what the run needed above them,
    at most; on a CPU by resident memory, None where the system does not tell.
    """

    name: str
    num_parameters: int
    num_bytes: int
    cache_bytes: int
    prefill: float
    decode: float
    prefill_flops: float
    decode_flops: float
    peak_bytes: int | None
    batch_size: int
    length: int
    new_tokens: int
    dtype: str
    device: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_costs(
    models: Mapping[str, PreTrainedModel],
    num_bytes: Sequence[int],
    *,
    batch_size: int = 1,
    length: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: bool = True,
) -> list[ModelCost]:
    """Cost of each named model; speeds are medians over rounds in which the models take turns.

    A machine that slows down or speeds up does so for all of them. The first round warms up and is not counted.
    num_bytes: of each model's weights on disk.

    Raises:
        ValueError: a number is not positive, or prompt and answer exceed a model's context.
    """
    for name, value in {"length": length, "new_tokens": new_tokens, "rounds": rounds, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value} (--{name.replace('_', '-')})")
    for name, model in models.items():
        longest = context_length(model.config)
        if longest is not None and length + new_tokens + 1 > longest:
            raise ValueError(
                f"{name} holds {longest} tokens, not {length} and {new_tokens} new ones; give less with --length"
            )
    prompts = {name: _prompt(model, batch_size, length) for name, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in track(range(rounds + 1), "Timing", rounds + 1, show=progress):
        for name, model in models.items():
            seconds[name].append((_timed(model, prompts[name], 1), _timed(model, prompts[name], 1 + new_tokens)))
    costs = []
    for (name, model), size in zip(models.items(), num_bytes, strict=True):
        prefill = statistics.median(first for first, _ in seconds[name][1:])
        decode = statistics.median(both - first for first, both in seconds[name][1:])
        first, more = (_flops(model, prompts[name], n) for n in (1, 3))
        costs.append(
            ModelCost(
                name=name,
                num_parameters=sum(p.numel() for p in model.parameters()),
                num_bytes=size,
                cache_bytes=_cache_bytes(model, prompts[name]),
                prefill=batch_size * length / prefill,
                decode=batch_size * new_tokens / max(decode, 1e-9),
                prefill_flops=first / (batch_size * length),
                decode_flops=(more - first) / (2 * batch_size),
                peak_bytes=_peak_bytes(model, prompts[name], 1 + new_tokens),
                batch_size=batch_size,
                length=length,
                new_tokens=new_tokens,
                dtype=str(model.dtype).removeprefix("torch."),
                device=model.device.type,
            )
        )
    return costs


def _prompt(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    size = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size, (batch_size, length), generator=generator).to(input_device(model))


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> None:
    """Greedy, and never stopping early."""
    with frozen(model), torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )[0, -1].item()  # waits for the device


def _timed(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    started = time.perf_counter()
    _generate(model, prompt, new_tokens)
    return time.perf_counter() - started


def _flops(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        _generate(model, prompt, new_tokens)
    return int(counter.get_total_flops())


def _cache_bytes(model: PreTrainedModel, prompt: Tensor) -> int:
    """Growth of the cache with one more token, as it is; states of constant size do not count."""
    ids, sizes = prompt[:1], []
    for length in (max(1, ids.shape[1] // 2), max(2, ids.shape[1])):
        tokens = ids.repeat(1, 2)[:, :length]
        with frozen(model), torch.no_grad():
            cache = model(input_ids=tokens, use_cache=True).get("past_key_values")
        sizes.append((length, sum(_tensors(cache, {}).values())))
    (short, small), (long, large) = sizes
    return round((large - small) / (long - short))


def _tensors(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every tensor in an object, each counted once."""
    if isinstance(value, Tensor):
        found[id(value)] = value.numel() * value.element_size()
    elif isinstance(value, (list, tuple)):
        for part in value:
            _tensors(part, found)
    elif isinstance(value, dict):
        _tensors(list(value.values()), found)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers"):
        _tensors(list(vars(value).values()), found)
    return found


def _peak_bytes(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int | None:
    weights: int = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _generate(model, prompt, new_tokens)
        return weights + int(torch.cuda.max_memory_allocated()) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the run is served from memory that was freed, but not given back
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again from here (Linux)
        before = _resident("VmRSS")
        _generate(model, prompt, new_tokens)
        return weights + max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def costs_table(costs: Sequence[ModelCost]) -> Table:
    """Quantities down, models across; ratios to the first model, and those that the operations per token let expect."""
    first = costs[0]
    columns = [Column("", words=True), *(Column(cost.name) for cost in costs)]
    caption = f"batch {first.batch_size}, {first.length} tokens in, {first.new_tokens} out, "
    caption += f"{first.dtype} on {first.device}"

    def sizes(heading: str, numbers: Sequence[int | None]) -> list[str]:
        cells = [
            "unknown" if number is None else short(number) + (f" {number / numbers[0]:.0%}" if numbers[0] else "")
            for number in numbers
        ]
        return [heading, *cells]

    def speeds(heading: str, numbers: Sequence[float]) -> list[str]:
        return [heading, *(f"{number:,.4g} {number / numbers[0]:.2f}x" for number in numbers)]

    rows = [
        sizes("parameters", [cost.num_parameters for cost in costs]),
        sizes("on disk, bytes", [cost.num_bytes for cost in costs]),
        sizes("cache, bytes a token", [cost.cache_bytes for cost in costs]),
        sizes("peak memory, bytes", [cost.peak_bytes for cost in costs]),
        speeds("prefill, tokens/s", [cost.prefill for cost in costs]),
        ["  to be expected", *(f"{first.prefill_flops / cost.prefill_flops:.2f}x" for cost in costs)],
        speeds("decode, tokens/s", [cost.decode for cost in costs]),
        ["  to be expected", *(f"{first.decode_flops / cost.decode_flops:.2f}x" for cost in costs)],
    ]
    return Table(columns, rows, caption=caption)
