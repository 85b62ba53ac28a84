"""The weights of a checkpoint folder: in which files they are, what is in these, and whether a model gets all of them.

What decides is what transformers reads: one file, or the shards that an index names, and nothing else in the folder.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from ..errors import first_line
from ..files import WriteError, writing

LENGTH_BYTES = 8  # of a safetensors file: the length of its header, before the header and the data

# What transformers looks for, in its order.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"
_SHOWN = 3  # names in an error
# Which talk while a model is loaded.
_LOGGERS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel", "accelerate.big_modeling")


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file.

    start: where the data begins, in bytes. metadata: texts in the header.
    tensors: name -> {"dtype": ..., "shape": [...], "data_offsets": [first byte, one after the last]} from `start`.
    """

    path: Path
    start: int
    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class LoadingReport:
    """What transformers says of weights when it puts them into a model, by names in the model.

    missing: tensors of the model that get no weights. unexpected: weights that no tensor of the model takes.
    mismatched: tensors whose weights have another shape.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def weight_paths(folder: Path) -> list[Path]:
    """The files from which transformers would load the weights: all .safetensors or all .bin.

    Raises:
        ValueError: there are none, the index is not readable, or it names files that are missing or elsewhere.
    """
    # A configuration may name the file itself.
    named = _read_json(folder / "config.json").get("transformers_weights")
    for name in [str(named)] if named else _NAMES:
        path = _inside(folder, name)
        if not path.is_file():
            continue
        return _shards(path) if name.endswith(_INDEX) else [path]
    raise ValueError(f"{folder} has no .safetensors or .bin weights that transformers would load ({', '.join(_NAMES)})")


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is no index of weights: it has no weight_map; download it again")

    paths, missing = [], []
    for name in sorted(set(map(str, weight_map.values()))):
        path = _inside(index.parent, name)
        paths.append(path)
        if not path.is_file():
            missing.append(name)
    if missing:
        raise ValueError(f"{index.parent} lacks {_some(missing)}, which {index.name} names; download the model again")
    return paths


def _inside(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names weights outside it: {name}")
    return folder / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable ({first_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not readable (it holds no settings); download it again")
    return value


def read_headers(paths: Sequence[Path]) -> list[WeightFile]:
    """What is in safetensors files; the tensors themselves are not read.

    Raises:
        ValueError: a file is truncated, its header is broken, or two files have a tensor of the same name.
    """
    files = []
    holders: dict[str, Path] = {}
    for path in paths:
        file = _read_header(path)
        # transformers would silently take the later one.
        for name in file.tensors:
            if name in holders:
                raise ValueError(f"{holders[name]} and {path} both hold {name}; it is not clear which one is meant")
            holders[name] = path
        files.append(file)
    return files


def _read_header(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="np"):  # checks lengths, dtypes, shapes and offsets against one another
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({first_line(error)}); download it again"
        ) from error

    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    return WeightFile(path, LENGTH_BYTES + length, metadata, header)


def convert_bin(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write each PyTorch file as a safetensors file into `folder`, one after another; returns the new files.

    Raises:
        ValueError: a file is no plain dictionary of tensors.
    """
    written = []
    for path in paths:
        converted = folder / f"{path.stem}.safetensors"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            seen: set[int] = set()  # safetensors refuses tensors that share memory
            for name in list(tensors):
                memory = tensors[name].untyped_storage().data_ptr()
                tensors[name] = tensors[name].clone() if memory in seen else tensors[name].contiguous()
                seen.add(memory)
            with writing(converted):
                save_file(tensors, converted, metadata={"format": "pt"})
        except WriteError:
            raise
        except Exception as error:  # the unpickler raises errors of many kinds
            raise ValueError(f"{path} is not a readable PyTorch checkpoint: {first_line(error)}") from error
        written.append(converted)
    return written


def tensor_shapes(files: Iterable[WeightFile]) -> dict[str, list[int]]:
    """The shape of every tensor in some files, by its name there."""
    shapes = {}
    for file in files:
        for name, tensor in file.tensors.items():
            shapes[name] = tensor["shape"]
    return shapes


def check_complete(report: LoadingReport, model: PreTrainedModel, source: str | Path) -> None:
    """Raise ValueError if tensors of the model would not get their weights, or whole layers of weights are not used."""
    if report.missing:
        raise ValueError(
            f"the weights of {str(source)!r} lack {_some(report.missing)}, which transformers would fill at random; "
            "download them again, or correct the config.json that does not belong to them"
        )
    if report.mismatched:
        raise ValueError(
            f"the weights of {str(source)!r} have another shape than the config.json says for "
            f"{_some(report.mismatched)}; one of the two is wrong"
        )
    beyond = _layers_beyond(report.unexpected, list(model.state_dict()))
    if beyond:
        raise ValueError(
            f"{str(source)!r} has weights of more layers than its config.json says ({_some(beyond)}); "
            "one of the two is wrong"
        )


def _layers_beyond(unexpected: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Layers of the weights that are numbered on where the model's end, and hold the same as one of the model's.

    Layers for multi-token prediction lie there too, but hold more than the others.
    """
    found, known = _layers(unexpected), _layers(expected)
    beyond = []
    for stack, layers in found.items():
        for index, inside in layers.items():
            if index not in known[stack] and inside in known[stack].values():
                beyond.append(f"{stack}.{index}")
    return beyond


def _layers(names: Sequence[str]) -> defaultdict[str, defaultdict[int, set[str]]]:
    """The tensors in lists of layers: name of the list -> index -> names inside the layer."""
    lists: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        match = re.match(r"(.+?)\.(\d+)\.(.+)", name)
        if match:
            stack, index, inside = match.groups()
            lists[stack][int(index)].add(inside)
    return lists


class _Empty(Tensor):
    """A tensor without content, which stays on the meta device: transformers sends some weights to the CPU to join."""

    def to(self, *where: Any, **options: Any) -> Tensor:
        return self


def report_loading(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]], source: str | Path) -> LoadingReport:
    """What transformers would say when it loads weights of these names and shapes; no weights are read.

    model: of the configuration, without weights. For a quantised model the tensors of modules that have others than
    the model's are left out: only the quantisation's own package knows them.

    Raises:
        ValueError: tensors that become one in the model, such as those of experts, do not fit together.
    """
    config = copy.deepcopy(model.config)
    quantised = _drop_quantisation(config)

    # With tensors that have no content, transformers renames, joins and compares as it does with real ones.
    empty = {name: torch.empty(tuple(shape), device="meta").as_subclass(_Empty) for name, shape in shapes.items()}
    try:
        with silenced():
            _, found = type(model).from_pretrained(
                None,
                config=config,
                state_dict=empty,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {str(source)!r} do not fit together ({first_line(error)}); download them again"
        ) from error

    report = reported(found)
    return _without_quantised(report) if quantised else report


def _without_quantised(report: LoadingReport) -> LoadingReport:
    """A report that leaves out modules with tensors that the model does not know: scales, packed weights, ..."""
    owners = {name.rpartition(".")[0] for name in report.unexpected}

    def is_plain(name: str) -> bool:
        module = name.rpartition(".")[0]
        return not any(owner == module or owner.startswith(f"{module}.") for owner in owners)

    return LoadingReport(
        list(filter(is_plain, report.missing)), report.unexpected, list(filter(is_plain, report.mismatched))
    )


def reported(loading_info: Mapping[str, Any]) -> LoadingReport:
    """The loading info of `from_pretrained`."""
    mismatched = [entry[0] for entry in loading_info["mismatched_keys"]]  # (name, shape found, shape expected)
    return LoadingReport(
        sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"]), sorted(mismatched)
    )


def _drop_quantisation(config: PretrainedConfig) -> bool:
    """Make a configuration one of plain weights; returns whether it was another."""
    found = False
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
            found = True
    return found


@contextmanager
def silenced() -> Iterator[None]:
    """Inside, transformers prints no table of what is missing, of which what matters becomes one line, and no bar of
    the tensors that are read or written; bars of downloads stay. accelerate does not say that weights lie elsewhere."""
    loggers = list(map(logging.getLogger, _LOGGERS))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hook = set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        set_tqdm_hook(hook)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
