"""Every settings file of the paper's rows: it loads, says what its name says, and its removal exists."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from tiny import tiny_config

from blockspin.config import PAPER_TASKS, CompressConfig
from blockspin.model.blocks import find_blocks
from blockspin.model.loading import model_without_weights
from blockspin.problem import RemovalProblem

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*-minus-*.yaml"))  # the others are of distillation
# Model -> its family and number of layers; of Nemotron the kinds: 23 Mamba, 23 mixture-of-experts, 6 attention layers.
NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
DEPTHS: dict[str, tuple[str, int | str]] = {
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 32),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", 80),
    "Qwen/Qwen3-14B": ("qwen3", 40),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("nemotron_h", NEMOTRON),
}


def narrow(model: str) -> tf.PreTrainedConfig:
    """A small configuration with the depth of a model."""
    kind, depth = DEPTHS[model]
    if isinstance(depth, int):
        return tiny_config(kind, num_hidden_layers=depth, layer_types=None, max_window_layers=depth)
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    return tiny_config(kind, layers_block_type=[names[letter] for letter in depth])


def test_there_is_a_file_for_every_row() -> None:
    rows = {(CompressConfig.read(file)["model"], str(CompressConfig.read(file)["remove"])) for file in FILES}
    llama, big, qwen, nemotron = DEPTHS
    expected = {(llama, "8"), (llama, "16"), (qwen, "12"), *((big, str(n)) for n in (8, 16, 24, 32, 40))}
    assert rows == expected | {(nemotron, str(goal)) for goal in ({"moe": 2}, {"moe": 3}, {"attention": 2})}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_loads_and_its_removal_exists(file: Path) -> None:
    config = CompressConfig(**CompressConfig.read(file))
    name = re.search(r"-minus-(\d+)(?:-(\w+))?$", file.stem)
    assert name
    number, kind = name.groups()
    assert config.remove == ({kind: int(number)} if kind else int(number))
    assert (config.calibration, config.energy_samples, config.max_length, config.seed, config.beta) == (
        "teknium/OpenHermes-2.5", 2048, 1024, 42, 0.0,
    )  # fmt: skip
    assert config.tasks == (() if kind else PAPER_TASKS)
    blocks = find_blocks(model_without_weights(narrow(config.model)))
    counts = {"moe": 23, "attention": 6, "mamba": 23}
    assert len(blocks) == (DEPTHS[config.model][1] if not kind else sum(counts.values()))
    assert not kind or all(sum(block.kind == name for block in blocks) == count for name, count in counts.items())
    assert not isinstance(config.remove, float)  # a share of the parameters is no row of the paper
    problem = RemovalProblem(np.eye(len(blocks)), remove=config.remove, blocks=blocks)
    allowed = [i for i, block in enumerate(blocks) if kind in (None, block.kind)]
    assert problem.energy(allowed[: int(number)]) == int(number)
    assert f"`{file.name}`" in (ROOT / "docs" / "reproducing_the_paper.md").read_text()
