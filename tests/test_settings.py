"""Settings: what is refused, in one line that names the option; files and options that say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from blockspin.config import CompressConfig, EvaluateConfig
from blockspin.pipeline.compress import compress
from blockspin.training import DistillConfig

# name -> a value of the wrong type or out of range, as YAML has it, and what the message says besides the option.
REFUSED: dict[str, tuple[str, str]] = {
    "states": ("many", "a whole number"),
    "protect": ("5", "a list"),
    "seed": ("x", "a whole number"),
    "trust_remote_code": ("'false'", "true or false"),
    "gradient_checkpointing": ("1", "true or false"),
    "batch_size": ("0", "at least 1"),
    "max_length": ("1.5", "a whole number"),
    "energy_samples": ("0", "at least 1"),
    "budget": (".nan", "a number"),
    "time_limit": ("-3", "positive"),
    "energy": ("magic", "one of"),
    "objective": ("speed", "one of"),
    "dtype": ("int3", "one of"),
    "split": ("3", "text"),
    "tasks": ("[1]", "a list"),
    "evaluation": ("[a.txt]", "text or null"),
    "remove": ("0", "at least 1"),
    "calibration": ("null", "text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_setting_in_a_file_gives_one_line(command: Command, tmp_path: Path, name: str) -> None:
    value, message = REFUSED[name]
    lines = {"model": "m", "calibration": "c", "remove": "2", name: value}
    (tmp_path / "settings.yaml").write_text("".join(f"{key}: {entry}\n" for key, entry in lines.items()))
    code, printed = command("compress", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "run")
    errors = [line for line in printed.splitlines() if line.startswith("Error:")]
    assert (code, len(errors)) == (2, 1), printed
    assert f"--{name.replace('_', '-')} " in errors[0]
    assert message in errors[0]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n", "model: [\n", "distill: 3\n", "\0"])
def test_files_that_hold_no_settings(command: Command, tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    code, printed = command("compress", "--config", tmp_path / "settings.yaml", "--distill")
    assert (code, "Error:" in printed, "Traceback" in printed) == (2, True, False)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["select", "m", "--energies", "e", "--remove", 2, "--data", "d", "--num-samples", 0], "--num-samples"),
        (["select", "m", "--energies", "e", "--remove", 2, "--data", "d", "--budget", -1], "--budget"),
        (["energies", "m", "--calibration", "c", "--energy-samples", 0], "--energy-samples"),
        (["energies", "m", "--calibration", "c", "--seed", -1], "--seed"),
        (["solve", "e", "--remove", 2, "--states", 0], "--states"),
        (["solve", "e", "--remove", 2, "--states", "many"], "--states"),
        (["solve", "e", "--remove", 2, "--protect", "a"], "--protect"),
        (["solve", "e"], "--remove"),
        (["solve", "e", "--remove", 2, "--no-such-option"], "--no-such-option"),
        (["compress", "m", "--distill-max-steps", 0, "--remove", 2, "--calibration", "c"], "--distill-max-steps"),
        (["compare", "m", "--remove", "1,0", "--calibration", "c"], "--remove"),
        (["evaluate", "m", "--batch-size", 0], "--batch-size"),
        (["evaluate", "m", "--data", "d", "--num-samples", 0], "--num-samples"),
        (["evaluate", "m", "--rollouts", "a=0"], "--rollouts"),
        (["evaluate", "m", "--text", "wikitext2", "--window", 0], "--window"),
        (["evaluate", "m", "--cost", "--new-tokens", 0], "--new-tokens"),
        (["evaluate", "m", "--top-p", 2], "--top-p"),
    ],
)
def test_a_wrong_option_is_the_one_that_is_blamed(command: Command, arguments: list[Any], option: str) -> None:
    code, printed = command(*arguments)
    errors = [line for line in printed.splitlines() if line.startswith("Error:")]
    assert (code, len(errors)) == (2, 1), printed
    assert option in errors[0]


def test_settings_survive_a_file(tmp_path: Path) -> None:
    training = DistillConfig(max_steps=7, report_to=("wandb",))
    for remove in (3, {"moe": 2}, 0.25):
        config = CompressConfig("m", "données.jsonl", remove, protect=(0, 3), tasks=("a",), limit=0.5, distill=training)
        config.save(tmp_path / "run.yaml")
        assert "calibration: données.jsonl\n" in (tmp_path / "run.yaml").read_text(encoding="utf-8")
        assert CompressConfig(**CompressConfig.read(tmp_path / "run.yaml")) == config


def test_a_file_may_say_what_the_option_says(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "remove: 25%\nprotect: 0-2,5\ntasks: mmlu,gsm8k\nbudget: 1e1\ndistill: {learning_rate: 1e-4}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "remove: 0.25\nprotect: [0, 1, 2, 5]\ntasks: [mmlu, gsm8k]\nbudget: 10\ndistill: {learning_rate: 0.0001}\n"
    )
    first, second = (CompressConfig("m", "c", **CompressConfig.read(tmp_path / name)) for name in ("a.yaml", "b.yaml"))
    assert first == second


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("energy: fisher", 2048),
        ("energy: secant", 64),
        ("energy: fisher\nnum_samples: 5", 5),
        ("energy: fisher\nnum_samples: 5\nenergy_samples: 6", 5),
        ("energy: secant\nnum_samples: 5\nenergy_samples: 6", 6),
        ("energy: secant\nenergy_samples: 6", 6),
    ],
)
def test_the_number_of_samples_depends_on_the_energy(tmp_path: Path, text: str, expected: int) -> None:
    """Files of older runs have two numbers, of which the energy takes one."""
    (tmp_path / "settings.yaml").write_text(text)
    config = CompressConfig("m", "c", 1, **CompressConfig.read(tmp_path / "settings.yaml"))
    assert config.calibration_samples == expected


def test_tasks_are_those_of_the_paper_unless_some_are_named() -> None:
    assert len(EvaluateConfig().tasks) == 6
    sampled: list[dict[str, Any]] = [{"rollouts": {"aime25": 3}}, {"rollouts": {"b": 3}}]
    assert EvaluateConfig(**sampled[0]).tasks == ("aime25",)
    assert EvaluateConfig(tasks=("a",), limit=7, **sampled[1]).tasks == ("a", "b")


def test_a_switch_in_a_file_can_be_turned_off(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[CompressConfig] = []
    monkeypatch.setattr("blockspin.cli.runs._compress", lambda config, out, json: seen.append(config))
    (tmp_path / "settings.yaml").write_text("model: m\ncalibration: c\nremove: 2\ngradient_checkpointing: true\n")
    command("compress", "--config", tmp_path / "settings.yaml")
    command("compress", "--config", tmp_path / "settings.yaml", "--no-gradient-checkpointing")
    assert [config.gradient_checkpointing for config in seen] == [True, False]


def test_options_are_in_groups_and_required_ones_are_marked(command: Command) -> None:
    _, printed = command("compress", "--help")
    for group in ("Run", "Data", "Model", "Energy", "Solver", "Choice", "Tasks", "Training"):
        assert f"\n{group}:\n" in printed
    assert "Required" in printed
    _, printed = command("solve", "--help")
    assert "[required]" in printed


def test_the_help_names_every_option_whole_in_a_narrow_terminal() -> None:
    """And what a command does in one line of the list of all."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from blockspin.cli import app

    group: Any = get_command(app)
    narrow = {"COLUMNS": "60"}
    for name, command in group.commands.items():
        shown = CliRunner().invoke(app, [name, "--help"], env=narrow).output
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                assert parameter.hidden or option in shown, (name, option)

    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "..." not in listed.partition("Commands:")[2]
    assert listed.index("demo") < listed.index("compress") < listed.index("evaluate")


def test_the_version_is_the_package_s(command: Command) -> None:
    from blockspin import __version__

    assert command("--version") == (0, f"blockspin {__version__}\n")


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, device: str
) -> None:
    data = ("--calibration", text_file, "--energy-samples", 2, "--max-length", 16, "--out", tmp_path / "e.safetensors")
    code, printed = command("energies", tiny_folder, *data, "--device-map", device)
    assert (code, "--device-map" in printed, "Traceback" in printed) == (2, True, False)
    assert not (tmp_path / "e.safetensors").exists()


def test_settings_without_what_they_need_are_named() -> None:
    """In one note for all that need the same, and only where they were changed."""
    idle: dict[str, Any] = {"own_text": 0.2, "repair": False, "limit": 5, "num_fewshot": 0}
    assert CompressConfig("m", "c", 2, **idle, gradient_checkpointing=True).unused() == [
        "Note: without --tasks, --limit and --num-fewshot change nothing.",
        "Note: without --repair, --own-text changes nothing.",
        "Note: with --energy fitted, --gradient-checkpointing changes nothing.",
    ]
    in_use: dict[str, Any] = {
        "own_text": 0.2,
        "tasks": ("mmlu",),
        "limit": 5,
        "energy": "fisher",
        "gradient_checkpointing": True,
    }
    assert CompressConfig("m", "c", 2, **in_use).unused() == []
    assert DistillConfig(answer_tokens=9).unused() == [
        "Note: without --self-generated, --answer-tokens changes nothing."
    ]


def test_options_without_effect_are_named_by_commands_and_functions(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, text = tmp_path / "absent", tmp_path / "text.txt"
    shared = ("--remove", 2, "--calibration", text, "--out", tmp_path / "run")
    _, said = command("compress", absent, *shared, "--no-repair", "--own-text", 0.2)
    assert said.count("without --repair, --own-text changes nothing") == 1

    _, said = command("energies", absent, *shared, "--energy", "secant", "--target-params", "75%")
    assert "with --energy secant, --remove and --target-params change nothing" in said

    unused = ("--limit", 3, "--max-length", 9, "--length", 9, "--top-p", 0.5)
    _, said = command("evaluate", absent, "--text", text, *unused)
    for needed, option in [("tasks", "limit"), ("data", "max-length"), ("cost", "length"), ("rollouts", "top-p")]:
        assert f"without --{needed}, --{option} changes nothing" in said
    _, said = command("evaluate", absent, "--text", text, "--data", text, "--max-length", 9, "--window", 9)
    assert "nothing" not in said

    with pytest.raises(ValueError, match="no such folder"):
        compress(CompressConfig(str(absent), str(text), 2, own_text=0.2, repair=False), tmp_path / "run")
    assert "--own-text changes nothing" in capsys.readouterr().err


def test_a_split_of_a_file_is_named(command: Command, tmp_path: Path) -> None:
    """A file has no splits; datasets of the hub and folders have."""
    text, absent = tmp_path / "text.jsonl", tmp_path / "absent"
    text.write_text('{"text": "some words"}\n')
    nothing = "Note: with a local file as the text, --split changes nothing."

    def run(calibration: str, evaluation: str | None = None, **changes: Any) -> list[str]:
        return CompressConfig("m", calibration, 2, evaluation=evaluation, **{"split": "test", **changes}).unused()

    assert run(str(text)) == run(str(text), str(text)) == [nothing]
    assert run(str(text), split="train") == run("org/name") == run(str(tmp_path)) == []
    assert run(str(text), "org/name") == run("org/name", str(text)) == []
    assert run(str(text), distill={"data": str(text)}) == [nothing]
    assert run(str(text), distill={"data": "org/name"}) == []

    out = ("--out", tmp_path / "out", "--split", "test")
    for given in (
        ("compare", absent, "--remove", 2, "--calibration", text),
        ("energies", absent, "--remove", 2, "--calibration", text),
        ("evaluate", absent, "--data", text),
        ("distill", absent, "--teacher", absent, "--data", text),
    ):
        assert command(*given, *out)[1].count("--split changes nothing") == 1, given[0]
