"""A model in two halves: what runs before the head, and the head, so that no more logits are made than are used.

The logits of all tokens, (batch, length, vocabulary), are often the largest tensor of a pass. Here the decoder gives
hidden states (batch, length, width), and the head turns those that matter into logits, a chunk of tokens at a time. The
head is the model's own forward pass with its decoder stood in for, so that soft-capping or scaling of the logits is the
model's, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, frozen, input_device
from .blocks import check_model, find_stack
from .offload import resident
from .probe import probe_ids
from .residual import patched_forward

CHUNK_BYTES = 2**28  # of the logits that are held at a time, in float32
LOGIT_COPIES = 4  # of these, while models are compared
CACHED_BYTES = 2**20  # of those that stay in the cache of a CPU core with what is computed from them
NARROW_TOLERANCE, TOLERANCE = 1e-2, 1e-4  # of the largest logit, in 16 bits and in wider types


class SplitModel:
    """A causal language model in two halves: `hidden` runs the decoder, `logits` runs the head on its result.

    Both run the model's own forward pass. In the first, the head sees no token; in the second, the decoder is not run
    and returns the hidden states that it was given. Made by `split_model`, which proves that the halves give the
    model's own logits. A model that cannot be split has no decoder: `hidden` returns the logits, `logits` does nothing.

    chunk: tokens whose logits take `CHUNK_BYTES`. cached: those whose logits stay in the caches of the CPU.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module | None, vocabulary: int) -> None:
        self.model, self.decoder = model, decoder
        self.chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
        self.cached = torch.get_num_threads() * max(1, CACHED_BYTES // (4 * vocabulary))
        self._run = model.forward  # its own: a training has the model's forward pass return losses
        self._output: Any = None  # the class of the decoder's output

    @property
    def is_split(self) -> bool:
        """Whether the head runs apart."""
        return self.decoder is not None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model's forward pass is its own, in a training too."""
        with patched_forward(self.model, self._run):
            yield

    @contextmanager
    def resident_head(self) -> Iterator[None]:
        """Inside, the weights of the head stay where it runs, however many chunks of tokens it is applied to."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        with nullcontext() if head is None else resident(head):
            yield

    def hidden_of(self, batch: Batch) -> Tensor:
        """(batch, length, width): what the head is applied to.

        Raises:
            ValueError: a token is beyond the model's embedding.
        """
        return self.hidden(**batch.inputs(self.model))

    def hidden_by_call(self, batch: Batch) -> Tensor:
        """As `hidden_of`, but the model is called as its users call it: what is hooked to the model runs too."""
        with self.without_head() as kept:
            logits = batch.forward(self.model)
        return kept[0] if kept else logits

    def hidden(self, **inputs: Any) -> Tensor:
        """(batch, length, width): what the head is applied to. inputs: of the model's forward pass."""
        with self.without_head() as kept:
            logits: Tensor = self._run(**inputs, use_cache=False).logits
        return kept[0] if kept else logits

    @contextmanager
    def without_head(self) -> Iterator[list[Tensor]]:
        """Inside, the head sees no token: yields what it would be applied to, of each pass (batch, length, width).

        Nothing where the head does not run apart.
        """
        kept: list[Tensor] = []
        if self.decoder is None:
            yield kept
            return

        decode = self.decoder.forward

        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = decode(*args, **kwargs)
            kept.append(output.last_hidden_state)
            self._output = type(output)
            return self._output(last_hidden_state=output.last_hidden_state[:, :0])

        with patched_forward(self.decoder, keeping):
            yield kept

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, width) to (tokens, vocabulary), in the dtype that the model gives."""
        if self.decoder is None:
            return hidden

        def given(*args: Any, **kwargs: Any) -> Any:
            return self._output(last_hidden_state=hidden[None])

        # The token ids only have the right shape: the decoder that would embed them is not run.
        token_ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=input_device(self.model))
        with patched_forward(self.decoder, given):
            logits: Tensor = self._run(input_ids=token_ids, use_cache=False).logits[0]
        return logits

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """(tokens, width) to (tokens, vocabulary) in float32 or wider."""
        return log_softmax(self.logits(hidden))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or what is wider: sums over a vocabulary need it."""
    return torch.promote_types(tensor.dtype, torch.float32)


def log_softmax(logits: Tensor) -> Tensor:
    """(tokens, vocabulary) in float32 or wider."""
    return logits.log_softmax(-1, dtype=wide_dtype(logits))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(wide_dtype(tensor))


def split_model(model: nn.Module) -> SplitModel:
    """The model in two halves that give the logits of the whole model on a few tokens.

    Raises:
        ValueError: as `check_model` says.
    """
    check_model(model)
    token_ids = probe_ids(model)
    with frozen(model), torch.no_grad():
        expected: Tensor = model(input_ids=token_ids, use_cache=False).logits[0]  # (tokens, vocabulary)
        for decoder in _decoders(model):
            halves = SplitModel(model, decoder, expected.shape[-1])
            if _agree(halves, token_ids, expected):
                return halves
    return SplitModel(model, None, expected.shape[-1])


def _decoders(model: Any) -> Iterator[nn.Module]:
    """The modules that may be the decoder, the most likely first: what the model says, or what holds its blocks."""
    for module in (model.get_decoder(), model.base_model):
        if isinstance(module, nn.Module) and module is not model:
            yield module
    yield model.get_submodule(find_stack(model).name.rpartition(".")[0])


def _agree(halves: SplitModel, token_ids: Tensor, expected: Tensor) -> bool:
    """Whether the halves give the logits (tokens, vocabulary) that the whole model gives."""
    try:
        # Two chunks of tokens, because the logits of one token may depend on others.
        hidden = halves.hidden(input_ids=token_ids)[0]
        found = torch.cat([halves.logits(chunk) for chunk in torch.split(hidden, 4)])
    except Exception:  # a model's own code may fail on the stand-in in any way
        return False

    share = NARROW_TOLERANCE if expected.dtype.itemsize < 4 else TOLERANCE
    tolerance = share * float(expected.abs().nan_to_num().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)
