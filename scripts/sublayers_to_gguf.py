"""Write a Llama without some of its sub-layers as a GGUF file.

    python scripts/sublayers_to_gguf.py FOLDER original.gguf shortened.gguf      # needs `pip install gguf`

FOLDER is a checkpoint that `blockspin prune --units sublayers` wrote. original.gguf is the model before, of any type:
the tokenizer and the settings are taken from it. The weights keep the type that they have in the checkpoint;
llama-quantize makes them smaller.

llama.cpp's own converter takes the tokenizers of Llama 2 and 3 only, drops a scaling of rotations other than that of
Llama 3, and llama.cpp loses the attention of a layer without an MLP. Here such a layer gets a narrow MLP of zeros.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TensorNameMap
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor

from blockspin.files import replacing

_NARROW = 32  # the least width of a matrix that every quantisation of 4 bits and more takes
_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
_LLAMAS = ("nemotron-nas", "llama_without_sublayers")  # what `prune` calls them

# What is not as in the original: written below, or left out.
_OTHER_KEYS = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.value_length",
)


def convert(folder: Path, original: Path, target: Path) -> None:
    """Write the file: settings and tokenizer of `original`, layers and weights of `folder`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in _LLAMAS or config["attention_bias"] or config["mlp_bias"]:
        sys.exit(f"{folder} is not a Llama without biases that lacks some of its sub-layers")
    if _absent(config, "self_attn")[0]:
        sys.exit("llama.cpp reads the size of a head from the first layer; remove the attention of others")
    reader = GGUFReader(original)
    if reader.fields["general.architecture"].contents() != "llama":
        sys.exit(f"{original} is not a Llama")

    with replacing(target) as temporary:
        writer = GGUFWriter(temporary, arch="deci")
        _copy_settings(reader, writer)
        _describe_layers(config, writer)
        _add_weights(folder, config, writer)
        _add_zeros(config, writer)
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":  # the scaling of Llama 3
                writer.add_tensor(tensor.name, tensor.data)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _copy_settings(reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in _OTHER_KEYS:
            continue
        name = f"deci.{key.removeprefix('llama.')}" if key.startswith("llama.") else key
        item = field.types[-1] if len(field.types) > 1 else None  # the type of an array's items
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)


def _absent(config: dict[str, Any], part: str) -> list[bool]:
    """Whether a layer lacks its `self_attn` or its `mlp`, for each layer."""
    return [f"model.layers.{i}.{part}" in config["absent_modules"] for i in range(config["num_hidden_layers"])]


def _describe_layers(config: dict[str, Any], writer: GGUFWriter) -> None:
    no_attention, no_mlp = _absent(config, "self_attn"), _absent(config, "mlp")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count([0 if gone else config["num_attention_heads"] for gone in no_attention])
    writer.add_head_count_kv([0 if gone else config["num_key_value_heads"] for gone in no_attention])
    writer.add_feed_forward_length([_NARROW if gone else config["intermediate_size"] for gone in no_mlp])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_file_type(_TYPES[config["dtype"]][1])


def _add(writer: GGUFWriter, name: str, weight: Tensor, dtype: str) -> None:
    """Add a tensor; what is no matrix is float32, as llama.cpp wants it."""
    kind = _TYPES[dtype][0] if weight.ndim > 1 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(weight.float().numpy(), kind), raw_dtype=kind)


def _add_weights(folder: Path, config: dict[str, Any], writer: GGUFWriter) -> None:
    names = TensorNameMap(MODEL_ARCH.DECI, config["num_hidden_layers"])
    rotated = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                weight = weights.get_tensor(name)

                # llama.cpp rotates neighbouring rows, transformers those of the two halves of a head.
                for ending, heads in rotated.items():
                    if name.endswith(ending):
                        halves = weight.view(heads, 2, -1, weight.shape[1])  # (heads, halves, half of a head, width)
                        weight = halves.transpose(1, 2).reshape(weight.shape)

                _add(writer, names.get_name(name, try_suffixes=(".weight",)), weight, config["dtype"])


def _add_zeros(config: dict[str, Any], writer: GGUFWriter) -> None:
    """MLPs that add nothing, for the layers that have none."""
    width = config["hidden_size"]
    for layer, gone in enumerate(_absent(config, "mlp")):
        if not gone:
            continue
        _add(writer, f"blk.{layer}.ffn_norm.weight", torch.ones(width), config["dtype"])
        for name, shape in {"gate": (_NARROW, width), "up": (_NARROW, width), "down": (width, _NARROW)}.items():
            _add(writer, f"blk.{layer}.ffn_{name}.weight", torch.zeros(shape), config["dtype"])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    convert(*map(Path, sys.argv[1:]))
