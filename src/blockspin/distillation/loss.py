"""The distillation loss of every token, without ever holding the logits of all tokens.

KL(teacher || student) over the vocabulary is computed for a few hundred tokens at a time: the decoder gives hidden
states, and the head turns one chunk of them into logits, again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..model.blocks import find_stack
from ..model.head import SplitModel, split_model, widened
from ..model.residual import patched_forward, stream_in
from ..progress import console
from .divergence import divergence, with_rest

IGNORED = -100  # the label of a token without a successor, as in PyTorch


def split(model: PreTrainedModel) -> SplitModel:
    """The model in two halves. One that cannot be split is used whole, with a warning."""
    halves = split_model(model)
    if not halves.is_split:
        console.print(
            f"The head of {type(model).__name__} cannot be run apart: all its logits are held at once.",
            style="yellow",
        )
    return halves


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher that runs beside the student says of some tokens, as its last hidden states, (tokens, width)."""

    hidden: Tensor

    def split(self, size: int) -> list[TeacherStates]:
        """The same, so many tokens at a time."""
        return list(map(TeacherStates, torch.split(self.hidden, size)))


@dataclass(frozen=True)
class TeacherTokens:
    """What a teacher has said of some tokens: the most probable next tokens and their log-probabilities, (tokens, k)
    each."""

    tokens: Tensor
    values: Tensor

    def split(self, size: int) -> list[TeacherTokens]:
        """The same, so many tokens at a time."""
        return list(map(TeacherTokens, torch.split(self.tokens, size), torch.split(self.values, size)))


Target = TeacherStates | TeacherTokens


class DistillationLoss:
    """The losses of each token of a batch.

    They take the place of the student's forward pass, so that whatever wraps the student (DDP, FSDP, DeepSpeed,
    adapters, autocast) sees an ordinary forward and backward pass.

    teacher: None where every batch brings the teacher's view (`cache.TeachersView`).
    kind: the divergence that is trained on, see `divergence.divergence`.
    temperature: divides the logits of both models (arXiv 1503.02531, section 2).
    top_k: the teacher's most probable tokens are compared one by one, all others as one outcome; None: all one by one.
    chunk_tokens: tokens whose logits are held at a time.
    kept: for each block of the student its index in the teacher, if their hidden states are compared.
    """

    def __init__(
        self,
        student: SplitModel,
        teacher: SplitModel | None,
        *,
        kind: str = "kl",
        temperature: float = 1.0,
        top_k: int | None = None,
        chunk_tokens: int = 1024,
        kept: Sequence[int] | None = None,
    ) -> None:
        self.student, self.teacher, self.kind = student, teacher, kind
        self.temperature, self.top_k, self.chunk_tokens = temperature, top_k, chunk_tokens
        self.kept = list(kept) if kept is not None else None

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        teacher_tokens: Tensor | None = None,
        teacher_values: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """The losses by name, (batch, length) float32 each, 0 where the mask is 0.

        teacher_tokens, teacher_values: (batch, length, k), the teacher's most probable tokens and their
        log-probabilities, where they were computed before.

        kl: KL(teacher || student) in nats times the squared temperature.
        divergence (of another kind than KL): as kl.
        cross_entropy: of the student with the next token in nats, 0 where there is none.
        hidden (with `kept`): the squared distance of the hidden states after a kept block relative to the teacher's
        squared norm, the mean over the blocks.
        """
        inputs = {"input_ids": input_ids}
        mask = torch.ones_like(input_ids, dtype=torch.bool)  # (batch, length)
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            mask = attention_mask.bool()

        # Both decoders; from here on only the tokens that are not padding: (tokens, width).
        students_blocks = range(len(self.kept)) if self.kept is not None else ()
        theirs: dict[int, Tensor] = {}
        target: Target
        if teacher_tokens is not None and teacher_values is not None:
            target = TeacherTokens(teacher_tokens[mask], teacher_values[mask])
        else:
            assert self.teacher is not None
            with torch.no_grad(), _outputs(self.teacher.model, self.kept or ()) as theirs:
                target = TeacherStates(self.teacher.hidden(**inputs)[mask])
        with _outputs(self.student.model, students_blocks) as ours:
            hidden = self.student.hidden(**inputs)[mask]

        labels = next_tokens(input_ids, mask)[mask]  # (tokens,)
        losses = {}
        for name, values in self._over_chunks(hidden, labels, target).items():
            losses[name] = _spread(values, mask)

        if self.kept is not None:
            distances = []
            for j, i in zip(students_blocks, self.kept, strict=True):
                distances.append(_distance(ours[j], theirs[i], mask))  # (tokens,)
            losses["hidden"] = _spread(torch.stack(distances).mean(0), mask)
        return losses

    def _over_chunks(self, hidden: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
        """The losses by name, (tokens,) each; only the logits of one chunk of tokens are held at a time."""
        size = self.chunk_tokens
        targets: Sequence[Target] = target.split(size)
        chunks = list(zip(torch.split(hidden, size), torch.split(labels, size), targets, strict=True))

        found: dict[str, list[Tensor]] = {}
        for number, chunk in enumerate(chunks, 1):
            if torch.is_grad_enabled() and number < len(chunks):
                # The backward pass computes the logits of the chunk again instead of keeping them. It begins with the
                # last chunk, whose logits are still there.
                losses = checkpoint(self._chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            else:
                losses = self._chunk(*chunk)
            for name, values in losses.items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _chunk(self, hidden: Tensor, labels: Tensor, target: Target) -> dict[str, Tensor]:
        """The losses of the tokens of one chunk, (tokens,) each."""
        logits = widened(self.student.logits(hidden))  # (tokens, vocabulary)

        # The cross-entropy is that of the student itself, at temperature 1.
        found = log_softmax(logits, dim=-1)
        cross_entropy = nn.functional.nll_loss(found, labels, ignore_index=IGNORED, reduction="none")
        if self.temperature != 1:
            found = self._log_probabilities(logits)

        wanted, tokens = self._wanted(target)
        wanted = wanted.to(logits.device)
        if tokens is not None:
            found = with_rest(found.gather(-1, tokens.to(logits.device)))  # (tokens, k + 1)
        losses = {"cross_entropy": cross_entropy}
        losses["kl"] = divergence("kl", wanted, found) * self.temperature**2
        if self.kind != "kl":
            losses["divergence"] = divergence(self.kind, wanted, found) * self.temperature**2
        return losses

    @torch.no_grad()
    def _wanted(self, target: Target) -> tuple[Tensor, Tensor | None]:
        """The teacher's log-probabilities, (tokens, vocabulary); or of its most probable tokens and the rest,
        (tokens, k + 1), and which these are, (tokens, k)."""
        if isinstance(target, TeacherTokens):
            return with_rest(target.values), target.tokens

        assert self.teacher is not None
        log_probabilities = self._log_probabilities(widened(self.teacher.logits(target.hidden)))
        if self.top_k is None:
            return log_probabilities, None
        values, tokens = log_probabilities.topk(self.top_k)  # (tokens, k) each
        return with_rest(values), tokens

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)


@contextmanager
def training_forward(loss: DistillationLoss) -> Iterator[None]:
    """While the context is open, the student's forward pass returns the losses instead of logits."""
    with patched_forward(loss.student.model, loss):
        yield


def next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """(batch, length): the token that follows, `IGNORED` where none does or either is padding."""
    labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
    followed = nn.functional.pad(mask[:, 1:], (0, 1), value=False) & mask
    return labels.masked_fill(~followed, IGNORED)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """(tokens,) values of the tokens where the mask is 1 -> (batch, length), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """(tokens,): squared distance of hidden states (batch, length, width), relative to the teacher's squared norm."""
    ours, theirs = student[mask].float(), teacher[mask].to(student.device).float()
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1)


@contextmanager
def _outputs(model: nn.Module, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The hidden states after some blocks, of the forward pass that is made while the context is open: index -> (batch,
    length, width)."""
    outputs: dict[int, Tensor] = {}

    def keep(i: int, module: nn.Module, args: Any, output: Any) -> None:
        outputs[i] = stream_in(output)

    with ExitStack() as hooks:
        for i in blocks:
            handle = find_stack(model).layers[i].register_forward_hook(partial(keep, i))
            hooks.callback(handle.remove)
        yield outputs
