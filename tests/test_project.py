"""The project's own promises: import order, maps of the files, documented functions, light imports, runnable README."""

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


def packages() -> list[str]:
    """The names in the README's map, in its order."""
    block = re.search(r"```text\nsrc/blockspin/\n(.*?)```", README, re.DOTALL)
    assert block
    return re.findall(r"^  (\S+)", block[1], re.MULTILINE)


def file_map() -> list[str]:
    """The files in docs/files.md, in its order, as paths below the package."""
    block = re.search(r"```text\nsrc/blockspin/\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL)
    assert block
    folder, files = "", []
    for indent, name in re.findall(r"^( +)(\S+)", block[1], re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            files.append(folder + name if len(indent) > 2 else name)
    return files


def modules() -> dict[str, Path]:
    """Every module by its path below the package, but for the faces of packages that only hold a docstring."""
    found = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if len(ast.parse(path.read_text()).body) > 1}


def imported(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports, as paths below the package."""
    here = [*Path(name).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
        inside = PACKAGE.joinpath(*base)
        for alias in node.names:
            candidates = [inside / f"{alias.name}.py", inside.with_suffix(".py"), inside / alias.name / "__init__.py"]
            target = next((file for file in candidates if file.is_file()), inside / "__init__.py")
            found.add(target.relative_to(PACKAGE).as_posix())
    return found - {"__init__.py"}


def test_the_maps_match_the_tree() -> None:
    known = [name for name in modules() if name not in ("__init__.py", "__main__.py")]
    assert sorted(file_map()) == sorted([*known, "__main__.py"])
    assert packages() == list(dict.fromkeys(name.split("/")[0] + "/" * ("/" in name) for name in file_map()[:-1]))


def test_imports_go_one_way() -> None:
    """A module imports only modules above it in the map of files, which is the order in which to read them."""
    order = {name: rank for rank, name in enumerate(file_map())}
    for name, path in modules().items():
        if name == "__init__.py":
            continue
        for other in imported(name, path):
            assert order[other] < order[name], f"{name} imports {other}, which comes later in docs/files.md"


def test_test_files_stand_alone() -> None:
    """Every folder of tests is a package of the source, and what test files share is in modules that hold no tests."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        assert (PACKAGE / folder / "__init__.py").is_file(), f"{folder} is no package of blockspin"
        assert path.name.startswith("test_") or folder == Path(), f"{path.name} is shared, so it belongs into tests/"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            for name in names:
                is_test = any(part.startswith("test_") for part in name.split("."))
                assert not is_test, f"{path.relative_to(ROOT)} imports {name}: shared things go into a helper module"


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

    commands = re.findall(r"^(?:\w+=\$\()?blockspin (\w+)(.*?)$", README.replace("\\\n", " "), re.MULTILINE)
    assert {"demo", "compress", "energies", "solve", "select", "prune", "evaluate"} <= {name for name, _ in commands}
    for name, rest in commands:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"(--[\w-]+)", rest):
            assert option in shown, f"blockspin {name} has no {option}"


@pytest.mark.parametrize(
    ("page", "language"), [("README.md", "bash"), ("README.md", "python"), ("docs/guide.md", "python")]
)
def test_readme_examples_run(page: str, language: str, tmp_path: Path) -> None:
    """The fenced blocks marked as runnable, in an empty folder, one after another."""
    text = (ROOT / page).read_text()
    blocks = re.findall(rf"<!-- runnable -->\n```{language}\n(.*?)```", text, re.DOTALL)
    assert blocks
    binaries = str(Path(sys.executable).parent)
    command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]

    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    for block in blocks:
        subprocess.run([*command, block], cwd=tmp_path, env=environment, check=True, timeout=280)
