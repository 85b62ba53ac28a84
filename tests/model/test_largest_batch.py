"""What a batch should need, against what passes hold: every tensor is followed from its making to its end."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, Command, random_samples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockspin.model.batches import frozen
from blockspin.model.gates import gated
from blockspin.model.largest_batch import SHARE, kept_bytes, lowered_size, tokens_that_fit
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_keep_what_is_estimated_to_a_factor_of_two(family: str, checkpointing: bool) -> None:
    model = tiny_model(family)
    traced = trace_model(model)
    token_ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH))
    alphas = torch.ones(SAMPLES, traced.depth, requires_grad=True)
    with frozen(model), LiveBytes() as live, gated(traced, alphas, checkpointing):
        torch.autograd.backward(traced.halves.hidden(input_ids=token_ids).sum())
    estimated = kept_bytes(model, checkpointing)
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


def test_a_size_that_is_lowered_is_said_with_the_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory holds 40 tokens; what a backward pass keeps of all four blocks, 16."""
    monkeypatch.setattr(FREE, lambda device: 2 * 40 * (1280 + 1024))
    model, samples = tiny_model("llama"), random_samples((12,) * 9)
    said = lowered_size(9, samples, model)
    assert len(said) == 1
    assert "9 samples side by side (--batch-size 9); 3 of 12 tokens are taken" in said[0]
    assert "9 samples of the gradients" in lowered_size(9, samples, model, backward=True)[0]
    assert "; 1 of 12" in lowered_size(9, samples, model, backward=True)[0]

    assert lowered_size(3, samples, model) == lowered_size("auto", samples, model) == []
    assert lowered_size(9, samples[:3], model) == []


def test_commands_say_once_that_fewer_samples_are_taken(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FREE, lambda device: 2**20)
    given = ("--energy", "secant", "--energy-samples", 16, "--max-length", 32, "--calibration", text_file)
    for size, notes in ((16, 1), (2, 0), ("auto", 0)):
        out = tmp_path / f"{size}.safetensors"
        code, said = command("energies", tiny_folder, *given, "--batch-size", size, "--out", out)
        assert (code, said.count("are taken")) == (0, notes)

    data = ("--energies", out, "--remove", 1, "--data", text_file, "--max-length", 32, "--num-samples", 16)
    code, said = command("select", tiny_folder, *data, "--batch-size", 16, "--out", tmp_path / "choice.json")
    assert (code, said.count("are taken")) == (0, 1)
