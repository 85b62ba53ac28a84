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
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, MODEL
from blockspin.energies.gradients import estimate_gradients
from blockspin.model.batches import Batch, frozen, make_batches, sample_losses
from blockspin.model.passes import plain_logits, shared_logits
from blockspin.model.tracing import trace_model
from blockspin.problem import RemovalProblem
from blockspin.solvers import solve


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
    gradients = estimate_gradients(model, samples[arguments.samples :], progress=False)
    problem = RemovalProblem(gradients.hessian, arguments.remove)
    spectrum = solve(problem, states=arguments.states, solver="tabu")
    removals = [state.removed for state in spectrum.states]
    batch: Batch = make_batches(samples[: arguments.samples], arguments.samples)[0]
    traced = trace_model(model)
    seconds: dict[str, list[float]] = {"shared": [], "plain": []}
    losses: dict[str, dict[int, float]] = {}
    with frozen(model), torch.no_grad():
        assert traced.shares_passes
        for _ in range(arguments.rounds):
            for name, logits_of in (("shared", shared_logits), ("plain", plain_logits)):
                started = time.perf_counter()
                outputs = logits_of(traced, batch, removals)
                losses[name] = {k: float(sample_losses(logits, batch).mean()) for k, logits in outputs}
                seconds[name].append(time.perf_counter() - started)
    rates = {name: len(removals) / statistics.median(times) for name, times in seconds.items()}
    numbers = {
        "model": arguments.model,
        "removed": f"{arguments.remove} of {traced.depth}",
        "states": len(removals),
        "threads": torch.get_num_threads(),
        "batch": [arguments.samples, arguments.length],
        "evaluations_per_second": rates,
        "speedup": statistics.median(p / s for s, p in zip(seconds["shared"], seconds["plain"], strict=True)),
        "largest_difference_in_loss": max(abs(losses["shared"][k] - losses["plain"][k]) for k in losses["plain"]),
    }
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
