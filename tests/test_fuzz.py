"""Mutated configurations, indices, headers and datasets: one line and exit code 2, or exit code 0 and a right result.

What is right is told by transformers alone: the checkpoint as it loads it, with the block taken out by hand. A few
cases of each kind run always, many more in the slow suite.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from conftest import Command, save_tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

FEW, MANY = 13, 130  # cases of each of the four kinds: 52 always, 520 in the slow suite
REMOVED = 1
SAMPLES = 3
TOKEN_IDS = torch.arange(2, 12)[None]  # (1, 10)

numbers = st.integers(-2, 12) | st.floats(-4, 40) | st.sampled_from([1e-5, 1e4, float("nan")])
texts = st.sampled_from(["", "llama", "qwen2", "gelu", "float16", "F16", "I64", "../x", "model.norm.weight", "é\ud800"])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in one file and in several; examples only read them."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "whole": save_tiny(folder / "whole"),
        "sharded": save_tiny(folder / "sharded", max_shard_size="60KB"),
    }


@pytest.fixture
def tried(command: Command) -> Callable[..., bool]:
    """Run a command that writes `out`: whether it did. A refusal must be one line and leave `folder` as it was."""

    def run(folder: Path, out: Path, *arguments: object) -> bool:
        def contents() -> dict[Path, bytes]:
            return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        before = contents()
        code, printed = command(*arguments, "--out", out)
        assert "Traceback" not in printed
        if code == 0:
            return True

        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), printed
        assert contents() == before
        return False

    return run


def mutated(value: Any, data: st.DataObject, depth: int = 4) -> Any:
    """A JSON value with one place of it changed, taken out or added."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or depth == 0 or data.draw(st.integers(0, 5)) == 0:
        return data.draw(values)

    key, changed = data.draw(st.sampled_from(inside)), value.copy()
    what = data.draw(st.sampled_from(["go in", "go in", "replace", "take out", "move"]))
    if what == "take out":
        del changed[key]
    elif what == "move":  # to the place of another one
        changed[data.draw(st.sampled_from(inside))] = value[key]
    elif what == "replace":
        changed[key] = data.draw(values)
    else:
        changed[key] = mutated(value[key], data, depth - 1)
    return changed


def logits_without(folder: Path, block: int | None) -> torch.Tensor | None:
    """What transformers computes with a checkpoint, without a block; None where it does not load it, or not all of it.

    The block is taken out of the list of layers by hand.
    """
    try:
        model, info = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        decoder = model.eval().get_decoder()
        if block is not None:
            del decoder.layers[block]
            decoder.config.num_hidden_layers -= 1
            if getattr(decoder.config, "layer_types", None):
                del decoder.config.layer_types[block]
        with torch.no_grad():
            found: torch.Tensor = model(TOKEN_IDS, use_cache=False).logits
    except Exception:
        return None
    return found


def check_pruning(tried: Callable[..., bool], folder: Path, right: Path) -> None:
    """A block removed from the model in `folder` / "model": refused, or what transformers says of the model `right`."""
    out = folder / "short"
    if tried(folder, out, "prune", folder / "model", "--blocks", REMOVED):
        expected, found = logits_without(right, REMOVED), logits_without(out, None)
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def fuzz_configuration(data: st.DataObject, models: dict[str, Path], tried: Callable[..., bool], folder: Path) -> None:
    model = Path(shutil.copytree(models["whole"], folder / "model"))
    changed = mutated(json.loads((model / "config.json").read_text()), data)
    (model / "config.json").write_text(json.dumps(changed))
    check_pruning(tried, folder, model)


def fuzz_index(data: st.DataObject, models: dict[str, Path], tried: Callable[..., bool], folder: Path) -> None:
    model = Path(shutil.copytree(models["sharded"], folder / "model"))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps(mutated(json.loads(index.read_text()), data)))
    if data.draw(st.integers(0, 3)) == 0:
        data.draw(st.sampled_from(sorted(model.glob("*.safetensors")))).unlink()
    check_pruning(tried, folder, models["whole"])  # the weights are the same wherever an index says that they are


def fuzz_header(data: st.DataObject, models: dict[str, Path], tried: Callable[..., bool], folder: Path) -> None:
    model = Path(shutil.copytree(models["whole"], folder / "model"))
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), content[start:]

    if data.draw(st.booleans()):
        text = json.dumps(mutated(header, data)).encode()
        content = len(text).to_bytes(8, "little") + text + tensors
    else:
        position = data.draw(st.integers(0, start - 1))
        content = content[:position] + data.draw(st.binary(min_size=1, max_size=2)) + content[position + 1 :]
    weights.write_bytes(content[: data.draw(st.sampled_from([None, None, None, len(content) // 2, -4]))])
    check_pruning(tried, folder, model)


def fuzz_dataset(data: st.DataObject, models: dict[str, Path], tried: Callable[..., bool], folder: Path) -> None:
    conversation = {"messages": [{"role": "user", "content": "a few words"}, {"role": "assistant", "content": "learn"}]}
    rows = data.draw(st.sampled_from([[{"text": "words to learn from"}] * 4, [conversation] * 4]))
    changed = mutated(rows, data)
    lines = [json.dumps(row) + "\n" for row in (changed if isinstance(changed, list) else [changed])]
    content = "".join(lines).encode()
    if data.draw(st.integers(0, 4)) == 0:
        content = content[: data.draw(st.integers(0, len(content)))]
    (folder / "data.jsonl").write_bytes(content)

    sizes = ("--energy-samples", SAMPLES, "--max-length", 8, "--energy", "empirical-fisher")
    out = folder / "energies.safetensors"
    if tried(folder, out, "energies", models["whole"], "--calibration", folder / "data.jsonl", *sizes):
        lines = content.decode(errors="replace").splitlines()
        usable = sum('"text"' in line or '"content"' in line for line in lines)
        assert 1 <= len(load_file(out)["losses"]) <= min(SAMPLES, usable)


KINDS = [fuzz_configuration, fuzz_index, fuzz_header, fuzz_dataset]


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("fuzz", KINDS)
def test_what_is_mutated_is_refused_or_right(
    fuzz: Callable[..., None],
    number: int,
    models: dict[str, Path],
    tried: Callable[..., bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            fuzz(data, models, tried, Path(folder))

    run()
