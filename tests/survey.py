"""Puts every model type of transformers with a text decoder through removal; docs/architectures.md says what works.

python tests/survey.py [MODEL_TYPE ...]      # without arguments: all of them, and docs/architectures.md is written
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path

import transformers as tf
from examination import DEEPER, DEEPER_REMOVAL, Row, quiet_examine
from tiny import COMPOSITE_TYPES, MODEL_TYPES


def runs(values: Iterable[object]) -> str:
    """Neighbouring equal values counted: [a, a, b] -> "2 a, 1 b"."""
    return ", ".join(f"{len(list(group))} {value}" for value, group in itertools.groupby(values))


def line(row: Row) -> str:
    """One row of the table."""
    if row.cannot_start or row.not_a_decoder:
        verdict = f"not tested: {row.cannot_start}" if row.cannot_start else f"refused: {row.not_a_decoder}"
        return f"| {row.model_type} | {runs(row.kinds)} | | | | {verdict.replace('|', '/')} |"

    gates = "block" if not any(row.branches) else "branch" if all(row.branches) else "branch or block"
    expressible = f"{len(row.works)} of {len(row.works) + len(row.refused)}"
    notes = [f"FAULT {fault}" for fault in row.faults]
    if not row.has_cache:
        notes.append("decoding not compared: the whole model differs with and without its cache")
    if row.only_in_memory:
        notes.append(f"only in memory: {row.only_in_memory}")
    for removed, reason in list(row.refused.items())[:1]:
        notes.append(f"without {list(removed)}: {reason}")
    deeper = row.deeper if row.deeper in ("works", "not built") else "refused"
    if deeper == "refused" and not row.refused:
        notes.append(f"of {DEEPER} without {list(DEEPER_REMOVAL)}: {row.deeper}")
    told = "; ".join(notes).replace("|", "/")
    return f"| {row.model_type} | {runs(row.kinds)} | {gates} | {expressible} | {deeper} | {told} |"


def document(rows: list[Row]) -> str:
    """The page: causal models, then the composite ones, each with their counts."""
    causal = [row for row in rows if row.model_type in MODEL_TYPES]
    composite = [row for row in rows if row.model_type not in MODEL_TYPES]
    speech = [row.model_type for row in composite if row.auto_class == "AutoModelForMultimodalLM"]
    return (
        HEAD.format(version=tf.__version__, **counts(causal))
        + table(causal)
        + COMPOSITE.format(**counts(composite), speech=", ".join(speech))
        + table(composite)
    )


def counts(rows: list[Row]) -> dict[str, int]:
    decoders = [row for row in rows if not row.cannot_start and not row.not_a_decoder]
    good = [row for row in decoders if row.works and row.has_cache and not row.faults and not row.only_in_memory]
    return {
        "all": len(rows),
        "decoders": len(decoders),
        "good": len(good),
        "built": sum(row.deeper != "not built" for row in decoders),
        "deeper": sum(row.deeper == "works" for row in decoders),
        "refused": sum(bool(row.not_a_decoder) for row in rows),
        "cannot": sum(bool(row.cannot_start) for row in rows),
    }


def table(rows: list[Row]) -> str:
    return TABLE + "".join(line(row) + "\n" for row in rows)


HEAD = """# Architectures

Made by `python tests/survey.py` with transformers {version}. Each of the {all} causal model types gets a random model
of six small layers; {refused} are refused as a whole (encoders, parts of encoder-decoders, layers that are no blocks)
and {cannot} cannot be built or run here by transformers itself. Of the {decoders} others {good} pass everything: blocks
and kinds are found; gates of one change no bit and a gate of zero makes its layer the identity; removal in memory
equals gates at zero and skipping; the shortened checkpoint loads without missing or unexpected tensors and equals
removal in memory; what is saved from memory loads again; each step of generation with the cache has the logits of a
pass without it.

Five removals are tried: the first, the last, two neighbours in the middle, and scattered ones. Those that
the configuration cannot express are refused with the reason and the single blocks that can be removed; the table shows
the reason for the first of them. "gate" says whether alpha acts on each residual branch or on the block as a whole
(where branches cannot be told apart, or are scaled after the addition).

Some refusals are right though a configuration would express the removal. Reformer's blocks have two residual streams,
and gates act on one: what they measure is not what a removal does. MiniMax's cache counts tokens in its first layer. A
hybrid keeps one attention layer, because the cache counts there. Qwen4-Exp hashes n-grams by the rank of a layer among
those that do, which a configuration cannot say. RWKV is opened without its rescaling (`rescale_every`), which changes
the weights in memory and not what is computed.

Then the same with ten layers, where what the configuration lists for each layer (kinds of attention, windows, ...) is
shuffled, without three of them: {deeper} of {decoders} work, {built} could be built.

"""

COMPOSITE = """
## Composite models

Models that take images or sound besides text. Blocks are chosen and removed in their text decoder, on text; the other
parts stay as they are, byte for byte. They are opened by `AutoModelForImageTextToText`, or by
`AutoModelForMultimodalLM` ({speech}).

Of {all} types {refused} are refused as a whole and {cannot} cannot be built here or do not run on text alone. Of the
{decoders} others {good} pass everything that is said above, and of {built} with ten layers {deeper} work. Where
features of images are added to the hidden states between blocks, the blocks whose removal would move them are refused.

"""

TABLE = """| model type | kinds | gate | removals | deeper | refused, and why |
|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*MODEL_TYPES, *COMPOSITE_TYPES]
    rows = []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for row in pool.imap(quiet_examine, chosen):
            rows.append(row)
            print(line(row), flush=True)
    if not sys.argv[1:]:
        (Path(__file__).parents[1] / "docs" / "architectures.md").write_text(document(rows))
