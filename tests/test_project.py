"""The project's own promises: import order, file map, documented functions, light imports, runnable README."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockspin

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "blockspin"
README = (ROOT / "README.md").read_text()


def file_map() -> list[str]:
    """The names in the README's file map, in its order."""
    block = re.search(r"```text\nsrc/blockspin/\n(.*?)```", README, re.DOTALL)
    assert block
    return re.findall(r"^  (\S+)", block[1], re.MULTILINE)


def modules() -> dict[str, Path]:
    """Modules of the package as the file map names them: a file, or a folder with a slash."""
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return {path.name + "/" * path.is_dir(): path for path in entries}


def test_the_file_map_matches_the_tree() -> None:
    assert sorted(file_map()) == sorted(modules())


def test_imports_go_one_way() -> None:
    """A module imports only modules above it in the file map, which is the order in which to read them."""
    order = {name.removesuffix(".py").removesuffix("/"): rank for rank, name in enumerate(file_map())}
    for name, path in modules().items():
        if name == "__init__.py":
            continue
        own = name.removesuffix(".py").removesuffix("/")
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            inside = len(file.relative_to(PACKAGE).parts)
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == inside:
                    imported = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                    for other in imported:
                        allowed = other == "__version__" or other == own or order[other] < order[own]
                        assert allowed, f"{file.name} imports {other}, which comes later in the file map"


@pytest.mark.parametrize("module", ["blockspin", "blockspin.cli", "blockspin.problem", "blockspin.solvers"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist_and_are_documented() -> None:
    for name in blockspin.__all__:
        assert getattr(blockspin, name).__doc__, name
    with pytest.raises(AttributeError):
        blockspin.no_such_name  # noqa: B018


def test_every_function_named_in_the_method_exists() -> None:
    names = re.findall(r"`(blockspin(?:\.\w+)+)`", (ROOT / "docs" / "method.md").read_text())
    assert len(names) > 10
    for name in names:
        parts = name.split(".")
        value: object = importlib.import_module(".".join(parts[:2]))
        for part in parts[2:]:
            value = getattr(value, part)


def test_options_named_in_the_readme_exist() -> None:
    from typer.testing import CliRunner

    from blockspin.cli import app

    commands = re.findall(r"^blockspin (\w+)(.*?)$", README.replace("\\\n", " "), re.MULTILINE)
    assert {"demo", "compress", "gradients", "solve", "select", "prune", "evaluate"} <= {name for name, _ in commands}
    for name, rest in commands:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"(--[\w-]+)", rest):
            assert option in shown, f"blockspin {name} has no {option}"


@pytest.mark.parametrize("language", ["bash", "python"])
def test_readme_examples_run(language: str, tmp_path: Path) -> None:
    """The fenced blocks marked as runnable, in an empty folder, one after another."""
    blocks = re.findall(rf"<!-- runnable -->\n```{language}\n(.*?)```", README, re.DOTALL)
    assert blocks
    binaries = str(Path(sys.executable).parent)
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]

    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    for block in blocks:
        subprocess.run([*command, block], cwd=tmp_path, env=environment, check=True, timeout=280)
