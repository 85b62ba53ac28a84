"""Sliding-window merging (arXiv 2502.19159): the one method here that changes weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.batches import Batch, BatchSize, frozen, make_batches
from ..model.blocks import find_stack
from ..model.head import widened
from ..model.offload import check_in_memory
from ..model.quantization import check_unquantized
from ..model.tracing import TracedModel, skipped, trace_model
from ..problem import RemovalProblem
from ..progress import track
from ..solvers.candidates import Candidate
from ..surgery.memory import remove_blocks

Windows = tuple[tuple[int, int], ...]  # (lo, hi): blocks lo to hi, both included, become one
_BISECTIONS = 16


@dataclass(frozen=True)
class Merged:
    """The outcome: blocks lo+1..hi of every window are gone, and block lo holds the merged weights.

    threshold: the highest cosine threshold, to 2^-15, at which enough blocks merge.
    """

    candidate: Candidate
    windows: Windows
    threshold: float


def sliding_window_merging(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Merged:
    """From the last block but one downwards a window grows as long as the model with the window merged into one block
    stays similar: cosine between its last hidden states and the original's (flattened per sample, mean over samples)
    of at least a threshold. Else the last accepted window is committed, and a new one starts at the refused block.

    The threshold is found by bisection: the highest at which M blocks disappear. Merging stops there when M have gone,
    so M is always met exactly. Protected blocks, and blocks whose weights differ in shape from their neighbour's, end a
    window. The removed blocks reported are all of a window but its lowest.

    Raises:
        ValueError: the goal is not a number of blocks in all, so many cannot be merged, or weights are offloaded or
            quantised.
    """
    if not isinstance(problem.remove, int):
        raise ValueError("sliding-window merging takes a number of blocks in all, no kinds and no share of parameters")
    check_in_memory(model, "sliding-window merging")
    check_unquantized(model, "sliding-window merging")
    goal = problem.remove
    traced = trace_model(model)
    similarity = _Similarity(traced, samples, batch_size)

    # At the lowest threshold everything merges that can; between it and 1 lies the highest at which M blocks go.
    low, high = -1.0, 1.0
    windows = _windows_at(low, traced, similarity, goal, problem.protect)
    if _num_merged(windows) < goal:
        raise ValueError(f"sliding-window merging can merge away {_num_merged(windows)} blocks, not {goal}")
    for _ in track(range(_BISECTIONS), "Sliding window", _BISECTIONS, show=progress):
        middle = (low + high) / 2
        found = _windows_at(middle, traced, similarity, goal, problem.protect)
        if _num_merged(found) == goal:
            low, windows = middle, found
        else:
            high = middle

    removed = tuple(gone_from(windows))
    return Merged(Candidate(removed, "sliding-window merging"), tuple(sorted(windows)), low)


def merge_windows(model: nn.Module, windows: Windows) -> nn.Module:
    """An ordinary transformers model with each window merged into one block; it shares the other weights with `model`.

    Raises:
        ValueError: a removal that the model's configuration cannot express.
    """
    gone = gone_from(windows)
    smaller: nn.Module = remove_blocks(model, gone, copy=False)
    before, after = find_stack(model).layers, find_stack(smaller).layers
    kept = sorted({*range(len(before))} - {*gone})
    for lo, hi in windows:
        position = kept.index(lo)
        layer = copy.deepcopy(after[position])
        for parameter, weight in zip(layer.parameters(), merged_weights(before, lo, hi), strict=True):
            parameter.data = weight
        after[position] = layer
    return smaller


@contextmanager
def merged(traced: TracedModel, windows: Windows) -> Iterator[None]:
    """Inside, each window of the model runs as one block; afterwards the model is as it was."""
    stack = traced.layers
    with ExitStack() as undo:
        undo.enter_context(skipped(traced, gone_from(windows)))
        for lo, hi in windows:
            for parameter, weight in zip(stack[lo].parameters(), merged_weights(stack, lo, hi), strict=True):
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = weight
        yield


def merged_weights(stack: nn.ModuleList, lo: int, hi: int) -> list[Tensor]:
    """theta_lo + sum over k = lo+1..hi of (theta_k - theta_lo), parameter by parameter, summed in float32 or wider."""
    others = [list(stack[k].parameters()) for k in range(lo + 1, hi + 1)]
    weights = []
    for place, parameter in enumerate(stack[lo].parameters()):
        first = widened(parameter.detach())
        total = first.clone()
        for parameters in others:
            total += parameters[place].detach().to(first) - first
        weights.append(total.to(parameter.dtype))
    return weights


def gone_from(windows: Windows) -> list[int]:
    """The blocks that disappear: all of each window but its lowest."""
    gone: list[int] = []
    for lo, hi in windows:
        gone += range(lo + 1, hi + 1)
    return sorted(gone)


class _Similarity:
    """How similar the model stays with windows merged: mean cosine over the samples; each is measured once."""

    def __init__(self, traced: TracedModel, samples: Sequence[Tensor], batch_size: BatchSize) -> None:
        self._traced, self._num_samples = traced, len(samples)
        self._known: dict[Windows, float] = {}

        # Each batch, in parts that fit into memory, with the original's states, (batch, length, width).
        batches = make_batches(samples, batch_size)
        self._originals = list(traced.room.results(batches, lambda batch: _last_hidden_states(traced, batch)))

    def __call__(self, windows: Windows) -> float:
        if windows in self._known:
            return self._known[windows]
        total = 0.0
        with merged(self._traced, windows):
            for batch, original in self._originals:
                total += _cosines(_last_hidden_states(self._traced, batch), original, batch)
        self._known[windows] = total / self._num_samples
        return self._known[windows]


def _windows_at(
    threshold: float, traced: TracedModel, similarity: _Similarity, goal: int, protect: Sequence[int]
) -> Windows:
    """What merges at a threshold: blocks lo to hi are the window that grows, `done` those before it."""
    done: Windows = ()
    hi = lo = traced.depth - 2
    for block in range(hi - 1, -1, -1):
        wanted = _can_join(traced, block, protect) and _num_merged((*done, (lo, hi))) < goal
        if wanted and similarity((*done, (block, hi))) >= threshold:
            lo = block
        else:
            done = (*done, (lo, hi)) if lo < hi else done
            hi = lo = block
    return (*done, (lo, hi)) if lo < hi else done


def _num_merged(windows: Windows) -> int:
    return len(gone_from(windows))


def _can_join(traced: TracedModel, i: int, protect: Sequence[int]) -> bool:
    """Whether blocks i and i + 1 may be in one window: both may go, and their weights are of the same shapes."""
    if i in protect or i + 1 in protect:
        return False
    return _shapes(traced.layers[i]) == _shapes(traced.layers[i + 1])


def _shapes(layer: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, weight.shape) for name, weight in layer.named_parameters()]


def _last_hidden_states(traced: TracedModel, batch: Batch) -> Tensor:
    """(batch, length, width): what enters the head, the states after the final norm."""
    with frozen(traced.model), torch.no_grad():
        return traced.halves.hidden_of(batch)


def _cosines(hidden: Tensor, original: Tensor, batch: Batch) -> float:
    """Sum over the samples of the cosine between their flattened hidden states, padding left out."""
    total = 0.0
    for ours, theirs, length in zip(hidden, original, batch.lengths.tolist(), strict=True):
        flat, reference = ours[:length].flatten().double(), theirs[:length].flatten().double()
        total += float(nn.functional.cosine_similarity(flat, reference, dim=0))
    return total
