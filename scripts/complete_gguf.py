"""Write into a GGUF file which layers attend within a sliding window.

    python scripts/complete_gguf.py FOLDER converted.gguf complete.gguf      # needs `pip install gguf`

FOLDER is the checkpoint that the file was converted from. llama.cpp reads the entry for every layer, but its converter
writes it for some model types only; for the others (Gemma 2, Gemma 3, gpt-oss, Cohere 2) llama.cpp assumes the order
that the unshortened models have.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from transformers import AutoConfig


def complete(folder: Path, source: Path, target: Path) -> None:
    """Copy `source` to `target` with an entry a layer: whether it attends within the sliding window."""
    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    sliding = [kind != "full_attention" for kind in config.layer_types]
    reader = GGUFReader(source)
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    name = Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=architecture)
    entry = MetadataDetails(GGUFValueType.ARRAY, sliding, sub_type=GGUFValueType.BOOL)
    writer = GGUFWriter(target, arch=architecture, endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, {name: entry}, [])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    complete(*map(Path, sys.argv[1:]))
