"""Free memory is what the machine has, or what a limit leaves of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from blockspin import memory

LIMITED = """
import resource
from blockspin.memory import available_memory

resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
before = available_memory()
held = bytearray(2**28)
print(before, available_memory())
"""


def test_limit_of_the_data_segment_counts() -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before < 2**30
    assert before - after == pytest.approx(2**28, rel=0.05)


@pytest.mark.parametrize(
    ("membership", "place", "files"),
    [
        ("0::/job/part", "job", memory._FILES_2),
        ("0::/\n9:memory:/job/part", "memory/job", memory._FILES_1),
    ],
)
def test_limits_of_control_groups_count(
    membership: str, place: str, files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of 5 MB set above the group of this process; 3 MB are used, of which 1 MB is a cache of files."""
    group = tmp_path / place
    (group / "part").mkdir(parents=True)
    limit, usage, cache = files
    (group / limit).write_text("5000000\n")
    (group / usage).write_text("3000000\n")
    (group / "memory.stat").write_text(f"other 7\n{cache} 1000000\n")
    (group / "part" / limit).write_text("max\n")

    own = tmp_path / "cgroup"
    own.write_text(membership)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIPS", own)
    assert memory.available_memory() == 3_000_000


def test_without_limits_it_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMBERSHIPS", tmp_path / "none")
    assert memory.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_processes_of_a_machine_share_its_memory_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMBERSHIPS", tmp_path / "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share = psutil.virtual_memory().available / 4
    assert memory.available_memory() == pytest.approx(share, rel=0.2)
    assert memory.free_memory(torch.device("cpu")) == pytest.approx(share, rel=0.2)


HELD = """
import psutil, torch
from blockspin.memory import release_memory

rows = [torch.zeros(20_000) for _ in range(2_000)]  # 160 MB in pieces that are too small to be mapped one by one
last = rows[-1]
del rows
before = psutil.Process().memory_info().rss
release_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc keeps")
def test_memory_below_what_is_still_used_goes_back_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0.9 * 160e6


REUSED = """
import psutil, torch
from blockspin.memory import map_tensors

large = torch.zeros(7_000_000)  # 28 MB: once it is freed, glibc takes what is smaller from its heap
del large
{mapping}
rows = [torch.zeros(500_000) for _ in range(80)]  # 160 MB
last = rows[-1]
before = psutil.Process().memory_info().rss
del rows
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc keeps")
@pytest.mark.parametrize("mapping", ["", "map_tensors()"])
def test_tensors_with_pages_of_their_own_leave_nothing_behind(mapping: str) -> None:
    script = REUSED.format(mapping=mapping)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 0.9 * 158e6) == bool(mapping)
