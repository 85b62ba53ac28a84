"""What a run takes whose blocks are read one by one: how often all are read, and how long that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import CompressConfig
from ..energies.fitted import LEAST_TURN, MOST_CHECKS, PASSES_PER_BLOCK
from ..energies.measurements import SINGLES_SAMPLES
from ..memory import available_memory
from ..model.batches import BatchSize, frozen, make_batches
from ..model.offload import load_weights, resident
from ..model.streaming import STATES_SHARE
from ..model.tracing import TracedModel, block_calls
from .footprint import state_bytes
from .stages import Samples

SWEEPS_PER_PASS = 1.5  # of a selection, measured on small models: a round of a race is a sweep, however few are in it
REPAIR_SWEEPS = 16.0  # eight of the original, and of the shortened model eight, one for the proof, one for its row


@dataclass(frozen=True)
class Pace:
    """How fast stages run here.

    tokens_per_second: forward passes of the whole model, without the time that blocks are read.
    sweeps: where blocks are read one by one, how often each stage reads all of them; reading: seconds of doing so once.
    """

    tokens_per_second: float
    sweeps: Mapping[str, float] = field(default_factory=dict)
    reading: float = 0.0

    def seconds(self, stage: str, tokens: float) -> float:
        """Of a stage that runs the model over so many tokens."""
        return tokens / self.tokens_per_second + self.sweeps.get(stage, 0.0) * self.reading


def timed_block(traced: TracedModel, samples: Sequence[Tensor], batch_size: BatchSize) -> tuple[float, float]:
    """(tokens a second of passes of the whole model, seconds of a sweep that reads all blocks), from the first block.

    It is read, and takes a batch twice; other blocks are taken to be as fast a byte.
    """
    layer = traced.layers[0]
    sizes = [block.num_parameters for block in traced.blocks]
    share = sizes[0] / sum(sizes)  # of all blocks' weights
    started = time.perf_counter()
    weights = load_weights(layer)
    reading = (time.perf_counter() - started) / share

    batch = make_batches(samples, batch_size)[0]
    with frozen(traced.model), torch.no_grad(), resident(layer, weights):
        call = block_calls(traced, batch)[0]
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            call.run(call.stream).sum().item()  # waits for the device
            seconds = time.perf_counter() - started
    return int(batch.lengths.sum()) * share / seconds, reading


def count_sweeps(config: CompressConfig, traced: TracedModel, samples: Samples) -> dict[str, float]:
    """How often a run reads all blocks, by the stage; of a selection about so often, at most."""
    number = len(samples.calibration)
    if config.energy == "fitted":
        budget = PASSES_PER_BLOCK * (traced.depth + 1)
        used = int((budget - SINGLES_SAMPLES * (traced.depth + 1)) / (2 * LEAST_TURN))  # of the samples

        # Single removals, all first turns, the second turns, and the lowest states in the end.
        energies = 2.0 + min(used, number) + MOST_CHECKS
    elif config.energy == "secant":
        states = (traced.depth + 2) * state_bytes(traced, samples.calibration)
        energies = math.ceil(states / (STATES_SHARE * available_memory()))
    else:
        batches = len(make_batches(samples.calibration, config.batch_size))
        energies = batches * (traced.depth + 1 if config.energy == "gauss-newton" else 1)
    sweeps = {
        "energies": energies,
        "cheap baselines": 1.0,
        "selection": SWEEPS_PER_PASS * config.budget,
        "evaluation": 1.0,
    }
    return sweeps | {"repair": REPAIR_SWEEPS} if config.repair else sweeps
