"""Which weights of the student a training changes, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig

from ..model.blocks import find_stack
from ..model.tracing import trace_model
from ..repairs.projections import find_projections
from ..training import DistillConfig

# The paper's learning rate is for models of this width; narrower ones want a higher one. See docs/distillation.md.
PAPER_RATE, PAPER_WIDTH, EXPONENT = 2e-5, 4096, 4 / 3


def learning_rate(config: DistillConfig, student: PretrainedConfig) -> float:
    """The learning rate that was asked for, or one by the student's width."""
    if config.learning_rate is not None:
        return config.learning_rate
    width: int = student.get_text_config(decoder=True).hidden_size
    return float(PAPER_RATE * (PAPER_WIDTH / width) ** EXPONENT)


@contextmanager
def only_some_trained(
    student: nn.Module, choice: str, kept: Sequence[int] | None, teachers_blocks: int
) -> Iterator[None]:
    """Inside, only the chosen weights need gradients; afterwards all do that did before.

    choice: see `DistillConfig.train`. kept: for each block of the student its index among the teacher's blocks.
    """
    if choice == "all":
        chosen = {id(p) for p in student.parameters()}
    elif choice == "neighbours":
        assert kept is not None  # checked before
        chosen = _of_neighbours(student, kept, teachers_blocks)
    else:
        chosen = _norms_and_projections(student)

    others = [p for p in student.parameters() if p.requires_grad and id(p) not in chosen]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def _of_neighbours(student: nn.Module, kept: Sequence[int], teachers_blocks: int) -> set[int]:
    """The ids of the parameters of blocks that lie directly before or after a removed one."""
    chosen = set()
    for layer, block in zip(find_stack(student).layers, kept, strict=True):
        neighbours = {block - 1, block + 1} & set(range(teachers_blocks))
        if neighbours - set(kept):
            chosen |= {id(p) for p in layer.parameters()}
    return chosen


def _norms_and_projections(student: nn.Module) -> set[int]:
    """The ids of the parameters of norms (and biases: whatever has one dimension) and out-projections."""
    chosen = {id(p) for p in student.parameters() if p.ndim == 1}
    layers = find_stack(student).layers
    for layer, found in zip(layers, find_projections(trace_model(student)), strict=True):
        for projection in found:
            chosen |= {id(p) for p in layer.get_submodule(projection.name).parameters()}
    return chosen
