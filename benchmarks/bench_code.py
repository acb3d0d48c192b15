"""Figures of the code itself: layout, lengths of functions, docstrings and types, repeats.

    python benchmarks/bench_code.py [--root CHECKOUT] [--duplicates]

`--root` measures another checkout with the same rules, for a comparison. A package is a folder of
`ipmerge_core`, or a file at its top; its floor is one above the highest package that it imports.
`--duplicates` counts blocks of six or more equal lines by pylint's `duplicate-code`; it needs
`pip install pylint` and takes two minutes.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("ipmerge_core", "tests", "benchmarks", "assets/demo", "app.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Layout(NamedTuple):
    """The packages as a graph of imports."""

    packages: int
    floors: int
    arrows: int
    cycles: int


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--duplicates", action="store_true")
    options = parser.parse_args()
    root: Path = options.root.resolve()
    files = sorted((root / "ipmerge_core").rglob("*.py"))
    trees = {path: ast.parse(path.read_text("utf-8")) for path in files}
    found = layout(root / "ipmerge_core", trees)
    lengths = sorted(length(each) for tree in trees.values() for each in functions(tree))
    public = [each for tree in trees.values() for each in public_functions(tree)]
    print(machine())
    rows = [
        ("entries at the top of the repository", str(len(top_entries(root)))),
        ("entries at the top of the package", str(len(top_entries(root / "ipmerge_core")))),
        ("packages, floors", f"{found.packages}, {found.floors}"),
        ("import arrows, cycles", f"{found.arrows}, {found.cycles}"),
        ("files, lines", f"{len(files)}, {sum(map(count_lines, files))}"),
        ("lines of a file: median, longest", f"{median(map(count_lines, files)):.0f}, "
         f"{max(map(count_lines, files))}"),
        ("lines of a function: median, p90, longest",
         f"{median(lengths):.0f}, {quantiles(lengths, n=10)[-1]:.0f}, {lengths[-1]}"),
        ("public functions with a docstring", share(public, ast.get_docstring)),
        ("public functions with a return type", share(public, lambda each: each.returns)),
        ("lines of tests / of code", f"{tests_to_code(root, files):.2f}"),
    ]  # fmt: skip
    if options.duplicates:
        rows.append(("repeats of six lines or more", str(duplicates(root))))
    print(table(("figure", "measured"), rows))
    return 0


def top_entries(folder: Path) -> set[str]:
    """Return the tracked files and folders directly in a folder."""
    command = ["git", "-C", str(folder), "ls-files"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.split("/")[0] for name in tracked.splitlines()}


def layout(package: Path, trees: dict[Path, ast.Module]) -> Layout:
    """Build the import graph of the packages; count floors, arrows and cycles."""
    graph: dict[str, set[str]] = {room_of(package, path): set() for path in trees}
    for path, tree in trees.items():
        room = room_of(package, path)
        if room != "__init__":  # the facade names everything
            graph[room] |= set(imported(tree)) & set(graph) - {room}
    heights: dict[str, int] = {}
    cycles = 0
    try:
        for room in TopologicalSorter(graph).static_order():
            heights[room] = 1 + max((heights[target] for target in graph[room]), default=-1)
    except CycleError:
        cycles = 1
    arrows = sum(len(targets) for targets in graph.values())
    return Layout(len(graph), 1 + max(heights.values(), default=-1), arrows, cycles)


def room_of(package: Path, path: Path) -> str:
    """Return the package or top file that a file belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Packages and top files of ours that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ipmerge_core"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}".split(".")[1]


def functions(tree: ast.AST) -> Iterator[Function]:
    """Iterate over all functions of a file, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions of a module, and methods of its classes, whose names have no underscore."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (
                each
                for each in node.body
                if isinstance(each, Function) and not each.name.startswith("_")
            )


def length(function: Function) -> int:
    """Return the number of lines of a function."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def share(items: list[Function], has: object) -> str:
    """Return the share of functions that have something, as text."""
    number = sum(bool(has(each)) for each in items)  # type: ignore[operator]
    return f"{number / len(items):.0%} of {len(items)}"


def count_lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text("utf-8").splitlines())


def tests_to_code(root: Path, files: list[Path]) -> float:
    """Return the ratio of lines of tests to lines of the package."""
    tests = (root / "tests").rglob("*.py")
    return sum(map(count_lines, tests)) / sum(map(count_lines, files))


def duplicates(root: Path) -> int:
    """Blocks of at least six equal lines, imports and docstrings aside."""
    command = [
        sys.executable, "-m", "pylint", "--disable=all", "--enable=duplicate-code",
        "--min-similarity-lines=6", "--recursive=y", "--persistent=no",
        *(name for name in CHECKED if (root / name).exists()),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if "rated at" not in done.stdout and "R0801" not in done.stdout:
        sys.exit(f"pylint did not run: {(done.stderr or done.stdout).strip()[-300:]}")
    return len(re.findall(r"\(duplicate-code\)", done.stdout))


if __name__ == "__main__":
    sys.exit(main())
