"""The repair of a model whose blocks stay on disk: bit by bit that of the model in memory."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from conftest import random_samples, tiny_model
from tiny import tiny_config, tiny_random_model
from torch import Tensor

from blockspin.memory import OutOfMemory
from blockspin.model import offload
from blockspin.model.blocks import find_stack
from blockspin.model.loading import load_model
from blockspin.model.offload import offloaded_by_name, offloading_hooks
from blockspin.model.quality import quality_of
from blockspin.model.tracing import TracedModel, trace_model
from blockspin.repairs.aims import Aim
from blockspin.repairs.checkpoint import repair_checkpoint
from blockspin.repairs.finished import FinishedBlocks
from blockspin.repairs.least_squares import NormalEquations
from blockspin.repairs.pairing import Kept
from blockspin.repairs.readings import Reading
from blockspin.repairs.run import _reading_order, _turns, repair
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples(tuple(24 - i % 5 for i in range(64)))
FAMILIES = {"llama": [2], "gpt2": [0], "nemotron_h": [0, 3], "mixtral": [1]}


def folders(name: str, root: Path) -> tuple[Path, Path]:
    """A saved model, and the checkpoint without some of its blocks."""
    model = tiny_model(name) if name in ("llama", "gpt2") else tiny_random_model(tiny_config(name))
    model.save_pretrained(root / "whole", max_shard_size="20KB")
    prune_checkpoint(root / "whole", FAMILIES[name], root / "short", progress=False)
    return root / "whole", root / "short"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name.endswith(".safetensors")}


def weights_of(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    """All weights, offloaded ones as they are read."""
    elsewhere = offloaded_by_name(model)
    return {name: elsewhere[name].load() if name in elsewhere else p for name, p in model.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_files_are_those_of_a_repair_in_memory(name: str, tmp_path: Path) -> None:
    whole, short = folders(name, tmp_path)
    expected = repair_checkpoint(short, whole, SAMPLES, tmp_path / "in-memory", own_text_share=0, progress=False)
    found = repair_checkpoint(short, whole, SAMPLES, tmp_path / "streamed", device_map="stream", progress=False)
    assert found == expected
    assert any(step.kept for step in found.steps)
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "in-memory")


def test_a_model_on_disk_is_repaired_in_place(tmp_path: Path) -> None:
    """Its new weights are in a file that goes with it, and passes of all kinds read them."""
    whole, short = folders("llama", tmp_path)
    in_memory, original = load_model(short), load_model(whole)
    expected = repair(in_memory, original, SAMPLES)

    streamed, on_disk = load_model(short, device_map="stream"), load_model(whole, device_map="stream")
    assert repair(streamed, on_disk, SAMPLES, partial=tmp_path / "partial") == expected
    assert same(weights_of(streamed), weights_of(in_memory))
    with torch.no_grad():
        token_ids = torch.tensor([[1, 2, 3, 4, 5]])
        assert torch.equal(streamed(token_ids).logits, in_memory(token_ids).logits)
    assert quality_of(streamed, on_disk, SAMPLES[:4]) == quality_of(in_memory, original, SAMPLES[:4])

    assert (tmp_path / "partial").is_dir()
    del streamed
    gc.collect()
    assert not (tmp_path / "partial").exists()


def test_one_of_the_models_may_be_in_memory(tmp_path: Path) -> None:
    whole, short = folders("llama", tmp_path)
    expected = repair(load_model(short), load_model(whole), SAMPLES)
    assert repair(load_model(short), load_model(whole, device_map="stream"), SAMPLES) == expected
    assert repair(load_model(short, device_map="stream"), load_model(whole), SAMPLES) == expected


def test_the_original_of_a_model_without_sublayers_may_be_on_disk(tmp_path: Path) -> None:
    """A block of it is read once more where its first sub-layer is gone: attention of block 2, MLP of block 1."""
    whole, _ = folders("llama", tmp_path)
    reports = []
    for place in ("cpu", "stream"):
        shortened = remove_blocks(load_model(whole), [3, 4], units="sublayers")
        reports.append(repair(shortened, load_model(whole, device_map=place), SAMPLES))
    assert reports[0] == reports[1]
    assert any(step.kept for step in reports[0].steps)


def test_weights_that_accelerate_keeps_in_host_memory_are_repaired(tmp_path: Path) -> None:
    """All of them, the embedding too: each module has a hook that brings its weights and takes them away again."""
    whole, short = folders("llama", tmp_path)
    in_memory, original = load_model(short), load_model(whole)
    expected = repair(in_memory, original, SAMPLES)

    offloaded = cpu_offload(load_model(short), execution_device=torch.device("cpu"))
    assert repair(offloaded, cpu_offload(load_model(whole), execution_device=torch.device("cpu")), SAMPLES) == expected
    assert same(weights_of(offloaded), weights_of(in_memory))


class Counted(Mapping[str, Tensor]):
    """The weights of a hook, which count how often each is read."""

    def __init__(self, weights: Mapping[str, Tensor], read: Counter[tuple[int, str]]) -> None:
        self.weights, self.read = weights, read

    def __getitem__(self, key: str) -> Tensor:
        self.read[id(self), key] += 1
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_weights_are_read_a_few_times_and_one_block_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = folders("llama", tmp_path)
    models = [load_model(folder, device_map="stream") for folder in (short, whole)]
    read: list[Counter[tuple[int, str]]] = [Counter(), Counter()]
    for model, of_model in zip(models, read, strict=True):
        for _, hook in offloading_hooks(model):
            hook.weights_map = Counted(hook.weights_map, of_model)

    resident: list[tuple[int, ...]] = []  # blocks of each model that are in memory when a token is counted in
    add = NormalEquations.add

    def noting(self: NormalEquations, *given: Any) -> None:
        held = []
        for model in models:
            layers = find_stack(model).layers
            held.append(sum(next(layer.parameters()).device.type != "meta" for layer in layers))
        resident.append(tuple(held))
        add(self, *given)

    monkeypatch.setattr(NormalEquations, "add", noting)
    repair(models[0], models[1], SAMPLES, batch_size=8)
    assert set(resident) == {(1, 0)}

    # To find out how the blocks run (3 times), to prove what they are (2), for the repair (1), for the KL divergence
    # before and after (2). The original's maps do not matter; its first block is read for the start too.
    assert max(read[0].values()) == 8
    assert sorted({*read[1].values()}) == [7, 8]


def test_the_next_block_is_read_while_one_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, and never more than that one."""
    whole, short = folders("llama", tmp_path)
    models = [load_model(folder, device_map="stream") for folder in (short, whole)]
    layers = [layer for model in models for layer in find_stack(model).layers]
    held: list[int] = []  # blocks in memory when another one is read
    reading = 0
    load = offload.load_weights

    def noting(module: torch.nn.Module) -> list[Tensor]:
        nonlocal reading
        if threading.current_thread() is threading.main_thread():
            return load(module)
        reading += 1
        assert reading == 1
        held.append(sum(next(layer.parameters()).device.type != "meta" for layer in layers))
        weights = load(module)
        reading -= 1
        return weights

    traced = [trace_model(model) for model in models]
    monkeypatch.setattr(offload, "load_weights", noting)
    kept = [Kept(block) for block in range(4) if block not in FAMILIES["llama"]]
    order = _reading_order(_turns(kept, 4), *traced)
    assert [layers.index(layer) for layer in order] == [3, 4, 5, 1, 6, 2]
    repair(models[0], models[1], SAMPLES, batch_size=8)
    assert set(held) <= {0, 1}
    assert 1 in held


def interrupted_at(block: int) -> Callable[..., None]:
    add = FinishedBlocks.add

    def killed(self: FinishedBlocks, number: int, *rest: Any) -> None:
        if number == block:
            raise KeyboardInterrupt
        add(self, number, *rest)

    return killed


def test_a_repair_that_was_cut_off_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = folders("gpt2", tmp_path)
    repair_checkpoint(short, whole, SAMPLES, tmp_path / "unbroken", own_text_share=0, progress=False)
    with monkeypatch.context() as patches:
        patches.setattr(FinishedBlocks, "add", interrupted_at(3))
        with pytest.raises(KeyboardInterrupt):
            repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", device_map="stream", progress=False)
    assert {path.name for path in (tmp_path / "out-repair").iterdir()} == {
        "steps.jsonl",
        "block-1.safetensors",
        "block-2.safetensors",
    }

    # What was finished on disk is of use in memory too.
    repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", own_text_share=0, progress=False)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "unbroken")
    assert not (tmp_path / "out-repair").exists()


@pytest.mark.parametrize(("place", "kept"), [("cpu", False), ("cpu", True), ("stream", True)])
def test_batches_that_do_not_fit_are_halved(
    place: str, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory runs out late, at the last block: what was done before is done again, or taken from the disk.

    kept: whether finished blocks are there.
    """
    whole, short = folders("llama", tmp_path)
    expected, original = load_model(short, device_map=place), load_model(whole, device_map=place)
    repair(expected, original, SAMPLES, batch_size=16)

    found = load_model(short, device_map=place)
    calls = 0

    def once(layer: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        large = args[0].shape == (16, 24, 32)
        calls += large
        if large and calls == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    find_stack(found).layers[2].register_forward_pre_hook(once)
    report = repair(found, original, SAMPLES, batch_size=16, partial=tmp_path / "partial" if kept else None)
    assert calls == 9
    assert "Out of memory with 16 x 24 tokens: 8 at a time from here on" in capsys.readouterr().err
    assert any(step.kept for step in report.steps if step.block == 3)
    expected_weights = weights_of(expected)
    for name, tensor in weights_of(found).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=1e-4)


def test_a_sample_that_does_not_fit_ends_with_a_remedy(tmp_path: Path) -> None:
    whole, short = folders("llama", tmp_path)
    shortened, original = (load_model(folder, device_map="stream") for folder in (short, whole))

    def always(layer: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] == 24:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    find_stack(shortened).layers[2].register_forward_pre_hook(always)
    with pytest.raises(OutOfMemory, match=r"one sample of 24 tokens.*--max-length"):
        repair(shortened, original, SAMPLES, batch_size=16)


def test_where_it_does_not_help_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = folders("llama", tmp_path)
    after = Aim.after
    monkeypatch.setattr(Aim, "after", lambda aim, addition: -after(aim, addition))
    monkeypatch.setattr(Reading, "of", lambda reading, layer, stream: torch.randn_like(stream))
    streamed, original = (load_model(folder, device_map="stream") for folder in (short, whole))
    assert repair(streamed, original, SAMPLES).undone
    assert same(weights_of(streamed), weights_of(load_model(short)))

    report = repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", device_map="stream", progress=False)
    assert report.undone
    assert weight_files(tmp_path / "out") == weight_files(short)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = folders("llama", tmp_path)
    with pytest.raises(ValueError, match=r"--own-text\) needs all weights .*--device-map cpu"):
        repair_checkpoint(
            short, whole, SAMPLES, tmp_path / "out", device_map="stream", own_text_share=0.5, progress=False
        )
    monkeypatch.setattr(TracedModel, "shares_passes", False)
    with pytest.raises(ValueError, match=r"take more from each other than hidden states needs all weights"):
        repair_checkpoint(short, whole, SAMPLES, tmp_path / "out", device_map="stream", progress=False)
    assert not (tmp_path / "out").exists()
