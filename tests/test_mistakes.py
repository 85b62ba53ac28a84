"""What is not right, or ends too early: one line that says so, exit code 2, nothing written or left behind."""

from __future__ import annotations

import importlib.util
import io
import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import Command, save_tiny
from rich.console import Console
from safetensors.torch import load_file

from blockspin import hub
from blockspin.progress import bar


@pytest.fixture
def refuses(command: Command, tmp_path: Path) -> Any:
    """Run a command that must be refused: returns its one line. What is in the test's folder must stay as it was."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def run(*arguments: object) -> str:
        before = contents()
        code, printed = command(*arguments)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), printed
        assert "Traceback" not in printed
        assert contents() == before
        return errors[0]

    return run


def change_config(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def energies_of(model: object, data: object, out: Path) -> tuple[object, ...]:
    sizes = ("--energy-samples", 4, "--max-length", 16, "--energy", "empirical-fisher")
    return ("energies", model, "--calibration", data, *sizes, "--out", out)


ODD_SETTINGS: dict[str, list[Any]] = {
    "num_hidden_layers": ["4", 4.5, -1, None, []],
    "hidden_size": ["x", [32], 0, 33],
    "vocab_size": [-3, "many"],
    "num_attention_heads": [0, "four"],
    "model_type": ["nonsense", 5, None],
    "hidden_act": ["nonsense", 5],
    "layer_types": ["abc", ["nonsense"] * 4],
    "rope_parameters": [5, {"rope_type": "nonsense"}],
    "quantization_config": [5],
    "auto_map": [5],
    "id2label": [5],
    "pad_token_id": ["a"],
    "tie_word_embeddings": ["maybe"],
    "max_position_embeddings": ["a"],
    "architectures": [5],
}


@pytest.mark.parametrize("name", ODD_SETTINGS)
def test_an_odd_configuration(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    original = (tiny_folder / "config.json").read_text()
    for value in ODD_SETTINGS[name]:
        (tiny_folder / "config.json").write_text(original)
        change_config(tiny_folder, **{name: value})
        refuses("info", tiny_folder)
        refuses("prune", tiny_folder, "--blocks", 1, "--out", tmp_path / "short")
        refuses(*energies_of(tiny_folder, text_file, tmp_path / "e.safetensors"))


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", '"text"', "\0"])
def test_a_configuration_that_is_none(refuses: Any, tiny_folder: Path, tmp_path: Path, content: str) -> None:
    (tiny_folder / "config.json").write_text(content)
    refuses("info", tiny_folder)
    refuses("prune", tiny_folder, "--blocks", 1, "--out", tmp_path / "short")


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"model": {}}', '{"version": "1.0", "model": 3}'])
def test_an_odd_tokenizer(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, content: str) -> None:
    (tiny_folder / "tokenizer.json").write_text(content)
    line = refuses(*energies_of(tiny_folder, text_file, tmp_path / "e.safetensors"))
    assert "tokenizer" in line or "no sample" in line


def test_the_tokenizer_of_another_model(refuses: Any, text_file: Path, tmp_path: Path) -> None:
    model, other = save_tiny(tmp_path / "model", vocabulary=260), save_tiny(tmp_path / "other")
    shutil.copy(other / "tokenizer.json", model / "tokenizer.json")
    change_config(other, vocab_size=260)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "a few words to learn from"}) + "\n")
    line = refuses(*energies_of(model, tmp_path / "words.jsonl", tmp_path / "e.safetensors"))
    assert "the model knows only 260" in line
    shared = ("--remove", 1, "--calibration", tmp_path / "words.jsonl")
    assert "knows only 260" in refuses("compress", model, *shared, "--out", tmp_path / "run")
    assert "knows only 260" in refuses("compare", model, *shared, "--out", tmp_path / "comparison")
    assert "knows only 260" in refuses("evaluate", model, "--data", tmp_path / "words.jsonl")
    assert "knows only 260" in refuses("evaluate", model, "--text", tmp_path / "words.jsonl")


@pytest.mark.parametrize("name", ["absent", "some/where/absent", "no name at all", "../absent", "file"])
def test_a_model_that_is_not_there(
    refuses: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("asked the hub"))
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / name if name in ("absent", "file") else name
    for line in (
        refuses("info", path),
        refuses("prune", path, "--blocks", 1, "--out", tmp_path / "short"),
        refuses(*energies_of(path, text_file, tmp_path / "e.safetensors")),
        refuses("evaluate", path, "--data", text_file),
        refuses("distill", path, "--teacher", path, "--data", text_file, "--out", tmp_path / "taught"),
    ):
        assert "there is no such folder, and it is no hub id" in line


def test_a_hub_that_cannot_be_reached_is_asked_once(
    command: Command,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its client would try six times, and wait 23 seconds in all."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_reachable", lambda: False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    absent = "'org/absent': there is no such folder, the hub cannot be reached"
    cases = {
        ("info", "org/absent"): absent,
        ("prune", "org/absent", "--blocks", 1, "--out", tmp_path / "short"): absent,
        ("distill", "org/absent", "--teacher", tiny_folder, "--data", "x.txt", "--out", tmp_path / "taught"): absent,
        energies_of(tiny_folder, "org/absent", tmp_path / "e.safetensors"): "org/absent",
    }
    if importlib.util.find_spec("lm_eval"):
        cases["evaluate", tiny_folder, "--tasks", "arc_easy"] = "the data of task arc_easy cannot be loaded"
    for arguments, message in cases.items():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        capsys.readouterr()
        code, printed = command(*arguments)
        assert (code, printed.count("\n")) == (2, 1), printed
        assert message in printed
    assert sum(waited) < 1


def test_energies_of_another_model(command: Command, refuses: Any, text_file: Path, tmp_path: Path) -> None:
    llama, other = save_tiny(tmp_path / "llama"), save_tiny(tmp_path / "other", "qwen3")
    energies = tmp_path / "energies.safetensors"
    assert command(*energies_of(llama, text_file, energies))[0] == 0
    shared = ("--energies", energies, "--remove", 1, "--data", text_file, "--num-samples", 2, "--max-length", 16)
    line = refuses("select", other, *shared, "--out", tmp_path / "candidates.json")
    assert f"the energies are of {llama}" in line


def test_what_is_missing_is_named_as_an_option(refuses: Any, tiny_folder: Path, text_file: Path) -> None:
    assert "--calibration" in refuses("compress", tiny_folder, "--remove", 1)
    assert "which model" in refuses("compress", "--remove", 1, "--calibration", text_file)
    units = refuses("compress", tiny_folder, "--units", "attention")
    assert "'blocks', 'sublayers'" in units
    assert "Value error" not in units


def test_a_folder_without_tokenizer(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for path in tiny_folder.glob("token*"):
        path.unlink()
    assert "it has none" in refuses(*energies_of(tiny_folder, text_file, tmp_path / "e.safetensors"))


def test_a_model_that_needs_another_word(refuses: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """The folder of a run, and code that comes with a model."""
    inside = tmp_path / "run" / "checkpoint"
    shutil.copytree(tiny_folder, inside)
    assert f"give {inside}" in refuses("info", tmp_path / "run")
    change_config(inside, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (inside / "own.py").write_text("raise RuntimeError")
    assert "--trust-remote-code" in refuses("info", inside)


@contextmanager
def small_disk() -> Iterator[None]:
    """Inside, no file may grow beyond a few blocks, as on a disk that is full; not even the tests' own log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_full_disk_while_pruning(refuses: Any, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "bin":
        torch.save(load_file(tiny_folder / "model.safetensors"), tiny_folder / "pytorch_model.bin")
        (tiny_folder / "model.safetensors").unlink()
    with small_disk():
        line = refuses("prune", tiny_folder, "--blocks", 1, "--out", tmp_path / "short")
    assert "cannot write" in line
    assert "File too large" in line


def test_a_full_disk_while_training(command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Whether it is met when a checkpoint is written on the way, or the result: one line, and later it continues."""
    assert command("prune", tiny_folder, "--blocks", "1,2", "--out", tmp_path / "short")[0] == 0
    sizes = ("--max-length", 16, "--max-steps", 4, "--batch-size", 2)
    training = ("distill", tmp_path / "short", "--teacher", tiny_folder, "--data", text_file, *sizes)
    for save_steps in (2, 100):
        out = tmp_path / f"taught-{save_steps}"
        with small_disk():
            code, printed = command(*training, "--save-steps", save_steps, "--out", out)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors), "cannot write" in printed) == (2, 1, True), printed
        assert not out.exists()


def test_a_logger_that_is_not_there(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    training = ("distill", tiny_folder, "--teacher", tiny_folder, "--data", text_file, "--out", tmp_path / "taught")
    assert "no such logger" in refuses(*training, "--report-to", "nonsense")
    missing = next(name for name in ("wandb", "comet_ml", "mlflow") if importlib.util.find_spec(name) is None)
    assert f"--report-to {missing}" in refuses(*training, "--report-to", missing)


def test_what_ctrl_c_ends_continues_with_the_same_command(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    arguments = energies_of(tiny_folder, text_file, tmp_path / "e.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("blockspin.pipeline.stages.estimate_energies", interrupt)
        code, printed = command(*arguments)
    assert (code, "Interrupted. Run the same command again to continue." in printed) == (130, True)
    assert command(*arguments)[0] == 0


def test_an_end_of_a_file_is_no_bare_word(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*arguments: object) -> None:
        raise EOFError

    monkeypatch.setattr("blockspin.energies.load_energies", end)
    code, printed = command("solve", tmp_path / "e", "--remove", 1)
    assert (code, "Error: a file ends before it should" in printed) == (2, True)


def test_a_finished_prune_shows_its_result(command: Command, refuses: Any, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "short"
    assert command("prune", tiny_folder, "--blocks", "1,2", "--out", out)[0] == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    code, printed = command("prune", tiny_folder, "--blocks", "1-2", "--out", out)
    assert (code, f"The smaller model is in {out}" in printed) == (0, True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before

    # Another removal, another model, and the same model changed.
    assert "exists already" in refuses("prune", tiny_folder, "--blocks", "1,3", "--out", out)
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    assert "exists already" in refuses("prune", other, "--blocks", "1,2", "--out", out)
    change_config(tiny_folder, rms_norm_eps=0.5)
    assert "exists already" in refuses("prune", tiny_folder, "--blocks", "1,2", "--out", out)


def test_a_finished_training_shows_its_result(
    command: Command, refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert command("prune", tiny_folder, "--blocks", "1,2", "--out", tmp_path / "short")[0] == 0
    sizes = ("--max-length", 16, "--max-steps", 2, "--batch-size", 2)
    training = ("distill", tmp_path / "short", "--teacher", tiny_folder, "--data", text_file, *sizes)
    code, printed = command(*training, "--out", tmp_path / "taught")
    assert code == 0
    said = printed[printed.rindex("Perplexity") :]
    before = (tmp_path / "taught" / "model.safetensors").stat().st_mtime_ns
    code, printed = command(*training, "--out", tmp_path / "taught")
    assert (code, printed[printed.rindex("Perplexity") :]) == (0, said)
    assert (tmp_path / "taught" / "model.safetensors").stat().st_mtime_ns == before
    assert "exists already" in refuses(*training, "--seed", 7, "--out", tmp_path / "taught")


def test_a_bar_never_shows_more_than_all() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    progress = bar()
    task = progress.add_task("Work", total=4)
    for done, shown in ((1, "1/4"), (4, "4/4"), (7.5, "4/4")):
        progress.update(task, completed=done)
        with console.capture() as captured:
            console.print(progress.make_tasks_table(progress.tasks))
        assert shown in captured.get()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_too_little_memory(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("blockspin.energies.load_energies", fail)
    code, printed = command("solve", tmp_path / "e", "--remove", 1)
    assert (code, "not enough memory; lower --batch-size" in printed) == (2, True)


def test_what_is_wrong_with_data_names_the_option_that_gave_it(
    tiny_folder: Path, text_file: Path, refuses: Any, tmp_path: Path
) -> None:
    absent, odd = tmp_path / "absent.jsonl", tmp_path / "odd.jsonl"
    odd.write_text('{"question": "?"}\n' * 3)
    run = ("compress", tiny_folder, "--remove", 1, "--calibration", text_file, "--max-length", 16, "--no-repair")
    out = ("--out", tmp_path / "out")
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("--calibration", ("energies", tiny_folder, *out)),
        ("--evaluation", (*run, *out)),
        ("--distill-data", (*run, "--distill", *out)),
        ("--data", ("evaluate", tiny_folder)),
        ("--data", ("repair", tiny_folder, "--original", tiny_folder, *out)),
    ]
    others = {option for option, _ in cases}
    for option, given in cases:
        for source, problem in ((absent, "no such file"), (odd, "it has the fields question")):
            said = refuses(*given, option, source)
            assert problem in said
            assert [name for name in others if f"({name}" in said] == [option], said
    assert "--evaluation takes a hub id, or a local file" in refuses(*run, *out, "--evaluation", absent)


def test_text_without_prompts_is_refused_before_anything_is_computed(
    tiny_folder: Path, text_file: Path, refuses: Any, tmp_path: Path
) -> None:
    run = ("compress", tiny_folder, "--remove", 1, "--calibration", text_file, "--max-length", 16, "--no-repair")
    asking = (*run, "--distill", "--distill-self-generated", 5, "--out", tmp_path / "out")
    assert "no chat template" in refuses(*asking)

    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tiny_folder)
    assert "prompts are made of `messages`" in refuses(*asking)
