"""What the energies and the selection cost beyond the work that they cannot do without, and what memory they take.

    python benchmarks/work.py                    # vocabulary of 128,000, width 512, 16 blocks, random weights
    python benchmarks/work.py --tiny             # seconds: whether it runs
    python benchmarks/work.py --device cuda

The work that nobody can do without: as many passes through the blocks as the method counts, and a head with a
cross-entropy at every position that is used, of the original and of each shortened model. Both are timed alone, as
transformers runs them, before and after each method in the same process, by the clock and in time of the processor,
which other work on the machine changes less. Memory is set against one plain forward pass of the same batch, which
makes all its logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from blockspin.comparison.cost import counted
from blockspin.energies import measurements
from blockspin.energies.fitted import fit_removals
from blockspin.energies.removals import gauss_newton
from blockspin.machine import describe_machine
from blockspin.model.quality import measured
from blockspin.problem import RemovalProblem
from blockspin.selection import ledger
from blockspin.selection.select import run_selection
from blockspin.solvers import solve
from blockspin.solvers.candidates import distinct, states_as_candidates

Seconds = NDArray[np.float64]  # (2,): by the clock, and of the processor

POSITIONS = 64  # of a sample, at which the secant needs logits
GIB = 2**30
REPEATS = 3  # of the parts that are timed alone
HEAD_TOKENS = 256  # at a time, of the head that is timed alone


class UsedTokens:
    """Counts the tokens whose logits a method needs, by standing in for `measured`."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, traced: Any, removals: Sequence[Any], samples: Sequence[Tensor], *rest: Any, **more: Any) -> Any:
        self.number += (1 + len(removals)) * sum(len(sample) - 1 for sample in samples)
        return measured(traced, removals, samples, *rest, **more)


class PeakMemory:
    """The most memory held since `restart`, in bytes: on the GPU what PyTorch allocated, else of the whole process."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"

    def restart(self) -> None:
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else psutil.Process().memory_info().rss

    def peak(self) -> int:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])


def seconds_of(run: Callable[[], Any]) -> Seconds:
    """How long something takes, until the device is done: by the clock, and of the processor."""
    started, busy = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter() - started, time.process_time() - busy])


class Floor:
    """The parts of the unavoidable work, timed alone: seconds a token of the blocks, and of head and loss."""

    def __init__(self, model: LlamaForCausalLM, batch: Tensor) -> None:
        self._model, self._batch = model, batch  # (samples, length)
        self._blocks: list[Seconds] = []
        self._heads: list[Seconds] = []

    def measure(self) -> None:
        """Time both parts once more."""
        config, weight = self._model.config, self._model.lm_head.weight
        hidden = torch.randn(HEAD_TOKENS, config.hidden_size).to(weight)
        labels = torch.randint(config.vocab_size, (HEAD_TOKENS,)).to(weight.device)

        def head() -> None:
            torch.nn.functional.cross_entropy(self._model.lm_head(hidden).float(), labels).item()

        with torch.no_grad():
            for _ in range(REPEATS):
                self._blocks.append(seconds_of(lambda: self._model.model(self._batch)) / self._batch.numel())
                self._heads.append(seconds_of(head) / HEAD_TOKENS)

    def seconds(self, block_tokens: float, head_tokens: int) -> Seconds:
        """Of so many tokens through all blocks, and so many through the head."""
        blocks, heads = np.median(self._blocks, axis=0), np.median(self._heads, axis=0)
        return np.asarray(block_tokens * blocks + head_tokens * heads)


def compared(
    run: Callable[[], int], model: LlamaForCausalLM, alone: Tensor, together: Tensor, memory: PeakMemory
) -> dict[str, float]:
    """A method against its floor. run: returns the tokens through the head. alone: the batch that most of the passes
    have; together: the largest batch of the method, (samples, length) both."""
    floor = Floor(model, alone)
    floor.measure()
    memory.restart()
    before = memory.now()
    with torch.no_grad():
        model(together, use_cache=False)
    plain = memory.peak() - before

    head_tokens = 0

    def counting() -> None:
        nonlocal head_tokens
        head_tokens = run()

    memory.restart()
    before = memory.now()
    with counted(model, 1) as cost:
        seconds = seconds_of(counting)
    held = memory.peak() - before
    floor.measure()

    times_floor, times_floor_busy = seconds / floor.seconds(cost.passes, head_tokens)
    return {
        "seconds": round(float(seconds[0]), 2),
        "times_floor": round(float(times_floor), 3),
        "times_floor_of_processor": round(float(times_floor_busy), 3),
        "tokens_through_blocks": round(cost.passes),
        "tokens_through_head": head_tokens,
        "gib_held": round(held / GIB, 2),
        "gib_of_a_plain_pass": round(plain / GIB, 2),
    }


def random_model(vocabulary: int, width: int, depth: int, device: str) -> LlamaForCausalLM:
    """A Llama of random weights, in float32 on a CPU, else in bfloat16."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(device, dtype).eval()
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether it runs")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample of the secant")
    parser.add_argument("--short", type=int, default=32, help="tokens of a sample of the others")
    parser.add_argument("--passes", type=float, default=120, help="passes over one sample of the fitted energies")
    parser.add_argument("--budget", type=float, default=6, help="passes of the selection over all samples")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    vocabulary, width, depth = (2000, 32, 4) if arguments.tiny else (128_000, 512, 16)
    model = random_model(vocabulary, width, depth, arguments.device)
    long = torch.randint(vocabulary, (arguments.samples, arguments.length))
    short = torch.randint(vocabulary, (arguments.samples, arguments.short))
    memory = PeakMemory(arguments.device)

    def secant() -> int:
        gauss_newton(model, list(long), batch_size=arguments.samples, progress=False)
        used: int = (depth + 1) * arguments.samples * min(POSITIONS, arguments.length - 1)
        return used

    def fitted() -> int:
        used = UsedTokens()
        with patch.object(measurements, "measured", used):
            fit_removals(model, list(short), goal=depth // 4, passes=arguments.passes, progress=False)
        return used.number

    energies = torch.rand(depth, depth, dtype=torch.float64)
    problem = RemovalProblem((energies @ energies.T).numpy(), remove=depth // 4)
    pool = distinct(states_as_candidates(solve(problem, states=20)))
    solve(problem, solver="tabu")  # what is compiled once on a machine does not count

    def select() -> int:
        used = UsedTokens()
        with patch.object(ledger, "measured", used):
            run_selection(
                model,
                pool,
                list(short),
                problem=problem,
                budget=arguments.budget,
                batch_size=arguments.samples,
                progress=False,
            )
        return used.number

    long, short = long.to(arguments.device), short.to(arguments.device)
    numbers: dict[str, Any] = {"machine": describe_machine(), "model": [vocabulary, width, depth]}
    numbers["secant"] = compared(secant, model, long, long, memory)
    numbers["fitted"] = compared(fitted, model, short[:1], short[: min(2, arguments.samples)], memory)
    numbers["select"] = compared(select, model, short, short, memory)
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
