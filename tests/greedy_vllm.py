"""Greedy tokens from vLLM, run by the Python that has it: greedy_vllm.py FOLDER COUNT PROMPT_ID... prints a list."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, count, *prompt = sys.argv[1:]
    model = LLM(
        folder,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(prompt) + int(count),
    )
    greedy = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True, detokenize=False)
    (result,) = model.generate({"prompt_token_ids": [int(token) for token in prompt]}, greedy)
    print(json.dumps(list(result.outputs[0].token_ids)))
