"""The layout of the package, enforced: import order, who may import what, sizes, no cycles.

Reads the source with `ast`; nothing is imported except in the last test. A new file in the package
must be given its place in ORDER.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ipmerge_core"

# From the ground up. A room may import rooms of its own line and of the lines above it.
ORDER = [
    {"errors", "version"},
    {"pipeline", "devices", "ranks", "files"},
    {"weight_files", "checkpoint", "writer"},
    {"catalogue", "decoders"},
    {"differences", "siblings"},
    {"pairing"},
    {"measurements", "vocabulary"},
    {"engines"},
    {"spectrum"},
    {"similarity"},
    {"records"},
    {"journal"},
    {"comparison"},
    {"analysis"},
    {"methods"},
    {"options", "preview", "scope"},
    {"plan"},
    {"recipes"},
    {"work", "costs", "card", "manifest"},
    {"first_pass", "merging", "adapter"},
    {"prompts"},
    {"inference"},
    {"evaluate", "drift"},
    {"samples", "passes", "calibration"},
    {"search"},
    {"plots", "jobs"},
    {"ipmerge_core"},  # the facade itself, as `import ipmerge_core`
    {"ui", "cli"},
    {"__main__", "app"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
REPORTS_BUGS = {"ui", "cli", "jobs", "app", "__main__"}  # where a program error meets a person
PURE = {"errors", "engines", "spectrum", "similarity", "comparison", "methods"}
IO_MODULES = {
    "io", "os", "pathlib", "shutil", "tempfile", "subprocess", "socket", "json", "gzip", "pickle",
    "safetensors", "huggingface_hub", "requests", "httpx", "urllib",
}  # fmt: skip
DRAWERS = {"utils", "util", "common", "config", "base", "types", "misc", "helpers", "tools"}


class Import(NamedTuple):
    """One import of a room: what, where, and whether it waits until a function runs."""

    room: str
    module: str
    name: str
    place: str
    inside_function: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str | None:
        """The room of ours that this imports, if any."""
        if self.top != "ipmerge_core":
            return "app" if self.top == "app" else None
        rest = f"{self.module}.{self.name}".split(".")[1:]
        return rest[0] if rest[0] in RANK else "ipmerge_core"


def files() -> list[Path]:
    return [ROOT / "app.py", *sorted(PACKAGE.rglob("*.py"))]


def room_of(path: Path) -> str:
    if path.parent == ROOT:
        return path.stem
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "ipmerge_core" if first == "__init__" else first


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imports_of(path: Path) -> Iterator[Import]:
    yield from _imports(path, tree_of(path), inside_function=False, for_types=False)


def _imports(
    path: Path, node: ast.AST, *, inside_function: bool, for_types: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        facts = (place(path, child), inside_function, for_types) if hasattr(child, "lineno") else ()
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(room_of(path), alias.name, "", *facts)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{place(path, child)}: a relative import hides its room"
            for alias in child.names:
                yield Import(room_of(path), child.module or "", alias.name, *facts)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _imports(
                path,
                child,
                inside_function=inside_function or is_function,
                for_types=for_types or is_typing,
            )


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in files() for found in imports_of(path))


def offenders(*tops: str, allowed: set[str]) -> list[str]:
    return [
        f"{found.place}: {found.module}"
        for found in all_imports()
        if found.top in tops and found.room not in allowed
    ]


def test_every_room_has_a_place_in_the_order_and_no_drawer_name():
    rooms = {room_of(path) for path in files()}
    assert rooms <= set(RANK), "give these a place in ORDER"
    stems = {path.stem for path in files()} | {path.parent.name for path in files()}
    assert not stems & DRAWERS


def test_imports_only_point_to_what_stands_above():
    wrong = [
        f"{found.place}: {found.room} imports {found.target}"
        for found in all_imports()
        if found.target
        and found.room not in ("ipmerge_core", found.target)
        and RANK[found.target] > RANK[found.room]
    ]
    assert not wrong


def test_no_import_cycles_between_rooms():
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.target and found.target != found.room != "ipmerge_core":
            graph.setdefault(found.room, set()).add(found.target)
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_only_the_app_and_the_ui_import_gradio():
    assert not offenders("gradio", "gradio_client", allowed={"app", "ui"})


def test_ui_and_plots_import_neither_torch_nor_safetensors():
    everyone_else = set(RANK) - {"app", "ui", "plots"}
    assert not offenders("torch", "safetensors", "transformers", "peft", allowed=everyone_else)


def test_only_plots_and_the_ui_import_plotly():
    assert not offenders("plotly", allowed={"plots", "ui"})


def test_only_inference_drift_and_evaluate_import_transformers_and_only_inside_functions():
    assert not offenders("transformers", allowed={"inference", "drift", "evaluate"})
    at_import = [
        found.place
        for found in all_imports()
        if found.top in {"transformers", "peft"} and not (found.inside_function or found.for_types)
    ]
    assert not at_import


def test_the_mathematical_rooms_do_no_input_or_output():
    assert not offenders(*IO_MODULES, allowed=set(RANK) - PURE)
    wrong = [
        f"{found.place}: {found.target}"
        for found in all_imports()
        if found.room in PURE and found.target in {"files", "checkpoint", "writer", "analysis"}
    ]
    calls = [
        place(path, node)
        for path in files()
        if room_of(path) in PURE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"open", "print", "input"}
    ]
    assert not wrong + calls


def test_broad_handlers_in_the_core_only_clean_up_and_raise_again():
    """Raise the same again, that is; `errors.explained` alone raises an error of ours from it."""
    wrong = [
        place(path, node)
        for path in files()
        if room_of(path) not in REPORTS_BUGS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not (
            isinstance(node.body[-1], ast.Raise)
            and (node.body[-1].exc is None or (room_of(path) == "errors" and node.body[-1].cause))
        )
    ]
    assert not wrong


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_below_450_lines_and_functions_below_80(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    long = [
        f"{place(path, node)}: {node.name}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= 80
    ]
    assert not long


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(tree_of(path)), "a module starts with a docstring"


def test_building_the_app_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from ipmerge_core.ui.app import build_app; build_app();"
        "heavy = {'torch', 'transformers', 'safetensors.torch', 'scipy', 'sklearn'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
