"""The settings of a run. The only defaults of the package's commands are here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .files import replacing

Removal = int | dict[str, int] | float
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CompressConfig:
    """Everything that decides the outcome of `blockspin compress`; stored as run.yaml in the run folder.

    model: hub id or local folder.                     calibration: hub id or local file, see calibration.py.
    remove: number of blocks, kind -> number, or a share of the blocks' parameters between 0 and 1.
    protect: indices of blocks that must stay.
    evaluation: text for the final report; None takes held-out samples of the calibration set.
    num_samples: samples for the gradients; selection_samples and evaluation_samples come after them and are distinct.
    """

    model: str
    calibration: str
    remove: Removal
    evaluation: str | None = None
    protect: tuple[int, ...] = ()
    num_samples: int = 2048
    selection_samples: int = 64
    evaluation_samples: int = 128
    max_length: int = 1024
    seed: int = 42
    split: str = "train"
    batch_size: int = 8
    gradient_checkpointing: bool = False
    beta: float = 0.0
    solver: str = "auto"
    states: int = 100
    max_candidates: int = 20
    time_limit: float | None = None
    dtype: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "protect", tuple(self.protect))
        least = {"num_samples": 1, "selection_samples": 1, "evaluation_samples": 1, "max_length": 2, "batch_size": 1}
        for name, value in {**least, "states": 1, "max_candidates": 1}.items():
            if getattr(self, name) < value:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {value}, not {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump({**asdict(self), "protect": list(self.protect)}, sort_keys=False))

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The settings in a YAML file, which may leave some out.

        Raises:
            ValueError: the file is missing, not YAML, or names unknown settings.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read the settings {path}: {error}") from error
        known = [f.name for f in fields(CompressConfig)]
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else ["(no mapping)"]
        if unknown:
            raise ValueError(f"{path} has unknown settings: {', '.join(unknown)}; known are {', '.join(known)}")
        settings: dict[str, Any] = values
        return settings


def default(name: str) -> Any:
    """The default of a setting of `CompressConfig`."""
    return next(f.default for f in fields(CompressConfig) if f.name == name)


def parse_remove(text: str) -> Removal:
    """ "8" is a number of blocks, "moe=2,attention=1" a number for each kind, "25%" a share of the blocks' parameters.

    Raises:
        ValueError: it is none of them, or a number is not positive.
    """
    try:
        if text.endswith("%") and 0 < float(text[:-1]) < 100:
            return float(text[:-1]) / 100
        pairs = [part.split("=") for part in text.split(",")] if "=" in text else [["", text]]
        counts = {kind.strip(): int(number) for kind, number in pairs}
    except ValueError:
        raise ValueError(
            f"--remove takes a number (8), a number for each kind (moe=2) or a share of parameters (25%), not {text!r}"
        ) from None
    if min(counts.values()) < 1:
        raise ValueError(f"--remove must be at least 1, not {text}")
    return counts.get("", counts)
