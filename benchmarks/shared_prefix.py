"""Evaluations per second of the first 100 states of a spectrum: sharing the passes of common first blocks, and not.

    python benchmarks/shared_prefix.py                   # the embedded model, 8 of its 24 blocks removed
    python benchmarks/shared_prefix.py --remove 12 --states 50

The spectrum is that of the model's own Hessian. Both ways take turns in one process and must agree to rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, MODEL
from blockspin.energies.gradients import estimate_gradients
from blockspin.model.batches import Batch, frozen, make_batches
from blockspin.model.losses import sample_losses
from blockspin.model.passes import plain_passes, shared_passes
from blockspin.model.tracing import TracedModel, trace_model
from blockspin.problem import RemovalProblem
from blockspin.solvers import solve


def timed(traced: TracedModel, outputs: Iterator[tuple[int, Tensor]], batch: Batch) -> tuple[dict[int, float], float]:
    """The mean loss of each removal, by its number, and the seconds that all of them took."""
    started = time.perf_counter()
    losses = {}
    for k, hidden in outputs:  # (batch, length, width)
        losses[k] = float(sample_losses(traced.halves, hidden, batch).mean())
    return losses, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--remove", type=int, default=8)
    parser.add_argument("--states", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8, help="samples in the one batch that is evaluated")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    samples = load_calibration(
        CALIBRATION, tokenizer, num_samples=32 + arguments.samples, max_length=arguments.length, progress=False
    )

    # The spectrum, from the samples after those of the batch.
    gradients = estimate_gradients(model, samples[arguments.samples :], progress=False)
    problem = RemovalProblem(gradients.hessian, arguments.remove)
    spectrum = solve(problem, states=arguments.states, solver="tabu")
    removals = [state.removed for state in spectrum.states]

    batch: Batch = make_batches(samples[: arguments.samples], arguments.samples)[0]
    traced = trace_model(model)
    assert traced.shares_passes

    shared_seconds, plain_seconds, speedups = [], [], []
    with frozen(model), torch.no_grad():
        for _ in range(arguments.rounds):
            shared, seconds = timed(traced, shared_passes(traced, batch, removals), batch)
            shared_seconds.append(seconds)
            plain, seconds = timed(traced, plain_passes(traced, batch, removals), batch)
            plain_seconds.append(seconds)
            speedups.append(plain_seconds[-1] / shared_seconds[-1])

    # The two yield the removals in orders of their own.
    largest = 0.0
    for k, loss in plain.items():
        largest = max(largest, abs(shared[k] - loss))

    numbers = {
        "model": arguments.model,
        "removed": f"{arguments.remove} of {traced.depth}",
        "states": len(removals),
        "threads": torch.get_num_threads(),
        "batch": [arguments.samples, arguments.length],
        "evaluations_per_second": {
            "shared": len(removals) / statistics.median(shared_seconds),
            "plain": len(removals) / statistics.median(plain_seconds),
        },
        "speedup": statistics.median(speedups),
        "largest_difference_in_loss": largest,
    }
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
