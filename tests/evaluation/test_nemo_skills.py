"""The commands of NeMo-Skills for the same benchmarks."""

from __future__ import annotations

import shlex
from pathlib import Path

from conftest import Command


def test_commands_for_nemo_skills(command: Command, tiny_folder: Path) -> None:
    sets = "aime25=10,gpqa_diamond_cot_zeroshot=5"
    code, printed = command(
        "evaluate", tiny_folder, "--tasks", "hellaswag", "--rollouts", sets, "--temperature", "1", "--print-nemo-skills"
    )
    assert code == 0
    assert "# not in NeMo-Skills: hellaswag" in printed
    assert "ns prepare_data aime25 gpqa\n" in printed
    words = shlex.split(printed.partition("ns eval")[2].replace("\\\n", ""))
    assert {"--benchmarks=aime25:10,gpqa:5", f"--model={tiny_folder}", "++inference.temperature=1.0"} <= set(words)
    assert command("evaluate", tiny_folder, "--tasks", "hellaswag", "--print-nemo-skills")[0] == 2
