"""What a shortened model saves: size on disk, key-value cache, prefill and decode speed, peak memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel, StoppingCriteria

from ..memory import trim_heap
from ..model.batches import frozen, input_device
from ..model.blocks import count_parameters
from ..model.loading import context_length
from ..model.offload import check_in_memory
from ..problem import Floats
from ..progress import track
from ..tables import Column, Table, short

FEW, MORE = 1, 3  # generated tokens of the two runs whose difference is the operations of decoding
_QUANTITIES = (
    "parameters",
    "on disk, bytes",
    "cache, bytes a token",
    "peak memory, bytes",
    "prefill, tokens/s",
    "  to be expected",
    "decode, tokens/s",
    "  to be expected",
)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Floating-point operations of attention for tensors of these shapes."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# Torch counts attention on a GPU, but not the kernel that does it on a CPU.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Workload:
    """What a model is timed on: `batch_size` prompts of `length` tokens, `new_tokens` more generated for each."""

    batch_size: int = 1
    length: int = 512
    new_tokens: int = 64


@dataclass(frozen=True)
class ModelCost:
    """What a model costs on a workload.

    num_bytes: size of the weights on disk.
    cache_bytes: what one more token of one text adds to the key-value cache.
    prefill, decode: tokens per second; compare them only within one run.
    prefill_flops, decode_flops: floating-point operations in matrix products and attention for one token.
    peak_bytes: the weights and the most that the run needed above them; on a CPU it is measured as resident memory, and
    None where the system does not report that.
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
    workload: Workload | None = None,
    *,
    rounds: int = 5,
    progress: bool = True,
) -> list[ModelCost]:
    """The cost of each named model; speeds are medians over rounds.

    The models take turns within each round, so that a machine that slows down or speeds up does so for all of them.

    num_bytes: size of each model's weights on disk.

    Raises:
        ValueError: a number is not positive, prompt and answer exceed a model's context, or weights are offloaded.
    """
    workload = workload or Workload()
    for model in models.values():
        check_in_memory(model, "a measurement of speed")
    check_workload(models, workload, rounds)
    batch_size, length, new_tokens = workload.batch_size, workload.length, workload.new_tokens
    prompts = {}
    for name, model in models.items():
        prompts[name] = random_prompt(model, batch_size, length)
    steps: dict[str, list[Floats]] = defaultdict(list)
    for turns in track(rounds_of_steps(models, prompts, new_tokens, rounds), "Timing", rounds, show=progress):
        for name, seconds in turns.items():
            steps[name].append(seconds)

    costs = []
    for (name, model), size in zip(models.items(), num_bytes, strict=True):
        prompt = prompts[name]
        prefill = float(np.median([seconds[0] for seconds in steps[name]]))
        decode = float(np.median([seconds[1:].sum() for seconds in steps[name]]))
        prefill_flops = _flops(model, prompt, FEW)
        decode_flops = (_flops(model, prompt, MORE) - prefill_flops) / (MORE - FEW)
        cost = ModelCost(
            name=name,
            num_parameters=count_parameters(model),
            num_bytes=size,
            cache_bytes=_cache_bytes(model, prompt),
            prefill=batch_size * length / prefill,
            decode=batch_size * new_tokens / decode,
            prefill_flops=prefill_flops / (batch_size * length),
            decode_flops=decode_flops / batch_size,
            peak_bytes=_peak_bytes(model, prompt, 1 + new_tokens),
            batch_size=batch_size,
            length=length,
            new_tokens=new_tokens,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
        )
        costs.append(cost)
    return costs


def check_workload(models: Mapping[str, PreTrainedModel], workload: Workload, rounds: int) -> None:
    """Refuse numbers that are not positive, and texts that a model cannot hold."""
    for name, value in {**asdict(workload), "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value} (--{name.replace('_', '-')})")

    # The prefill gives one token more than `new_tokens`.
    length, new_tokens = workload.length, workload.new_tokens
    for name, model in models.items():
        longest = context_length(model.config)
        if longest is not None and length + new_tokens + 1 > longest:
            raise ValueError(
                f"{name} holds {longest} tokens, not {length} and {new_tokens} new ones; give less with --length"
            )


def rounds_of_steps(
    models: Mapping[str, PreTrainedModel], prompts: Mapping[str, Tensor], new_tokens: int, rounds: int
) -> Iterator[dict[str, Floats]]:
    """Yield for each round, in which the models take turns, the seconds of each step of each model's generation.

    (1 + new_tokens,): the prefill, which gives the first token, and every new token. A round before them warms up.
    """
    for number in range(rounds + 1):
        turns = {name: _step_seconds(model, prompts[name], 1 + new_tokens) for name, model in models.items()}
        if number > 0:
            yield turns


def random_prompt(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    """(batch_size, length) token ids, drawn at random: what they say does not change the cost."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, length), generator=generator).to(input_device(model))


class _StepClock(StoppingCriteria):  # type: ignore[misc]
    """Notes when a generation begins and when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: (batch, length)."""
        input_ids[0, -1].item()  # waits for the device
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int, clock: _StepClock | None = None) -> None:
    """Generate greedily, without stopping early."""
    with frozen(model), torch.no_grad():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            stopping_criteria=None if clock is None else [clock],
        )
    tokens[0, -1].item()  # waits for the device


def _step_seconds(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Floats:
    """Seconds of each token of a generation, (new_tokens,); the first has the prompt in it."""
    clock = _StepClock()
    _generate(model, prompt, new_tokens, clock)
    return np.diff(clock.times)


def _flops(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int:
    """Floating-point operations of a generation."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        _generate(model, prompt, new_tokens)
    return int(counter.get_total_flops())


def _cache_bytes(model: PreTrainedModel, prompt: Tensor) -> int:
    """How much the cache grows with one more token, measured; states of constant size do not grow."""
    long = max(2, prompt.shape[1])
    short = max(1, prompt.shape[1] // 2)
    tokens = prompt[:1].repeat(1, 2)[:, :long]  # (1, long), also where the prompt is a single token

    sizes = []
    for length in (short, long):
        with frozen(model), torch.no_grad():
            cache = model(input_ids=tokens[:, :length], use_cache=True).get("past_key_values")
        sizes.append(sum(_tensor_bytes(cache).values()))
    return round((sizes[1] - sizes[0]) / (long - short))


def _tensor_bytes(value: Any) -> dict[int, int]:
    """The bytes of every tensor inside an object, by the tensor's identity, so that each counts once."""
    if isinstance(value, Tensor):
        return {id(value): value.numel() * value.element_size()}

    parts: Iterable[Any] = ()
    if isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers"):
        parts = vars(value).values()

    found: dict[int, int] = {}
    for part in parts:
        found |= _tensor_bytes(part)
    return found


def _peak_bytes(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int | None:
    """The weights and the most that a generation needs above them; None where the system does not report that."""
    weights = 0
    for tensor in (*model.parameters(), *model.buffers()):
        weights += tensor.nbytes

    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _generate(model, prompt, new_tokens)
        return weights + int(torch.cuda.max_memory_allocated()) - before

    try:
        # Memory that was freed, but not returned to the system, would serve the run unseen.
        trim_heap()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again from here (Linux)

        before = _resident("VmRSS")
        _generate(model, prompt, new_tokens)
        return weights + max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes; there it is in KiB, as in "VmRSS:   1234 kB"."""
    status = Path("/proc/self/status").read_text()
    _, _, rest = status.partition(f"{field}:")
    return int(rest.split()[0]) * 1024


def costs_table(costs: Sequence[ModelCost]) -> Table:
    """Quantities down, models across, each relative to the first model.

    Below a speed stands the ratio to be expected if speed depended on the number of operations alone.
    """
    first = costs[0]
    columns = [Column("", words=True)]
    cells = [_QUANTITIES]  # by column
    for cost in costs:
        columns.append(Column(cost.name))
        cells.append(
            (
                _size(cost.num_parameters, first.num_parameters),
                _size(cost.num_bytes, first.num_bytes),
                _size(cost.cache_bytes, first.cache_bytes),
                _size(cost.peak_bytes, first.peak_bytes),
                _speed(cost.prefill, first.prefill),
                f"{first.prefill_flops / cost.prefill_flops:.2f}x",
                _speed(cost.decode, first.decode),
                f"{first.decode_flops / cost.decode_flops:.2f}x",
            )
        )

    caption = f"batch {first.batch_size}, {first.length} tokens in, {first.new_tokens} out, "
    caption += f"{first.dtype} on {first.device}"
    return Table(columns, list(zip(*cells, strict=True)), caption=caption)


def _size(number: int | None, first: int | None) -> str:
    """A number, and what share of the first model's it is."""
    if number is None:
        return "unknown"
    return f"{short(number)} {number / first:.0%}" if first else short(number)


def _speed(number: float, first: float) -> str:
    """A speed, and how many times the first model's it is."""
    return f"{number:,.4g} {number / first:.2f}x"
