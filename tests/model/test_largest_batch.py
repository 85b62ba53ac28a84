"""What a batch should need, against what passes hold: every tensor is followed from its making to its end."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockspin.model.batches import frozen
from blockspin.model.gates import gated
from blockspin.model.largest_batch import SHARE, tokens_that_fit
from blockspin.model.tracing import trace_model

FREE = "blockspin.model.largest_batch.free_memory"
SAMPLES, LENGTH = 64, 32


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors that operations make: `most` bytes are there at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._live: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage(leaf)._cdata not in given:
                self._follow(_storage(leaf))
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.most = max(self.most, sum(self._live.values()))
            weakref.finalize(storage, self._live.pop, key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_token_takes_what_is_estimated_to_a_factor_of_two(
    family: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of families whose attention makes no matrix."""
    model = tiny_model(family)
    traced = trace_model(model)
    token_ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH))
    with frozen(model), LiveBytes() as live:
        if backward:
            with gated(traced, torch.ones(SAMPLES, traced.depth, requires_grad=True)):
                torch.autograd.backward(traced.halves.hidden(input_ids=token_ids).sum())
        else:
            with torch.no_grad():
                traced.halves.hidden(input_ids=token_ids)

    # In so much memory a full chunk of logits is nothing.
    large = 2**60
    monkeypatch.setattr(FREE, lambda device: large)
    estimated = SHARE * large / tokens_that_fit(model, backward=backward)  # bytes of a token
    assert estimated / 2 < live.most / (SAMPLES * LENGTH) < 2 * estimated


def test_logits_count_up_to_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token has 4 * 4 * (32 + 48) bytes in a block, and 4 * 4 * 64 of logits."""
    model = tiny_model("llama")
    in_block, of_logits = 1280, 1024
    monkeypatch.setattr(FREE, lambda device: 2 * 100 * (in_block + of_logits))
    assert tokens_that_fit(model) == pytest.approx(100)
    assert tokens_that_fit(model, backward=True) == pytest.approx(
        100 * (in_block + of_logits) / (4 * in_block + of_logits)
    )

    monkeypatch.setattr(FREE, lambda device: 2 * (4 * 2**28 + 2**24 * in_block))
    assert tokens_that_fit(model) == pytest.approx(2**24)

    # Of several models the largest decides.
    wide = tiny_model("gpt2")  # 4 * 4 * (32 + 128)
    assert tokens_that_fit(model, wide) == tokens_that_fit(wide) == pytest.approx(2**23)


def test_experts_that_a_token_does_not_meet_take_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FREE, lambda device: 2**60)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fitting = []
    for experts in (4, 16):
        config = tf.MixtralConfig(**sizes, vocab_size=VOCABULARY, num_local_experts=experts, num_experts_per_tok=2)
        fitting.append(tokens_that_fit(tf.MixtralForCausalLM(config)))
    assert fitting[0] == fitting[1]
