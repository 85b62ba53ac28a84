"""Train the language model that the package embeds (src/blockspin/demo), from raw text to released weights.

    python scripts/train_demo_model.py prepare --text DATA/text --work WORK      # tokenizer and token stream
    python scripts/train_demo_model.py train   --work WORK --tokens 20e6         # checkpoints as it goes; resumes
    python scripts/train_demo_model.py export  --text DATA/text --work WORK      # weights, texts and card

DATA/text holds train.jsonl.xz and valid.jsonl.xz with the fields `text` and `source`. The learning rate is constant
until the last part of the run, where it falls to zero, so that a resumed run may change --tokens freely.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockspin.model.losses import mean_loss
from blockspin.model.quality import shared_losses
from blockspin.model.tracing import trace_model

PACKAGE = Path(__file__).parents[1] / "src" / "blockspin" / "demo"
VOCABULARY = 4096
LENGTH = 256
PASSAGE = 8192  # characters
END = "<|end|>"
# The calibration text of the package is not trained on: Mrs Humphry Ward, The Story of Bessie Costrell (1895).
HELD_OUT = "THE STORY OF BESSIE COSTRELL"
# The validation text comes from the held-out documents: Joseph Conrad, The Shadow-Line (1917).
VALIDATION = "PART ONE\n\nI\n\nD’autre fois"
DEPTH = 24
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def prepare(text: Path, work: Path) -> None:
    """Train the tokenizer on a tenth of the text and write all of it, shuffled by document, as one token stream."""
    number = 0
    passages = []  # novels are long: cut, so that shuffling mixes the sources
    for document in read_documents(text / "train.jsonl.xz"):
        if document["text"].startswith(HELD_OUT):
            continue
        number += 1
        for start in range(0, len(document["text"]), PASSAGE):
            passages.append(document["text"][start : start + PASSAGE])
    np.random.default_rng(0).shuffle(passages)

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(passages[::10], VOCABULARY, min_frequency=2, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=LENGTH
    )
    tokenizer.save_pretrained(work / "model")

    encoded = trainer.encode_batch(passages[: len(passages) // 2])
    stream = np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in encoded])
    np.save(work / "tokens.npy", stream)
    print(f"{len(stream):,} tokens from {number:,} documents")


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, roughly: five Newton-Schulz steps (Muon, Jordan et al. 2024). (k, rows, columns)

    torch.optim.Muon does this in bfloat16, which is about a hundred times slower than float32 on many CPUs.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] > x.shape[2]
    if wide:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    orthogonal: torch.Tensor = x.mT if wide else x
    return orthogonal


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised; all matrices of one shape are done together."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)

            for shape, same in shapes.items():
                updates = []
                for p in same:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))

                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(same, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * 0.01).add_(update, alpha=-scale)


def learning_rate(tokens: float, total: float, decay: float = 0.35) -> float:
    """Warm-up over 300k tokens, constant, then a linear fall to zero over the last part; a factor in [0, 1]."""
    return min(1.0, (tokens + 1) / 3e5, max(0.0, (total - tokens) / (decay * total)))


def take_windows(stream: NDArray[np.uint16], first: int, number: int) -> torch.Tensor:
    """Windows of the stream from the one numbered `first`, from the start again after the last: (number, LENGTH)."""
    windows = len(stream) // LENGTH
    rows = []
    for row in range(first, first + number):
        start = row % windows * LENGTH
        rows.append(stream[start : start + LENGTH])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def train(work: Path, tokens: float, batch: int, minutes: float, compiled: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids_of_matrices = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ids_of_matrices]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]

    done, seconds, history = 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, seconds, history = state["tokens"], state["seconds"], state["history"]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of

    stream = np.load(work / "tokens.npy", mmap_mode="r")
    started, last_save, losses = time.monotonic(), time.monotonic(), []
    while done < tokens and time.monotonic() - started < 60 * minutes:
        loss = step_loss(take_windows(stream, done // LENGTH, batch).to(device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(done, tokens)
            optimizer.step()
            optimizer.zero_grad()

        losses.append(loss.item())
        done += batch * LENGTH
        if len(losses) == 50:
            spent = seconds + time.monotonic() - started
            history.append((done, sum(losses) / len(losses)))
            print(f"{done / 1e6:.2f}M tokens  loss {history[-1][1]:.4f}  {done / spent:,.0f} tokens/s", flush=True)
            losses = []

        if time.monotonic() - last_save > 120 or done >= tokens:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "tokens": done,
                "seconds": seconds + time.monotonic() - started,
                "history": history,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            last_save = time.monotonic()


def export(text: Path, work: Path, hardware: str) -> None:
    """Write the weights in bfloat16, the calibration and validation texts, and the card with its measurements."""
    state = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.load_state_dict(state["model"])
    model.bfloat16().save_pretrained(PACKAGE / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "model")
    tokenizer.save_pretrained(PACKAGE / "model")

    calibration = next(d["text"] for d in read_documents(text / "train.jsonl.xz") if d["text"].startswith(HELD_OUT))
    held_out = list(read_documents(text / "valid.jsonl.xz"))
    validation = next(d["text"] for d in held_out if d["text"].startswith(VALIDATION))
    (PACKAGE / "calibration.txt").write_text(calibration, encoding="utf-8")
    (PACKAGE / "validation.txt").write_text(validation, encoding="utf-8")

    model = LlamaForCausalLM.from_pretrained(PACKAGE / "model", dtype=torch.float32)
    bits: dict[str, float] = dict.fromkeys(["novel", "pep", "code"], 0.0)
    sizes = dict.fromkeys(bits, 0)
    for document in held_out:
        samples = load_windows(document["text"], tokenizer)
        tokens = sum(len(sample) - 1 for sample in samples)
        bits[document["source"]] += mean_loss(model, samples, 16) * tokens / math.log(2)
        sizes[document["source"]] += len(document["text"].encode())

    samples = load_windows(validation, tokenizer)[:64]
    whole = mean_loss(model, samples, 16)
    single = [(i,) for i in range(DEPTH)]
    without = shared_losses(trace_model(model), single, samples, batch_size=16)

    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        tokens=state["tokens"] / 1e6,
        hours=state["seconds"] / 3600,
        hardware=hardware,
        loss=state["history"][-1][1],
        whole=whole,
        sources="\n".join(f"| {s} | {sizes[s] / 1e3:,.0f} kB | {bits[s] / sizes[s]:.3f} |" for s in bits),
        blocks="\n".join(f"| {i} | {loss:.4f} | {loss - whole:+.4f} |" for i, loss in enumerate(without)),
        **CONFIG,
    )
    (PACKAGE / "model" / "README.md").write_text(card)
    print(card)


def load_windows(text: str, tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """The text in consecutive windows of LENGTH tokens; the first token after the separator is predicted too."""
    ids = [0, *tokenizer(text, verbose=False)["input_ids"]]
    windows = [torch.tensor(ids[i : i + LENGTH]) for i in range(0, len(ids), LENGTH)]
    return [window for window in windows if len(window) >= 2]


CARD = """---
license: apache-2.0
language: en
---
# The embedded demonstration model

A small language model for demonstrating and testing block removal, useful for nothing else: Llama architecture,
{num_hidden_layers} blocks, width {hidden_size}, {num_attention_heads} heads, a byte-level BPE of {vocab_size} tokens,
context {max_position_embeddings} tokens, {parameters:.2f} M parameters, stored in bfloat16.
Made by `scripts/train_demo_model.py`.

- **Data:** English novels (out of copyright), Python enhancement proposals (public domain) and permissively licensed
  Python code, in their natural proportions (about 79 %, 8 % and 12 % of the bytes).
- **Training:** {tokens:.1f} M tokens, each seen once, in {hours:.2f} h on
  {hardware}; Muon and AdamW,
  sequences of {max_position_embeddings} tokens, constant learning rate with a linear fall at the end.
  Training loss at the end: {loss:.3f} nats a token.
- **Texts beside it:** `calibration.txt` is Mrs Humphry Ward, *The Story of Bessie Costrell* (1895);
  `validation.txt` is Joseph Conrad, *The Shadow-Line* (1917). Both are out of copyright, and the model was trained on
  neither.

Held-out bits per byte, by source (whole documents in windows of {max_position_embeddings} tokens):

| source | text | bits per byte |
|---|---|---|
{sources}

Loss on the first 64 windows of `validation.txt`: {whole:.4f} nats a token. After removing one block:

| block | loss | change |
|---|---|---|
{blocks}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["prepare", "train", "export"])
    parser.add_argument("--text", type=Path, help="folder with train.jsonl.xz and valid.jsonl.xz")
    parser.add_argument("--work", type=Path, required=True, help="folder for the token stream and the checkpoint")
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens to train on in all")
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {LENGTH} tokens in a step")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (resumably) after this long")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--hardware", default="unstated hardware", help="what it was trained on, for the card")
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        prepare(arguments.text, arguments.work)
    elif arguments.stage == "train":
        train(arguments.work, arguments.tokens, arguments.batch, arguments.minutes, arguments.compile)
    else:
        export(arguments.text, arguments.work, arguments.hardware)


if __name__ == "__main__":
    main()
