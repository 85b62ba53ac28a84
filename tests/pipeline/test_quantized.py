"""A run on a quantised model chooses what a run on the rounded weights chooses, and writes the original's bytes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import Command, save_tiny, settings
from safetensors.torch import load_file

from blockspin.comparison.run import compare
from blockspin.config import EvaluateConfig
from blockspin.energies import load_energies
from blockspin.evaluation.perplexity import Evaluation
from blockspin.model.loading import load_config, load_tokenizer
from blockspin.pipeline.compress import compress
from blockspin.pipeline.plan import plan_run
from blockspin.pipeline.stages import load_samples
from blockspin.repairs.checkpoint import repair_checkpoint

pytest.importorskip("bitsandbytes")

TAYLOR = ("Shortened LLaMA Taylor", "Shortened LLaMA Taylor+")


def rounded(folder: Path, target: Path) -> Path:
    """A checkpoint of the weights that 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4")))
    model.save_pretrained(target)
    load_tokenizer(folder).save_pretrained(target)
    return target


def row_named(rows: list[Evaluation], name: str) -> Evaluation:
    return next(row for row in rows if row.name.startswith(name))


def test_a_run_chooses_on_the_rounded_weights_and_copies_the_original(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    config = settings(tiny_folder, text_file, choose_repaired=False, own_text=0)
    rows = compress(replace(config, quantization="nf4"), tmp_path / "run")
    reference = compress(replace(config, model=str(rounded(tiny_folder, tmp_path / "rounded"))), tmp_path / "reference")

    energies = load_energies(tmp_path / "run" / "energies.safetensors").hessian
    wanted = load_energies(tmp_path / "reference" / "energies.safetensors").hessian
    np.testing.assert_allclose(energies, wanted, rtol=1e-3, atol=1e-5 * abs(wanted).max())
    for name in ("original", "chosen"):
        row, same = row_named(rows, name), row_named(reference, name)
        assert row.removed == same.removed
        assert row.perplexity == pytest.approx(same.perplexity, rel=1e-4)
        assert row.num_parameters == same.num_parameters

    # What is written knows nothing of the 4 bits.
    removed = row_named(rows, "chosen").removed
    kept = [block for block in range(4) if block not in removed]
    before = load_file(tiny_folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "checkpoint" / "model.safetensors").items():
        position, dot, inside = name.removeprefix("model.layers.").partition(".")
        source = f"model.layers.{kept[int(position)]}{dot}{inside}" if position.isdigit() else name
        assert torch.equal(tensor, before[source])
    assert "quantization" not in (tmp_path / "run" / "checkpoint" / "config.json").read_text()

    # The repair follows the original as it is.
    samples = load_samples(config, load_tokenizer(tiny_folder), load_config(tiny_folder))
    text, own = [*samples.calibration, *samples.selection], tmp_path / "own"
    repair_checkpoint(tmp_path / "run" / "checkpoint", tiny_folder, text, own, own_text_share=0, seed=config.seed)
    repaired = tmp_path / "run" / "repaired" / "model.safetensors"
    assert repaired.read_bytes() == (own / "model.safetensors").read_bytes()
    assert "nf4" in (tmp_path / "run" / "checkpoint" / "README.md").read_text()


def test_a_run_does_not_go_on_with_another_quantisation(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, text_file, repair=False)
    compress(replace(config, quantization="nf4"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(quantization\)"):
        compress(config, tmp_path / "run")


@pytest.mark.parametrize(("quantization", "saving"), [("nf4", 7 / 8), ("int8", 3 / 4)])
def test_a_plan_counts_the_memory_of_a_quantised_model(
    quantization: str, saving: float, tmp_path: Path, text_file: Path
) -> None:
    folder = save_tiny(tmp_path / "model")
    config = settings(folder, text_file, repair=False)
    linear = sum(t.nbytes for name, t in load_file(folder / "model.safetensors").items() if "_proj" in name)
    saved = plan_run(config).memory_bytes - plan_run(replace(config, quantization=quantization)).memory_bytes
    assert saved == pytest.approx(saving * linear, rel=0.01)


def test_a_comparison_leaves_out_what_needs_the_weights(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(tiny_folder, text_file, quantization="nf4", energy="secant", choose_repaired=False)
    comparison = compare(config, {"2": 2}, tmp_path / "comparison")
    reasons = {name: reason for name, reason in comparison.left_out.items() if "quantised" in reason}
    assert set(reasons) == {f"{name}, 2" for name in ("sliding-window merging", *TAYLOR, "repairs")}


@pytest.mark.parametrize("what", ["missing", "gguf", "quantised", "stream"])
@pytest.mark.parametrize("name", ["compress", "energies", "select", "evaluate", "compare"])
def test_what_cannot_be_loaded_in_4_bits_is_refused_at_once(
    name: str, what: str, command: Command, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the text nor the energies are there, so that whatever is read first would be missed."""
    model, options = tiny_folder, ["--quantization", "nf4"]
    if what == "missing":
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    elif what == "gguf":
        model = tmp_path / "model.gguf"
        model.write_bytes(b"GGUF")
    elif what == "quantised":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    else:
        options.append("--stream")

    calibration: list[Any] = ["--calibration", tmp_path / "no.txt", "--remove", 2]
    given = {
        "compress": calibration,
        "compare": calibration,
        "energies": calibration,
        "select": ["--energies", tmp_path / "no.safetensors", "--data", tmp_path / "no.txt", "--remove", 2],
        "evaluate": ["--data", tmp_path / "no.txt"],
    }
    code, printed = command(name, model, *given[name], *options, "--out", tmp_path / "out")
    expected = {
        "missing": "--quantization nf4 needs bitsandbytes: pip install 'blockspin[quantization]'",
        "gguf": "is quantised already",
        "quantised": "is quantised already",
        "stream": "--stream reads blocks as they are on disk; leave it out, or --quantization",
    }
    assert code == 2
    assert expected[what] in " ".join(printed.split())


def test_times_in_4_bits_are_refused_as_targets(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out --quantization, or give the times"):
        compress(settings(tiny_folder, text_file, target_speedup=1.2, quantization="nf4"), tmp_path / "run")


def test_vllm_loads_by_itself() -> None:
    with pytest.raises(ValueError, match="--quantization is not for --backend vllm"):
        EvaluateConfig(backend="vllm", quantization="nf4")
