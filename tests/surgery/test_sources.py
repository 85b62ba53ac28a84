"""Of a folder prune reads what transformers reads and nothing else; what is not whole is refused before writing.

The reference is transformers itself: the whole folder as it loads it, shortened in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import save_tiny
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_random_model

from blockspin.model.loading import load_model
from blockspin.surgery.checkpoint import checkpoint_bytes, prune_checkpoint
from blockspin.surgery.memory import remove_blocks

REMOVED = [1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "sharded", max_shard_size="40KB")


def save_other(path: Path, like: Path) -> None:
    """Weights of the same names and shapes, with other values."""
    tensors = {name: tensor + 1 for name, tensor in load_file(like).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def check_pruned(source: Path, target: Path) -> None:
    """The pruned folder loads as what transformers loads from the source, shortened in memory."""
    prune_checkpoint(source, REMOVED, target, progress=False)
    whole = tf.AutoModelForCausalLM.from_pretrained(source)
    loaded, report = tf.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded.state_dict(), remove_blocks(whole, REMOVED).state_dict(), rtol=0, atol=0)


def check_refused(source: Path, message: str) -> None:
    """Everything that opens the weights refuses them, and nothing is written."""
    before = sorted(source.parent.rglob("*"))
    for use in (lambda: prune_checkpoint(source, REMOVED, source.parent / "short"), lambda: checkpoint_bytes(source)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["model_old.safetensors", "ema.safetensors", "consolidated.safetensors", "adapter_model.safetensors"]
)
def test_other_weights_in_the_folder_are_left_behind(folder: Path, name: str, tmp_path: Path) -> None:
    save_other(folder / name, folder / "model.safetensors")
    check_pruned(folder, tmp_path / "short")
    assert sorted(path.name for path in (tmp_path / "short").glob("*.safetensors")) == ["model.safetensors"]
    assert json.loads((tmp_path / "short" / "blockspin.json").read_text())["left_behind"] == [name]


def test_what_is_left_behind_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model_ema.bin")
    (folder / "original").mkdir()
    save_other(folder / "original" / "params.safetensors", folder / "model.safetensors")
    (folder / "original" / "params.json").write_text("{}")
    prune_checkpoint(folder, REMOVED, tmp_path / "short")
    assert "original/params.safetensors, pytorch_model_ema.bin." in capsys.readouterr().err
    assert (tmp_path / "short" / "original" / "params.json").is_file()
    assert [path.name for path in (tmp_path / "short").rglob("*.bin")] == []


def test_shards_of_an_earlier_save_are_not_merged_in(sharded: Path, tmp_path: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):
        save_other(sharded / f"model-{number:05}-of-00099.safetensors", shard)
    check_pruned(sharded, tmp_path / "short")


def test_one_file_comes_before_an_index(sharded: Path, folder: Path, tmp_path: Path) -> None:
    """So it does in transformers."""
    save_other(sharded / "model.safetensors", folder / "model.safetensors")
    check_pruned(sharded, tmp_path / "short")


def test_safetensors_come_before_bin(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    check_pruned(folder, tmp_path / "short")


def test_one_bin_file_is_read_without_an_index(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model_ema.bin")
    check_pruned(folder, tmp_path / "short")


def test_weights_that_the_configuration_names_are_read(folder: Path, tmp_path: Path) -> None:
    save_other(folder / "final.safetensors", folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "final.safetensors"}))
    check_pruned(folder, tmp_path / "short")


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    check_refused(folder, "holds an adapter")


def edit_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def copy_a_shard(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    shutil.copy(first, folder / "again.safetensors")
    edit_index(lambda index: index["weight_map"].update({"x": "again.safetensors"}))(folder)


BROKEN_INDICES = {
    "a shard is missing": (lose_a_shard, "lacks model-00002-of"),
    "a tensor is in two shards": (copy_a_shard, "both hold"),
    "outside": (edit_index(lambda index: index["weight_map"].update({"x": "../x.safetensors"})), "outside it"),
    "no map": (edit_index(lambda index: index.pop("weight_map")), "no weight_map"),
    "no JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "not readable"),
    "shards not named": (
        edit_index(lambda index: index.update(weight_map=dict(list(index["weight_map"].items())[:1]))),
        "lack .* and .* more",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_INDICES)
def test_broken_indices_are_refused(fault: str, sharded: Path) -> None:
    break_it, message = BROKEN_INDICES[fault]
    break_it(sharded)
    check_refused(sharded, message)
    with pytest.raises(ValueError, match=message):
        load_model(sharded)


def test_experts_that_transformers_cannot_put_together_are_refused(tmp_path: Path) -> None:
    """It makes one tensor of those of all experts."""
    tiny_random_model(tiny_config("mixtral")).save_pretrained(tmp_path / "model")
    name = "model.layers.3.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(lambda tensors: tensors.pop(name))(tmp_path / "model")
    check_refused(tmp_path / "model", "do not fit together|another shape|lack")
    with pytest.raises(ValueError, match=r"cannot load|another shape|lack"):
        load_model(tmp_path / "model")


def test_quantised_weights_that_are_not_whole_are_refused(folder: Path) -> None:
    """What the quantisation stores is known to its own package only; the rest is compared."""
    edit_config(quantization_config={"quant_method": "gptq", "bits": 4})(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name.replace("weight", "qweight")] = tensors.pop(name).int()
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_bytes(folder, [0]) < checkpoint_bytes(folder)
    edit_tensors(lambda tensors: tensors.pop(UP.replace("weight", "qweight")))(folder)
    check_refused(folder, f"lack {UP}")


UP = "model.layers.2.mlp.up_proj.weight"


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the header of the file, its data staying as it is."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])

    return edit


def shift(first: int, last: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[UP]["data_offsets"]
        header[UP]["data_offsets"] = [begin + first, end + last]

    return change


BROKEN_HEADERS = {
    "overlapping": shift(-4, -4),
    "negative": lambda header: header[UP].update(data_offsets=[-4, 0]),
    "reversed": lambda header: header[UP].update(data_offsets=header[UP]["data_offsets"][::-1]),
    "too short": shift(0, -4),
    "unknown dtype": lambda header: header[UP].update(dtype="F33"),
    "shape of another size": lambda header: header[UP].update(shape=[3, 5]),
    "no shape": lambda header: header[UP].pop("shape"),
    "a tensor less": lambda header: header.pop(UP),
    "not a header": lambda header: header.update({UP: 7}),
}


@pytest.mark.parametrize("fault", BROKEN_HEADERS)
def test_broken_headers_are_refused(fault: str, folder: Path) -> None:
    edit_header(BROKEN_HEADERS[fault])(folder)
    check_refused(folder, "truncated or not a safetensors file")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_files_are_refused(length: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    check_refused(folder, "truncated")
    with pytest.raises(ValueError, match="truncated"):
        load_model(folder)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


NOT_OF_THE_MODEL = {
    "missing": (edit_tensors(lambda t: t.pop(UP)), f"lack {UP}"),
    "renamed": (edit_tensors(lambda t: t.update(other=t.pop(UP))), f"lack {UP}"),
    "missing outside the layers": (edit_tensors(lambda t: t.pop("model.norm.weight")), "lack model.norm.weight"),
    "transposed": (edit_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), f"another shape .* {UP}"),
    "fewer layers than weights": (edit_config(num_hidden_layers=3), r"more layers than .*model\.layers\.3"),
    "more layers than weights": (edit_config(num_hidden_layers=6), r"lack model\.layers\.4"),
    "another width": (edit_config(intermediate_size=40), "another shape"),
}


@pytest.mark.parametrize("fault", NOT_OF_THE_MODEL)
def test_weights_that_are_not_those_of_the_model_are_refused(fault: str, folder: Path) -> None:
    """transformers would fill what is missing at random."""
    break_it, message = NOT_OF_THE_MODEL[fault]
    break_it(folder)
    check_refused(folder, message)
    with pytest.raises(ValueError, match=message):
        load_model(folder)
