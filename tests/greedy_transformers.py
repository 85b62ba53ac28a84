"""Greedy tokens from transformers alone: greedy_transformers.py FOLDER COUNT PROMPT_ID... prints lists by name.

The model generates with its cache and without, spread over two devices of which one is the disk, and once more after it
was saved beside FOLDER and loaded again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load(folder: Path, **placement: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32", **placement).eval()


def greedy(model: Any, prompt: list[int], count: int, use_cache: bool = True) -> list[int]:
    tokens = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=use_cache, **settings)
    found: list[int] = written[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    prompt = list(map(int, sys.argv[3:]))
    model = load(folder)
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    model.save_pretrained(folder.with_name("saved"))
    found = {
        "with a cache": greedy(model, prompt, count),
        "without": greedy(model, prompt, count, use_cache=False),
        "on two devices": greedy(
            load(folder, device_map="auto", max_memory={"cpu": half}, offload_folder=folder.with_name("disk")),
            prompt,
            count,
        ),
        "saved again": greedy(load(folder.with_name("saved")), prompt, count),
    }
    assert "blockspin" not in sys.modules
    print(json.dumps(found))
