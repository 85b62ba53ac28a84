"""Tiny random models of every family, with the names of their residual branches for independent references."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import ByteLevelBPETokenizer
from torch.overrides import TorchFunctionMode

from blockspin import cli
from blockspin.config import CompressConfig

Command = Callable[..., tuple[int, str]]
VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 8}
_GEMMA_BRANCHES = ("post_attention_layernorm", "post_feedforward_layernorm")
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}

# family -> (configuration, the modules of a layer whose outputs are its residual branches)
FAMILIES: dict[str, tuple[Callable[[], tf.PreTrainedConfig], tuple[str, ...]]] = {
    "llama": (lambda: tf.LlamaConfig(**_GROUPED), ("self_attn", "mlp")),
    "qwen2": (lambda: tf.Qwen2Config(**_GROUPED), ("self_attn", "mlp")),
    "qwen3": (lambda: tf.Qwen3Config(**_GROUPED, head_dim=8), ("self_attn", "mlp")),
    "mistral": (lambda: tf.MistralConfig(**_GROUPED, sliding_window=8), ("self_attn", "mlp")),
    "gemma2": (lambda: tf.Gemma2Config(**_GEMMA), _GEMMA_BRANCHES),
    "gemma3": (lambda: tf.Gemma3TextConfig(**_GEMMA), _GEMMA_BRANCHES),
    "gpt2": (lambda: tf.GPT2Config(**_GPT2, bos_token_id=0, eos_token_id=1), ("attn", "mlp")),
    "gpt_neox": (lambda: tf.GPTNeoXConfig(**_COMMON), ("attention", "mlp")),
    "phi3": (lambda: tf.Phi3Config(**_GROUPED), ("self_attn", "mlp")),
}


def tiny_model(family: str, seed: int = 0, scale: float = 4.0) -> tf.PreTrainedModel:
    """A random model whose blocks do something: initial weights are scaled up, so that no branch is negligible."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(scale)
    return model


def random_samples(lengths: tuple[int, ...] = (9, 5, 12, 2, 7), seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]


class InFloat64(TorchFunctionMode):
    """Models compute norms and rotations in float32 whatever their dtype; inside this mode those are float64 too."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        def widen(value: object) -> object:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def plain_loss(model: tf.PreTrainedModel, sample: torch.Tensor) -> torch.Tensor:
    """Token-mean cross-entropy of one sample as transformers computes it."""
    loss: torch.Tensor = model(sample[None], labels=sample[None], use_cache=False).loss
    return loss


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with a tokenizer trained on the spot."""
    return save_tiny(tmp_path / "model")


def save_tiny(folder: Path, family: str = "llama", vocabulary: int = 300, **save_options: object) -> Path:
    config = FAMILIES[family][0]()
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **save_options)
    save_tokenizer(folder, vocabulary)
    return folder


def save_tokenizer(folder: Path, vocabulary: int = 300) -> None:
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(["a few words to learn from"] * 3, vocabulary, special_tokens=["<|end|>"])
    tf.PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<|end|>").save_pretrained(folder)


def settings(model: Path, text: Path | str, **changes: Any) -> CompressConfig:
    """Settings of a run on a tiny model. changes: values of CompressConfig, which checks them."""
    small: dict[str, Any] = {
        "remove": 2,
        "energy": "secant",  # the fewest passes
        "energy_samples": 24,
        "selection_samples": 8,
        "evaluation_samples": 8,
        "max_length": 32,
        "states": 6,
    }
    return CompressConfig(str(model), str(text), **{**small, **changes})


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(f"row {i} has some words {i * j}" for j in range(i % 7 + 1))} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data_folder() -> Path:
    folder = os.environ.get("BLOCKSPIN_DATA")
    if not folder:
        pytest.skip("BLOCKSPIN_DATA is not set")
    return Path(folder)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: (exit code, what it printed)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["blockspin", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
