"""requirements.txt and requirements-dev.txt against what the code imports, both ways."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("requirements.txt", "requirements-dev.txt")
COMMANDS = ("Makefile", "CONTRIBUTING.md")  # where tools are run by name


def package() -> list[Path]:
    return [ROOT / "app.py", *(ROOT / "ipmerge_core").rglob("*.py")]


def scripts() -> list[Path]:
    folders = [ROOT / name for name in ("tests", "benchmarks", "assets")]
    return [path for folder in folders for path in folder.rglob("*.py")]


def canonical(name: str) -> str:
    """The spelling in which names of distributions are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def listed(file: str) -> dict[str, str]:
    """The distributions in a requirements file, each with its comment."""
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line[:1] != "#"]
    found = [re.match(r"([A-Za-z0-9._-]+)[^#]*(?:# (.+))?$", line) for line in lines]
    assert all(found), f"{file} holds a line that is no requirement"
    return {canonical(match[1]): match[2] or "" for match in found if match}


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level modules that code imports, inside functions and for types too.

    What stands in a `try` that handles ImportError is optional and left out.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try) and any(
            handler.type and "ImportError" in ast.unparse(handler.type) for handler in node.handlers
        ):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        else:
            yield from imports(node)


def modules(paths: Iterable[Path]) -> set[str]:
    own = {path.stem for path in scripts()} | {"ipmerge_core", "app"}
    return set().union(*map(modules_of, paths)) - own - sys.stdlib_module_names


@cache
def modules_of(path: Path) -> frozenset[str]:
    return frozenset(imports(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def distributions() -> dict[str, list[str]]:
    return {module: [*map(canonical, names)] for module, names in packages_distributions().items()}


def imported(paths: Iterable[Path]) -> set[str]:
    """The distributions that hold the modules which code imports."""
    found = modules(paths)
    assert found <= distributions().keys(), "not installed here"
    return {distributions()[module][0] for module in found}


def importer(comment: str) -> str | None:
    """The library that a comment names as the one that imports a requirement."""
    found = re.search(r"imported by ([\w-]+)", comment)
    return canonical(found[1]) if found else None


def is_pytest_plugin(name: str) -> bool:
    return bool(distribution(name).entry_points.select(group="pytest11"))


def is_command(name: str) -> bool:
    """Whether a distribution, or a command that it installs, is run by name."""
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in COMMANDS)
    scripts = [
        each.name for each in distribution(name).entry_points.select(group="console_scripts")
    ]
    return any(
        re.search(rf"(-m |\.venv/bin/|\$\(VENV\)/bin/){re.escape(each)}\b", text)
        for each in (name, *scripts)
    )


def test_what_the_package_imports_is_in_the_requirements():
    assert not imported(package()) - listed("requirements.txt").keys()


def test_every_requirement_is_imported_or_names_the_library_that_imports_it():
    indirect = listed("requirements.txt").keys() - imported(package())
    for name in indirect:
        library = importer(listed("requirements.txt")[name])
        assert library in listed("requirements.txt"), f"nothing here imports {name}"
        needed = {canonical(re.split(r"[^\w.-]", line)[0]) for line in requires(library) or ()}
        assert name in needed, f"{library} does not require {name}"


def test_what_tests_and_benchmarks_import_is_in_the_requirements_of_either():
    known = listed("requirements.txt").keys() | listed("requirements-dev.txt").keys()
    assert not imported(scripts()) - known


def test_every_development_requirement_is_imported_or_run():
    rest = listed("requirements-dev.txt").keys() - imported(scripts())
    assert not [name for name in rest if not (is_pytest_plugin(name) or is_command(name))]


def test_no_requirement_is_listed_twice():
    assert not listed("requirements.txt").keys() & listed("requirements-dev.txt").keys()


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_says_what_it_is_for(file: str):
    assert all(len(comment) > 10 for comment in listed(file).values())


def test_mypy_skips_only_libraries_that_the_package_imports():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    skipped = {name.partition(".")[0] for rule in settings["overrides"] for name in rule["module"]}
    optional = {"datasets"}  # imported where it is installed
    assert not skipped - optional - modules(package())
