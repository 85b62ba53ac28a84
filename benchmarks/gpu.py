"""A report on one GPU: every stage on random weights of Llama-3.1-8B's shape, each line beside its prediction.

    python benchmarks/gpu.py --out gpu.json                  # within --seconds 150, on a GPU of 78 GiB or more
    python benchmarks/gpu.py --tiny --device cpu             # whether every line runs, in a minute

Lines are printed and written to --out as soon as they are measured, the most important first. One that fails says why
and the others go on; one for which no time is left is skipped. A prediction is what the operations of a line would take
at the matrix peak, or its bytes at the bandwidth, that the first line has measured on the same device.
"""

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from gpu_bench import NOMINAL_BANDWIDTH, NOMINAL_FLOPS, Bench, Line, open_bench, peak_gib, reset_peak
from gradients import floor_pass
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import blockspin as bs
from blockspin.energies.fitted import LEAST_TURN, PASSES_PER_BLOCK, fit_removals
from blockspin.energies.gradients import gate_gradients
from blockspin.energies.measurements import SINGLES_SAMPLES
from blockspin.errors import first_line
from blockspin.files import write_json
from blockspin.machine import describe_machine
from blockspin.model import quality
from blockspin.model.batches import frozen, make_batches
from blockspin.model.passes import passes_of_walk
from blockspin.model.tracing import trace_model
from blockspin.selection.select import run_selection
from blockspin.solvers.candidates import states_as_candidates
from blockspin.training import DistillConfig

SECANT_SAMPLES, GRADIENT_SAMPLES = 64, 2048  # what a run takes, of `length` tokens each
READINGS = 30  # of the weights while a removal is checked: a trace, two passes, two texts of eight tokens
POSITIONS = 64  # tokens of a sample at which secant energies have logits
WARM_UP = 16  # tokens
FEW_BLOCKS = 4  # of the model that is held in float32 too, and removals whose divergences are measured


def matrix_peak(bench: Bench) -> Line:
    """TFLOP/s of a large product in the model's dtype; and bytes a second of a copy. They are predicted from now on."""
    dtype, on_gpu = bench.model.dtype, bench.device.type == "cuda"
    n = 8192 if on_gpu else 512
    a, b = torch.randn(2, n, n, device=bench.device).to(dtype)  # (n, n) each
    c = torch.empty((2**30 if on_gpu else 2**22), dtype=torch.int8, device=bench.device)
    d = torch.empty_like(c)

    products, copies = [], []
    for _ in range(12):
        products.append(bench.timed(lambda: a @ b))
        copies.append(bench.timed(lambda: d.copy_(c)))
    bench.flops = 2 * n**3 / statistics.median(products[2:])  # the first ones warm up
    bench.bandwidth = 2 * c.nbytes / statistics.median(copies[2:])
    details = {"bandwidth_tb_s": bench.bandwidth / 1e12, "bandwidth_predicted": NOMINAL_BANDWIDTH / 1e12}
    return Line(bench.flops / 1e12, NOMINAL_FLOPS / 1e12, "TFLOP/s", details=details)


def forward(bench: Bench) -> Line:
    """Seconds of a forward pass of 8 samples, with all logits."""
    batch = make_batches(bench.samples(8), 8)[0]
    with frozen(bench.model), torch.no_grad():
        times = [bench.timed(lambda: batch.forward(bench.model)) for _ in range(6)]

    seconds = statistics.median(times[1:])
    tokens = 8 * bench.length
    return Line(seconds, bench.seconds_of_passes(1, 1, tokens), "s", details={"tokens_a_second": tokens / seconds})


def secant(bench: Bench, batch_size: int) -> Line:
    """Seconds of secant energies of 64 samples: of one batch, and at batch 8 of two, which tells what is fixed."""
    bs.gauss_newton(bench.model, bench.samples(1, WARM_UP), progress=False)
    samples = bench.samples(batch_size)
    one = bench.timed(lambda: run_secant(bench, samples, batch_size))
    if batch_size == 8:
        two = bench.timed(lambda: run_secant(bench, bench.samples(16), batch_size))
        bench.fixed = min(one, max(0.0, 2 * one - two))

    seconds = bench.fixed + (one - bench.fixed) * SECANT_SAMPLES / batch_size
    singles = [(i,) for i in range(bench.depth)]
    passes = passes_of_walk([(), *singles], bench.depth)
    heads = (bench.depth + 1) * min(1, POSITIONS / bench.length)
    predicted = bench.seconds_of_passes(passes, heads, SECANT_SAMPLES * bench.length)
    return Line(seconds, predicted, "s", 45.0, {"seconds_of_a_batch": one, "fixed_seconds": bench.fixed})


def run_secant(bench: Bench, samples: Sequence[Tensor], batch_size: int) -> None:
    bench.hessian = bs.gauss_newton(bench.model, samples, batch_size=batch_size, progress=False).hessian


def divergences(bench: Bench) -> Line:
    """Seconds to measure the KL divergence without each of the first blocks on 8 samples, at all their tokens."""
    traced, samples = trace_model(bench.model), bench.samples(8)
    removals = [(i,) for i in range(FEW_BLOCKS)]
    for _ in range(2):  # the first time warms up
        seconds = bench.timed(lambda: quality.measured(traced, removals, samples, quality.kl))

    passes = passes_of_walk([(), *removals], bench.depth)
    predicted = bench.seconds_of_passes(passes, 1 + len(removals), 8 * bench.length)
    return Line(seconds, predicted, "s", details={"passes": passes, "heads": 1 + len(removals)})


def gradients(bench: Bench, checkpointing: bool) -> Line:
    """Seconds of the paper's gradients of 2,048 samples: of 16 ragged ones, next to a backward pass without gates."""
    samples = bench.ragged_samples(16)
    batches = make_batches(samples, 4)
    traced = trace_model(bench.model)

    def ours() -> None:
        for batch in batches:
            gate_gradients(traced, batch, checkpointing)

    def floor() -> None:
        for batch in batches:
            floor_pass(bench.model, batch)

    # Each once before it is timed: what kernels and memory of new shapes take, all of a run shares.
    with frozen(bench.model):
        ours()
        seconds, memory = bench.timed(ours), peak_gib(bench)
        reset_peak(bench)
        floor()
        floor_seconds, floor_memory = bench.timed(floor), peak_gib(bench)

    # Forward and backward through the activations; with checkpointing forward once more.
    of_all = GRADIENT_SAMPLES * bench.length / sum(map(len, samples))
    predicted = bench.seconds_of_passes(3, 2, GRADIENT_SAMPLES * bench.length)
    if not checkpointing:
        predicted = bench.seconds_of_passes(2, 2, GRADIENT_SAMPLES * bench.length)
    details = {
        "share_of_floor": floor_seconds / seconds,
        "share_of_floor_goal": 0.9,
        "floor_seconds": floor_seconds * of_all,
        "gib": memory,
        "floor_gib": floor_memory,
    }
    return Line(seconds * of_all, predicted, "s", 180.0, details)


def fitted(bench: Bench) -> Line:
    """Seconds of fitted energies: of as many passes as two samples take, extrapolated to those of a run."""
    samples = bench.samples(2)
    passes = SINGLES_SAMPLES * (bench.depth + 1) + 2 * len(samples) * LEAST_TURN
    bs.solve(bs.RemovalProblem(np.eye(bench.depth), bench.some), solver="tabu")  # compiles the search

    started = time.perf_counter()
    found = fit_removals(bench.model, samples, passes=passes, progress=False)
    seconds = time.perf_counter() - started

    # Heads: of every removal, and of the whole model in every turn.
    times = PASSES_PER_BLOCK * (bench.depth + 1) / passes
    heads = SINGLES_SAMPLES * (bench.depth + 1) + len(found.sample) + 2 * len(samples)
    predicted = times * bench.seconds_of_passes(passes, heads, bench.length)
    return Line(times * seconds, predicted, "s", details={"passes": passes, "heads": heads, "seconds": seconds})


def selection(bench: Bench) -> Line:
    """Seconds of a selection of 8 passes over 8 samples."""
    hessian = np.eye(bench.depth) if bench.hessian is None else bench.hessian
    problem = bs.RemovalProblem(hessian, bench.some)
    pool = states_as_candidates(bs.solve(problem, states=20, solver="tabu"))
    samples = bench.samples(8)

    started = time.perf_counter()
    found = run_selection(bench.model, pool, samples, problem=problem, budget=8, progress=False)
    seconds = time.perf_counter() - started

    # Heads of the whole model, which runs again with every group of removals, are left out.
    times = 8 / found.passes
    heads = sum(trial.num_samples for trial in found.trials) / len(samples)
    predicted = times * bench.seconds_of_passes(found.passes, heads, len(samples) * bench.length)
    return Line(times * seconds, predicted, "s", details={"passes": found.passes, "heads": heads, "seconds": seconds})


def busy_share(bench: Bench) -> Line:
    """Share of the time of secant energies in which the device works, and reads of the host: one batch of 4 more."""
    on_gpu = bench.device.type == "cuda"
    activity, kind = (ProfilerActivity.CUDA, "CUDA") if on_gpu else (ProfilerActivity.CPU, "CPU")
    read = "Memcpy DtoH" if on_gpu else "aten::_local_scalar_dense"

    seconds, busy, reads = [], [], []  # of one batch, then of two
    for number in (4, 8):
        samples = bench.samples(number)
        with profile(activities=[activity]) as profiler:
            started = time.perf_counter()
            run_secant(bench, samples, 4)
            bench.wait()
            seconds.append(time.perf_counter() - started)

        spans, found = [], 0
        for event in profiler.events() or ():
            if event.device_type.name == kind:
                spans.append((event.time_range.start, event.time_range.end))  # microseconds
                found += event.name.startswith(read)
        busy.append(covered(spans) / 1e6)
        reads.append(found)

    share = (busy[1] - busy[0]) / (seconds[1] - seconds[0])
    details = {"host_reads_a_batch": reads[1] - reads[0], "passes_a_batch": bench.depth + 1}
    return Line(share, 1.0, "of the time", details=details)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def dtypes(bench: Bench) -> Line:
    """Relative difference of energies in bfloat16 from those in float32, same weights, few blocks."""
    config = deepcopy(bench.model.config)
    config.num_hidden_layers = FEW_BLOCKS
    with torch.device(bench.device):
        narrow = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wide = deepcopy(narrow).float()

    samples = bench.samples(2, bench.length // 4)
    details = {}
    for energy in ("empirical-fisher", "gauss-newton", "secant"):
        exact = bs.estimate_energies(energy, wide, samples, progress=False).hessian
        found = bs.estimate_energies(energy, narrow, samples, progress=False).hessian
        details[energy] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    # Whether the lowest removals of one and of two blocks by the secant form, measured last, are the same.
    same = []
    for remove in (1, 2):
        states = []
        for matrix in (found, exact):
            states.append(bs.solve(bs.RemovalProblem(matrix, remove), solver="tabu").states[0].removed)
        same.append(states[0] == states[1])
    return Line(details["secant"], 2.0**-8, "relative", details={**details, "same_ground_states": same})


def pruning(bench: Bench) -> Line:
    """Seconds to remove a quarter of the blocks in memory, with a copy of the others and the proofs."""
    gone = range(bench.some, 2 * bench.some)
    seconds = bench.timed(lambda: bs.remove_blocks(bench.model, gone))
    shared = bench.timed(lambda: bs.remove_blocks(bench.model, gone, copy=False))

    size = sum(p.nbytes for p in bench.model.parameters())
    predicted = (2 * size + READINGS * size) / bench.bandwidth
    return Line(seconds, predicted, "s", details={"seconds_without_copy": shared})


def offloaded(bench: Bench) -> Line:
    """Largest difference of secant energies while a quarter of the blocks is in host memory: the same matrix."""
    samples = bench.samples(2, bench.length // 4)
    first = bench.model.model.layers[: bench.some]
    seconds = [bench.timed(lambda: run_secant(bench, samples, 2))]
    expected = bench.hessian

    for layer in first:
        cpu_offload(layer, execution_device=bench.device)
    try:
        seconds.append(bench.timed(lambda: run_secant(bench, samples, 2)))
    finally:
        for layer in first:
            remove_hook_from_submodules(layer)  # the weights come back

    assert expected is not None
    assert bench.hessian is not None
    difference = float(np.abs(bench.hessian - expected).max())
    return Line(difference, 0.0, "nats", 0.0, {"seconds": seconds[0], "seconds_offloaded": seconds[1]})


def distillation(bench: Bench) -> Line:
    """Tokens/s of a training step of 2 samples, a quarter of the blocks gone; the teacher in the same dtype."""
    student = bs.remove_blocks(bench.model, range(bench.some, 2 * bench.some))
    config = DistillConfig(
        max_length=bench.length, batch_size=2, max_steps=3, log_steps=1, gradient_checkpointing=True, chunk_tokens=512
    )
    samples = bench.samples(6)
    result = bs.distill(student, bench.model, samples, samples[:1], config=config)
    speeds = [row["tokens_per_second"] for row in result.history if "tokens_per_second" in row]

    # Student: forward twice and backward, two products a weight; teacher: forward. Then the optimiser reads weights,
    # gradients and two moments, and writes all but the gradients.
    trained = sum(p.numel() for p in student.parameters())
    tokens = 2 * bench.length
    left = 1 - bench.some / bench.depth
    multiplying = bench.seconds_of_passes(4 * left + 1, 4 + 1, tokens)
    seconds = multiplying + 7 * trained * student.dtype.itemsize / bench.bandwidth
    return Line(speeds[-1], tokens / seconds, "tokens/s", details={"gib": peak_gib(bench)})


# Name, seconds it needs on an H100, and what measures it; the most important first.
LINES: tuple[tuple[str, float, Callable[[Bench], Line]], ...] = (
    ("matrix peak", 2, matrix_peak),
    ("forward pass of 8 samples", 2, forward),
    ("secant energies of 64 samples, batch 8", 14, lambda bench: secant(bench, 8)),
    ("divergences of 4 removals, 8 samples", 6, divergences),
    ("gradients of 2,048 samples", 8, lambda bench: gradients(bench, False)),
    ("gradients, checkpointing", 9, lambda bench: gradients(bench, True)),
    ("fitted energies", 25, fitted),
    ("selection of 8 passes", 6, selection),
    ("device busy in secant energies", 12, busy_share),
    ("bfloat16 against float32", 8, dtypes),
    ("removal in memory", 4, pruning),
    ("secant energies of 64 samples, batch 32", 16, lambda bench: secant(bench, 32)),
    ("a quarter of the blocks in host memory", 14, offloaded),
    ("distillation step", 15, distillation),
)


def measured(bench: Bench, name: str, run: Callable[[Bench], Line], seconds: float) -> dict[str, Any]:
    """A line as JSON: what it measured, or why it did not; ended after so many seconds."""
    reset_peak(bench)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        row: dict[str, Any] = {"line": name, **asdict(run(bench))}
    except Exception as error:  # whatever it is, the other lines go on
        row = {"line": name, "error": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

    row["peak_gib"], row["took"] = peak_gib(bench), time.perf_counter() - started
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def text_of(row: dict[str, Any]) -> str:
    """A line as it is printed."""
    if "error" in row:
        return f"{row['line']}: {row['error']}"
    text = f"{row['line']}: {row['measured']:.4g} {row['unit']} (predicted {row['predicted']:.4g}"
    text += f", goal {row['goal']:.4g})" if row["goal"] is not None else ")"
    for name, value in row["details"].items():
        text += f"; {name} {value:.4g}" if isinstance(value, float) else f"; {name} {value}"
    return text


def end_lines_on_time() -> None:
    """Let the timer of `measured` raise TimeoutError."""

    def end(*_: object) -> None:
        raise TimeoutError("no time is left (--seconds)")

    signal.signal(signal.SIGALRM, end)


def main() -> None:
    started = time.perf_counter() - (time.time() - psutil.Process().create_time())  # imports count
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tests the lines, not the device")
    parser.add_argument(
        "--seconds", type=float, default=150, help="of the process; no line begins that would end later"
    )
    parser.add_argument("--lines", default="", help="only lines with one of these words: forward,secant,selection")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()

    end_lines_on_time()
    bench = open_bench(torch.device(arguments.device), arguments.tiny)
    print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)

    report: dict[str, Any] = {"machine": describe_machine(), "model": "tiny" if arguments.tiny else "Llama-3.1-8B"}
    report["rows"] = []
    wanted = arguments.lines.split(",")
    for name, needs, run in LINES:
        if run is not matrix_peak and not any(word in name for word in wanted):
            continue
        left = arguments.seconds - (time.perf_counter() - started)
        if left < needs and not arguments.tiny:
            row: dict[str, Any] = {"line": name, "error": f"skipped: needs {needs} s, {left:.0f} s are left"}
        else:
            row = measured(bench, name, run, max(left, 1))
        report["rows"].append(row)
        report["seconds"] = time.perf_counter() - started
        print(text_of(row), flush=True)
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
