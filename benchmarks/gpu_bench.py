"""What the lines of the GPU report share: a model of random weights, its device, and how predictions are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gradients import LLAMA_8B
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
NOMINAL_FLOPS, NOMINAL_BANDWIDTH = 700e12, 3.0e12  # an H100's in use: bfloat16 products; bytes a second


@dataclass
class Line:
    """What a line has measured. goal: what is aimed at; None where there is none."""

    measured: float
    predicted: float
    unit: str
    goal: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """What the lines share: the model, what its device can do, and what earlier lines leave to later ones.

    length: tokens of a sample. some: blocks that go where some do, a quarter of all.
    flops: operations a second. bandwidth: bytes a second, of reading and writing together.
    fixed: seconds that secant energies take whatever the number of samples. hessian: (N, N), theirs.
    """

    model: PreTrainedModel
    device: torch.device
    length: int
    flops: float = NOMINAL_FLOPS
    bandwidth: float = NOMINAL_BANDWIDTH
    fixed: float = 0.0
    hessian: np.ndarray[Any, Any] | None = None

    @property
    def depth(self) -> int:
        return len(self.model.model.layers)

    @property
    def some(self) -> int:
        return self.depth // 4

    @property
    def in_blocks(self) -> int:
        """Weights of all blocks."""
        number: int = sum(p.numel() for p in self.model.model.layers.parameters())
        return number

    @property
    def in_head(self) -> int:
        return int(self.model.lm_head.weight.numel())

    def samples(self, number: int, length: int | None = None) -> list[Tensor]:
        """(length,) random tokens each."""
        generator = torch.Generator().manual_seed(0)
        size = (number, length or self.length)
        return list(torch.randint(self.model.config.vocab_size, size, generator=generator))

    def ragged_samples(self, number: int) -> list[Tensor]:
        """Samples of a quarter of the length to all of it."""
        lengths = torch.linspace(self.length // 4, self.length, number).long().tolist()
        samples = []
        for sample, length in zip(self.samples(number), lengths, strict=True):
            samples.append(sample[:length])
        return samples

    def seconds_of_passes(self, passes: float, heads: float, tokens: float) -> float:
        """What forward passes of all blocks and of the head over so many tokens take at the matrix peak."""
        attention = 2 * self.length * self.model.config.hidden_size * self.depth  # causal: half of all pairs
        operations = passes * (2 * self.in_blocks + attention) + heads * 2 * self.in_head  # a token
        seconds: float = operations * tokens / self.flops
        return seconds

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak_gib(bench: Bench) -> float | None:
    """GiB of the device at the peak since `reset_peak`, weights and all; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None


def reset_peak(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def open_bench(device: torch.device, tiny: bool) -> Bench:
    """A model of random weights, made on its device."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(TINY if tiny else LLAMA_8B)), dtype=dtype)
    return Bench(model.eval(), device, length=64 if tiny else 1024)
