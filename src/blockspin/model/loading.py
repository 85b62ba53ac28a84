"""Opens a model and its tokenizer from a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..config import DTYPES, STREAM, LoadingSettings
from ..errors import first_line
from ..hub import can_be_hub_id, is_offline, use_hub
from ..processes import gathered
from ..progress import console
from ..tables import short
from .gguf import is_gguf, ordinary_source
from .offload import is_offloaded
from .placement import (
    Placement,
    blocks_apart,
    default_device,
    delete_with,
    dtype_of,
    place_of_blocks,
    resaved_bytes,
    resaving_folder,
    weights_bytes,
)
from .quantization import int8, keep_unpacked, nf4
from .weights import check_complete, read_headers, reported, silenced, weight_paths

_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps of transformers

# RWKV halves its hidden states after every so many blocks, and divides the weights in its memory to match, so that a
# block cannot stand elsewhere, nor the model be saved. Without that it computes the same.
_RESCALING = "rescale_every"

_IN_A_RUN = ("distilled", "repaired", "checkpoint")  # folders of models in the folder of a run, the last stage first

_AUTO_CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
)


def auto_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The class of transformers that opens models of this type: AutoModelForCausalLM, or for models that take images or
    sound besides text AutoModelForImageTextToText or AutoModelForMultimodalLM.

    Raises:
        ValueError: there is none, and the model does not come with code of its own that may run.
    """
    for mapping, found in _AUTO_CLASSES:
        if type(config) in mapping:
            return found
    if trust_remote_code:
        return AutoModelForCausalLM
    raise ValueError(f"transformers has no language model of the type {config.model_type}")


def find_source(source: str | Path) -> str | Path:
    """The source as it is, or for a GGUF file the folder it was converted to; it exists, or may be on the hub.

    Raises:
        ValueError: it is neither a folder nor a name that the hub could have.
    """
    source = ordinary_source(source)
    if Path(source).is_dir():
        return source
    if Path(source).exists() or not can_be_hub_id(str(source)):
        raise ValueError(
            f"cannot open the model {str(source)!r}: there is no such folder, and it is no hub id; give a folder made "
            "by save_pretrained, a .gguf file or a hub id"
        )
    use_hub()
    return source


def local_folder(source: str | Path) -> Path:
    """The folder of a model; one from the hub is downloaded.

    Raises:
        ValueError: there is no such model.
    """
    source = find_source(source)
    if Path(source).is_dir():
        return Path(source)

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:  # the hub client raises errors of many kinds
        raise ValueError(f"cannot open the model {str(source)!r}: {_why_not_opened(source, error)}") from error


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, checked to be one that can be shortened.

    Raises:
        ValueError: there is no such model, or it is not a decoder-only language model.
    """
    source = find_source(source)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        inside = [name for name in _IN_A_RUN if (Path(source) / name / "config.json").is_file()]
        remedy = f"give {Path(source) / inside[0]}" if inside else "give a folder made by save_pretrained, or a hub id"
        raise ValueError(f"{source} has no config.json; {remedy}")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        text = config.get_text_config(decoder=True)
        architectures = ", ".join(getattr(config, "architectures", None) or [])
    except Exception as error:  # each class of configurations checks its settings, or trips over them, in its own way
        raise ValueError(f"cannot open the model {str(source)!r}: {_why_not_opened(source, error)}") from error

    # Encoders alone (BERT) can be opened as causal models too; what they were trained as tells them apart.
    known = trust_remote_code or any(type(config) in mapping for mapping, _ in _AUTO_CLASSES)
    encoder = config.is_encoder_decoder or text.is_encoder_decoder
    if not known or encoder or "MaskedLM" in architectures:
        described = architectures or config.model_type
        raise ValueError(f"{str(source)!r} ({described}) is not a decoder-only causal language model")
    return config


def _why_not_opened(source: str | Path, error: Exception) -> str:
    """What hinders transformers, with what can be done about it."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which runs with --trust-remote-code; read it before"
    if not Path(source).is_dir() and is_offline():
        return "there is no such folder, the hub cannot be reached, and its cache has no such model"
    return first_line(error)


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that a model of this configuration takes; None where the configuration sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or None


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """How many tokens a model of this configuration has an embedding of; None where the configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal language model, in evaluation mode.

    dtype: "auto" takes the checkpoint's, but float32 on a CPU, where narrow types are slow.
    device_map: as in transformers ("auto" spreads the model over the devices); None takes the GPU of this process
        (the first, if it is alone), else the CPU;
        "stream" does so too, but for the blocks: they stay on disk, or in the host's memory where they fit in beside a
        GPU, and passes read them one by one. Where a model does not fit, None is "stream", which is said.
    quantization: "nf4" rounds the weights of linear layers to 4 bits as they are loaded (`nf4`), to compute in `dtype`;
        "int8" to 8 bits, and what enters the layers too (`int8`). Such a model is not offloaded. What is refused is in
        `check_quantization`.

    Raises:
        ValueError: the model cannot be opened, its dtype is unknown, the machine has no such device, it is not a causal
            language model, its weights are not whole (transformers would fill what is missing at random), or the disk
            has no room for weights that cannot be read as they lie in the checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)} (--dtype)")

    check_device(device_map)
    source = ordinary_source(source)
    config = load_config(source, trust_remote_code=trust_remote_code)
    on_cpu = device_map == "cpu" or not torch.cuda.is_available()
    if dtype == "auto" and on_cpu:
        dtype = "float32"
    if quantization is not None:
        assert device_map != STREAM
        device_map = device_map or default_device()

    # Where transformers finds the place, it may choose the disk.
    placement = Placement(device_map, resaving_folder(0) if device_map in _SPREADING else None)
    if device_map in (None, STREAM):
        placement = _placement(source, config, dtype, device_map == STREAM, trust_remote_code)

    model = _opened(source, config, placement, dtype, quantization, trust_remote_code)
    if placement.folder is not None:
        delete_with(model, placement.folder)
    if device_map in _SPREADING and is_offloaded(model):
        console.print(
            f"{source} does not fit on the GPUs: some weights stay in the host's memory or on disk, and are read from "
            "there again and again. Nothing is timed.",
            highlight=False,
            soft_wrap=True,
        )
    keep_unpacked(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _opened(
    source: str | Path,
    config: PretrainedConfig,
    placement: Placement,
    dtype: str,
    quantization: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model as transformers opens it, with all of its weights where they belong.

    Raises:
        ValueError: transformers cannot open it, or its weights are not whole.
    """
    arguments: dict[str, Any] = {"device_map": placement.device_map, "offload_folder": placement.folder}
    if quantization is not None:
        arguments["quantization_config"] = int8() if quantization == "int8" else nf4(dtype_of(config, dtype))
    if getattr(config, _RESCALING, 0):
        arguments[_RESCALING] = 0

    # Broken files of weights are refused before transformers reads them.
    if Path(source).is_dir():
        read_headers([path for path in weight_paths(Path(source)) if path.suffix == ".safetensors"])

    opening = auto_class(config, trust_remote_code=trust_remote_code)
    try:
        with silenced():
            model, loading_info = opening.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                weights_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
                **arguments,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # model code and quantisers raise errors of many kinds
        raise ValueError(f"cannot load the model {str(source)!r}: {first_line(error)}") from error
    check_complete(reported(loading_info), model, source)
    opened: PreTrainedModel = model
    return opened


def load_as(source: str | Path, loading: LoadingSettings) -> PreTrainedModel:
    """As `load_model`, with the settings of a run."""
    return load_model(
        source,
        dtype=loading.dtype,
        device_map=loading.place,
        quantization=loading.quantization,
        trust_remote_code=loading.trust_remote_code,
    )


def check_quantization(source: str | Path, loading: LoadingSettings) -> None:
    """Refuse what cannot be quantised as it is loaded, before anything but the configuration is read.

    Raises:
        ValueError: bitsandbytes is not installed, or the weights were rounded before.
    """
    if loading.quantization is None:
        return
    asked = f"--quantization {loading.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{asked} needs bitsandbytes: pip install 'blockspin[quantization]', or leave it out")

    quantized = is_gguf(source)
    if not quantized:
        config = load_config(source, trust_remote_code=loading.trust_remote_code)
        quantized = getattr(config, "quantization_config", None) is not None
    if quantized:
        raise ValueError(
            f"{str(source)!r} is quantised already, and {asked} would round its weights once more; leave it out, or "
            "give the model that this one was made of"
        )


def _placement(
    source: str | Path, config: PretrainedConfig, dtype: str, stream: bool, trust_remote_code: bool
) -> Placement:
    """Where the weights go: to the first GPU, else the CPU; the blocks apart if wanted, or if all do not fit there."""
    device = default_device()
    model = model_without_weights(config, trust_remote_code=trust_remote_code)
    apart = place_of_blocks(model, dtype, device, stream)
    places = list(gathered(iter([apart])))
    if any(places) and apart is None:  # another process has less room: all go on alike
        apart = place_of_blocks(model, dtype, device, stream=True)
    if apart is None:
        return Placement(None if device == "cpu" else device)
    if not stream:
        half = " In half the memory: --dtype bfloat16." if dtype == "float32" else ""
        console.print(
            f"{source} takes {short(weights_bytes(model, dtype), 'B')}, which is more than fits: its blocks stay on "
            f"disk and are read one by one, as with --stream. To load it all the same: --device-map {device}.{half}",
            highlight=False,
            soft_wrap=True,
        )

    needed = resaved_bytes(model, dtype, weight_paths(local_folder(source))) if apart == "disk" else 0
    return Placement(blocks_apart(model, device, apart), resaving_folder(needed))


def check_device(device_map: str | None) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: it is no device, or there is none of that number.
    """
    if device_map in (None, STREAM, *_SPREADING):
        return
    try:
        device = torch.device(device_map)
    except RuntimeError:
        raise ValueError(f"--device-map must be auto, cpu, cuda or cuda:N, not {device_map!r}") from None

    number = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ValueError(f"--device-map {device_map}: this machine has {number} GPUs; take another, auto or cpu")


def model_without_weights(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: its structure costs neither time nor memory.

    Raises:
        ValueError: the configuration describes no model.
    """
    opening = auto_class(config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = opening.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # sizes that do not fit together, unknown activations, ...: found by the model's code
        raise ValueError(f"the config.json describes no model ({config.model_type}): {first_line(error)}") from error
    if not any(parameter.numel() for parameter in model.parameters()):
        raise ValueError(f"the config.json describes a model without parameters ({config.model_type})")
    return model


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: there is none.
    """
    source = find_source(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the reader of tokenizer.json has no error of its own
        why = first_line(error) if _may_have_tokenizer(source) else "it has none; save the model's there too"
        raise ValueError(f"cannot load a tokenizer from {str(source)!r}: {why}") from error
    return tokenizer


def _may_have_tokenizer(source: str | Path) -> bool:
    """Whether a folder has a file that could be one of a tokenizer; True for what is no folder."""
    folder = Path(source)
    if not folder.is_dir():
        return True
    names = [path.name for path in folder.iterdir()]
    return any("token" in name or "vocab" in name or name.endswith(".model") for name in names)
