"""The distillation loss of every token, without ever holding the logits of all tokens.

KL(teacher || student) over the vocabulary is computed for a few hundred tokens at a time: the decoder gives hidden
states, and the head turns one chunk of them into logits, again in the backward pass. The head is the model's own
forward pass with its decoder stood in for, so soft-capping or scaling of the logits is the model's, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..model.batches import frozen, input_device
from ..model.blocks import find_stack
from ..progress import console


class SplitModel:
    """A causal language model in two halves: `hidden` runs the decoder, `logits` the head on its result.

    Both run the model's own forward pass; in the first the head sees one token, in the second the decoder only hands
    out what it was given. Made by `split`. Where a model cannot be split, `hidden` gives the logits themselves.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder: nn.Module = model.get_decoder()
        self.is_split = self.decoder is not model
        self._run, self._decode = model.forward, self.decoder.forward
        self._output: Any = None
        self._given: Tensor | None = None
        self._hidden: Tensor | None = None

    def hidden(self, **inputs: Any) -> Tensor:
        """(batch, length, width): what the head is applied to."""
        output = self._run(**inputs, use_cache=False)
        hidden, self._hidden = self._hidden, None
        if not self.is_split:
            logits: Tensor = output.logits
            return logits
        assert hidden is not None
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, width) to (tokens, vocabulary) in float32 or wider."""
        if self.is_split:
            self._given = hidden[None]
            try:
                ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=input_device(self.model))
                hidden = self._run(input_ids=ids, use_cache=False).logits[0]
            finally:
                self._given = None
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward pass: keep its result for `hidden` and pass on the last token, or pass on what the head
        is to be applied to."""
        if self._given is not None:
            return self._output(last_hidden_state=self._given)
        output = self._decode(*args, **kwargs)
        self._output, self._hidden = type(output), output.last_hidden_state
        return self._output(last_hidden_state=output.last_hidden_state[:, -1:])


@contextmanager
def split(model: PreTrainedModel) -> Iterator[SplitModel]:
    """The model in two halves, proven on a few tokens to give its own logits; as it was afterwards."""
    halves = SplitModel(model)
    token_ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=input_device(model))
    with ExitStack() as stack:
        with frozen(model), torch.no_grad():
            expected: Tensor = model(input_ids=token_ids, use_cache=False).logits[0]
            if halves.is_split:
                stack.enter_context(_forward_replaced(halves.decoder, halves.stand_in))
                halves.is_split = _gives(halves, token_ids, expected)
        if not halves.is_split:
            stack.close()
            console.print(
                f"The head of {type(model).__name__} cannot be run apart: all its logits are held at once.",
                style="yellow",
            )
        yield halves


def _gives(halves: SplitModel, token_ids: Tensor, expected: Tensor) -> bool:
    try:
        chunks = torch.split(halves.hidden(input_ids=token_ids)[0], 4)  # two, as logits may depend on other tokens
        found = torch.cat([halves.logits(chunk) for chunk in chunks])
    except Exception:  # a model's own code may trip over the stand-in in any way
        return False
    tolerance = (1e-2 if expected.dtype.itemsize < 4 else 1e-4) * float(expected.abs().nan_to_num().max())
    return torch.allclose(found, expected.to(found.dtype), rtol=0, atol=tolerance, equal_nan=True)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class DistillationLoss:
    """Losses of each token of a batch; takes the place of the student's forward pass, so that whatever wraps the
    student (DDP, FSDP, DeepSpeed, adapters, autocast) sees an ordinary forward and backward pass.

    kept: for each block of the student its index in the teacher, where their hidden states are compared.
    top_k: the teacher's most probable tokens are compared one by one, all others as one outcome; None: all one by one.
    chunk_tokens: tokens whose logits are held at a time.
    """

    def __init__(
        self,
        student: SplitModel,
        teacher: SplitModel,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        chunk_tokens: int = 1024,
        kept: Sequence[int] | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.temperature, self.top_k, self.chunk_tokens = temperature, top_k, chunk_tokens
        self.kept = list(kept) if kept is not None else None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        """(batch, length) float32 each, 0 where the mask is 0: `kl` is KL(teacher || student) in nats times the squared
        temperature; `cross_entropy` that of the student with the next token, 0 where there is none; `hidden` (with
        `kept`) the squared distance of the hidden states after each kept block, relative to the teacher's, averaged
        over the blocks.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        kept = range(len(self.kept)) if self.kept is not None else ()
        with torch.no_grad(), _outputs(self.teacher.model, self.kept or ()) as theirs:
            target = self.teacher.hidden(**inputs)[mask]
        with _outputs(self.student.model, kept) as ours:
            hidden = self.student.hidden(**inputs)[mask]
        labels = next_tokens(input_ids, mask)[mask]
        kl, cross_entropy = self._over_chunks(hidden, target, labels)
        losses = {"kl": _spread(kl, mask), "cross_entropy": _spread(cross_entropy, mask)}
        if self.kept is not None:
            distances = [_distance(ours[j], theirs[i], mask) for j, i in zip(kept, self.kept, strict=True)]
            losses["hidden"] = _spread(torch.stack(distances).mean(0), mask)
        return losses

    def _over_chunks(self, hidden: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for chunk in zip(*(torch.split(part, self.chunk_tokens) for part in (hidden, target, labels)), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._chunk, *chunk, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._chunk(*chunk))
        return torch.cat([kl for kl, _ in parts]), torch.cat([cross_entropy for _, cross_entropy in parts])

    def _chunk(self, hidden: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.student.logits(hidden)
        with torch.no_grad():
            wanted = self._log_probabilities(self.teacher.logits(target).to(logits.device))
        found = log_softmax(logits, dim=-1)
        cross_entropy = nn.functional.nll_loss(found, labels, ignore_index=-100, reduction="none")
        if self.temperature != 1:
            found = self._log_probabilities(logits)
        if self.top_k is not None:
            wanted, found = _most_probable(wanted, found, self.top_k)
        kl = torch.linalg.vecdot(wanted.exp(), wanted - found)
        return kl * self.temperature**2, cross_entropy

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return log_softmax(logits if self.temperature == 1 else logits / self.temperature, dim=-1)


@contextmanager
def training_forward(loss: DistillationLoss) -> Iterator[None]:
    """The student's forward pass gives the losses of `loss` instead of logits."""
    with _forward_replaced(loss.student.model, loss):
        yield


def next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """(batch, length): the token that follows, -100 where none does or either is padding."""
    labels = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    followed = nn.functional.pad(mask[:, 1:], (0, 1), value=False) & mask
    return labels.masked_fill(~followed, -100)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the tokens where the mask is 1, at their places."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _most_probable(wanted: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's k most probable tokens and, last, of all others together: (tokens, k + 1)."""
    top, indices = wanted.topk(k, dim=-1)
    both = (top, found.gather(-1, indices))
    rest = [torch.log((1 - part.exp().sum(-1, keepdim=True)).clamp(min=1e-7)) for part in both]
    return torch.cat([both[0], rest[0]], dim=-1), torch.cat([both[1], rest[1]], dim=-1)


def _distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    ours, theirs = student[mask].float(), teacher[mask].to(student.device).float()
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1)


@contextmanager
def _outputs(model: nn.Module, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The hidden states after some blocks, of the forward pass that is made while the context is open."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i in blocks:

            def keep(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
                outputs[i] = output[0] if isinstance(output, tuple | list) else output

            handle = find_stack(model)[1][i].register_forward_hook(keep)
            stack.callback(handle.remove)
        yield outputs
