"""The GPU report: every line runs on a CPU; one that fails or comes too late does not take the others with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_bench
import pytest
import torch

SCRIPT = Path(gpu.__file__)


@pytest.fixture(scope="module")
def bench() -> gpu_bench.Bench:
    return gpu_bench.open_bench(torch.device("cpu"), tiny=True)


@pytest.mark.slow
def test_every_line_of_the_report_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    subprocess.run([sys.executable, SCRIPT, "--tiny", "--device", "cpu", "--out", out], check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [row["line"] for row in rows] == [name for name, _, _ in gpu.LINES]
    assert [row.get("error") for row in rows] == [None] * len(rows)


def test_a_line_that_fails_says_why(bench: gpu_bench.Bench) -> None:
    def failing(bench: gpu_bench.Bench) -> gpu_bench.Line:
        raise torch.OutOfMemoryError("no room\nand more")

    assert gpu.measured(bench, "large", failing, 10)["error"] == "OutOfMemoryError: no room"


def test_a_line_that_takes_too_long_is_ended(bench: gpu_bench.Bench) -> None:
    def endless(bench: gpu_bench.Bench) -> gpu_bench.Line:
        while True:
            time.sleep(0.01)

    gpu.end_lines_on_time()
    assert "--seconds" in gpu.measured(bench, "slow", endless, 0.1)["error"]


def test_offloading_gives_the_weights_back(bench: gpu_bench.Bench) -> None:
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    line = gpu.offloaded(bench)
    assert line.measured == 0
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_union_of_intervals() -> None:
    assert gpu.covered([(3, 4), (0, 2), (1, 2.5), (1.5, 2)]) == 3.5


def test_predicted_operations_are_those_that_torch_counts(bench: gpu_bench.Bench) -> None:
    """A forward pass by torch's counter of operations; our count leaves out half of the attention, which is causal."""
    from torch.utils.flop_counter import FlopCounterMode

    token_ids = torch.stack(bench.samples(2))  # (2, length)
    bench.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bench.model(token_ids)
    bench.model.set_attn_implementation("sdpa")

    attention = 2 * bench.length * bench.model.config.hidden_size * bench.depth * token_ids.numel()
    counted = bench.flops * bench.seconds_of_passes(1, 1, token_ids.numel()) + attention
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
