"""Task files of the harness's names that read local copies of the paper's benchmarks instead of the hub's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("train", "dev", "validation", "test")


class StockLoader(yaml.SafeLoader):
    """Reads the harness's task files; functions named in them are of no interest here."""


StockLoader.add_constructor("!function", lambda loader, node: None)


def write_tasks(folder: Path, data: Path) -> Path:
    """The six default tasks, and aime25, over `data`, laid out as ORG/NAME[/CONFIG]/SPLIT.jsonl.gz."""
    harness = importlib.util.find_spec("lm_eval")
    assert harness is not None
    assert harness.origin is not None
    stock = Path(harness.origin).parent / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    single = ("hellaswag/hellaswag", "winogrande/default", "arc/arc_challenge", "gsm8k/gsm8k", "aime/aime25")
    for name in single:
        _write(folder, stock / f"{name}.yaml", data)
    for path in [*stock.glob("mmlu/default/mmlu_*.yaml"), *stock.glob("leaderboard/bbh_mc/*.yaml")]:
        if "task" in _read(path) and "group" not in _read(path):
            _write(folder, path, data)
    return folder


def _read(path: Path) -> dict[str, Any]:
    """A task file with what it includes."""
    own = yaml.load(path.read_text(), StockLoader)
    included = _read(path.parent / own["include"]) if "include" in own else {}
    return {**included, **own}


def _write(folder: Path, stock: Path, data: Path) -> None:
    task = _read(stock)
    place = data / "hub" / task["dataset_path"] / (task.get("dataset_name") or "")
    files = {split: str(place / f"{split}.jsonl.gz") for split in SPLITS if (place / f"{split}.jsonl.gz").exists()}
    assert files, f"no data for {task['task']} in {place}"
    fields = ("training_split", "validation_split", "test_split", "fewshot_split")
    absent = {field: None for field in fields if task.get(field) and task[field] not in files}
    values = {
        "include": str(stock),
        "task": task["task"],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **absent,
    }
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(values))
