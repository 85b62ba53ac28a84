"""Throughput of several processes that share the samples, against one: secant energies and a selection.

    python benchmarks/processes.py                       # one and two processes, the embedded model
    python benchmarks/processes.py --processes 1 4 --rounds 5

Each process has one thread on a CPU, or a GPU of its own. The numbers take turns, and every run must find the same. On
a machine that does other work, the processor time of the busiest process says more than the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, MODEL
from blockspin.energies.removals import gauss_newton
from blockspin.files import write_json
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.problem import RemovalProblem
from blockspin.processes import gathered, is_main, start
from blockspin.selection.result import Selection
from blockspin.selection.select import run_selection
from blockspin.solvers import solve
from blockspin.solvers.candidates import states_as_candidates

T = TypeVar("T")

REMOVE, STATES, BUDGET = 8, 20, 8.0
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def timed(run: Callable[[], T]) -> tuple[T, list[float]]:
    """What it returns; its seconds, and those of the processor for the busiest of the processes."""
    started, used = time.perf_counter(), time.process_time()
    found = run()
    seconds = time.perf_counter() - started
    return found, [seconds, max(gathered(iter([time.process_time() - used])))]


def measure(arguments: argparse.Namespace) -> None:
    """What one of the processes does; the main one writes seconds and results."""
    start()
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    samples = load_calibration(
        CALIBRATION, tokenizer, num_samples=2 * arguments.samples, max_length=arguments.length, progress=False
    )
    gauss_newton(model, samples[:2], batch_size=1, progress=False)  # warms up

    first, others = samples[: arguments.samples], samples[arguments.samples :]
    energies, of_energies = timed(lambda: gauss_newton(model, first, batch_size=arguments.batch_size, progress=False))

    # Solved before the time counts: all processes solve.
    problem = RemovalProblem(energies.hessian, REMOVE)
    pool = states_as_candidates(solve(problem, states=STATES, solver="tabu"))

    def choose() -> Selection:
        return run_selection(
            model, pool, others, problem=problem, budget=BUDGET, batch_size=arguments.batch_size, progress=False
        )

    found, of_selection = timed(choose)
    if is_main():
        chosen = {"removed": found.chosen.removed, "loss": found.chosen.loss}
        write_json(arguments.out, {"secant": of_energies, "selection": of_selection, "chosen": chosen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=64, help="for the energies, and as many for the selection")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="one of the processes: write its measurement here")
    arguments = parser.parse_args()
    if arguments.out is not None:
        measure(arguments)
        return

    seconds: dict[tuple[int, str], list[list[float]]] = {}
    chosen = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        for _ in range(arguments.rounds):
            for number in arguments.processes:
                again = [*LAUNCHER, str(number), __file__, *sys.argv[1:], "--out", str(out)]
                subprocess.run([sys.executable, *again], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                found = json.loads(out.read_text())
                chosen.append(found.pop("chosen"))
                for stage, taken in found.items():
                    seconds.setdefault((number, stage), []).append(taken)

    assert all(choice == chosen[0] for choice in chosen), chosen
    first = arguments.processes[0]
    for (number, stage), taken in seconds.items():
        columns = zip(*taken, strict=True), zip(*seconds[first, stage], strict=True)
        for kind, own, alone in zip(("wall", "processor"), *columns, strict=True):
            typical = statistics.median(own)
            ratio = statistics.median(alone) / typical
            print(f"{stage}, {number} processes: {typical:.1f} s ({kind}), {ratio:.2f} times as fast as {first}")
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
