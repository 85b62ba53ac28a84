"""What a repair did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """What was done to one linear map.

    block: in the original. projection: the map's name inside the block.
    before, after: squared distance from the aim, relative to the aim's square, mean over held-out tokens.
    kept: whether the new weights were kept, which they are where they help on the held-out tokens.
    """

    block: int
    projection: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    removed: the blocks that are gone. tokens: tokens of text that the weights were fitted to.
    steps: each linear map in turn. untouched: kept blocks that the removal concerns and that have no out-projection
    which could be changed. kl_before, kl_after: KL(original || shortened) on the held-out samples, in nats a token.
    undone: as a whole the repair did not help on the held-out samples, so all weights are as they were.
    passes: what it cost, in forward passes of the original over the samples; what was done before an interruption
    does not count.
    """

    removed: tuple[int, ...]
    tokens: int
    steps: tuple[Step, ...] = field(repr=False)
    untouched: tuple[int, ...]
    kl_before: float
    kl_after: float
    undone: bool
    passes: float = field(compare=False)

    def summary(self) -> str:
        """For people."""
        if not self.steps:
            text = "Nothing was repaired."
        elif self.undone:
            text = f"Repairing did not help on held-out text (KL {self.kl_before:.4f}); the weights are as they were."
        else:
            kept = sum(step.kept for step in self.steps)
            text = (
                f"Repaired {kept} of {len(self.steps)} linear maps with {self.tokens:,} tokens of text: "
                f"KL from the original on held-out text {self.kl_before:.4f} -> {self.kl_after:.4f}."
            )
        if self.untouched:
            blocks = ", ".join(map(str, self.untouched))
            text += (
                f" The out-projections of the blocks {blocks} stay as they are: what they give does not reach the "
                "residual stream unchanged (routed experts, or a norm behind the map)."
            )
        return text

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)
