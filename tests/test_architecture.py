"""The layout of the package, enforced: import order, who may import what, sizes, no cycles.

Reads the source with `ast`; nothing is imported except in the last test. The order stands in
`layout.py`; a new room must be given its place there.
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from layout import (
    ORDER,
    PACKAGE,
    PAGE,
    ROOT,
    UI_ORDER,
    all_imports,
    arrows,
    files,
    floors,
    graph_of,
    page,
    place,
    room_of,
    tree_of,
    ui_arrows,
)

ROOMS = set().union(*ORDER)
REPORTS_BUGS = {"ui", "cli", "app", "__main__"}  # where a program error meets a person
PURE = {"errors", "spectral", "methods"}
IO_MODULES = {
    "io", "os", "pathlib", "shutil", "tempfile", "subprocess", "socket", "json", "gzip", "pickle",
    "safetensors", "huggingface_hub", "requests", "httpx", "urllib",
}  # fmt: skip
DRAWERS = {"utils", "util", "common", "config", "base", "types", "misc", "helpers", "tools"}


def offenders(*tops: str, allowed: set[str]) -> list[str]:
    return [
        f"{found.place}: {found.module}"
        for found in all_imports()
        if found.top in tops and found.room not in allowed
    ]


def test_every_room_has_a_place_in_the_order_and_no_drawer_name():
    assert {room_of(path) for path in files()} <= ROOMS, "give these a place in ORDER"
    rooms = {path.relative_to(PACKAGE / "ui").parts[0] for path in (PACKAGE / "ui").rglob("*.py")}
    in_ui = {name.removesuffix(".py") for name in rooms} - {"__init__"}
    assert in_ui <= set().union(*UI_ORDER), "give these a place in UI_ORDER"
    stems = {path.stem for path in files()} | {path.parent.name for path in files()}
    assert not stems & DRAWERS


@pytest.mark.parametrize(
    ("order", "pairs"), [(ORDER, arrows()), (UI_ORDER, ui_arrows())], ids=["packages", "ui"]
)
def test_imports_only_point_to_what_stands_above(order, pairs):
    rank = {room: n for n, rooms in enumerate(order) for room in rooms}
    wrong = [
        f"{where[0]}: {room} imports {target}"
        for (room, target), where in pairs.items()
        if rank[target] > rank[room]
    ]
    assert not wrong
    assert floors(graph_of(pairs)), "a cycle raises CycleError with its rooms"


def test_the_picture_and_the_list_of_files_are_those_of_today():
    """Write them again with `python tests/layout.py --write`."""
    assert PAGE.read_text("utf-8") == page()


def test_only_the_app_and_the_ui_import_gradio():
    assert not offenders("gradio", "gradio_client", allowed={"app", "ui"})


def test_ui_and_plots_import_neither_torch_nor_safetensors():
    everyone_else = ROOMS - {"app", "ui", "plots"}
    assert not offenders("torch", "safetensors", "transformers", "peft", allowed=everyone_else)


def test_only_plots_and_the_ui_import_plotly():
    assert not offenders("plotly", allowed={"plots", "ui"})


def test_only_these_import_transformers_and_only_inside_functions():
    """Of `models`, one module: it completes configs by the defaults of their classes."""
    assert not offenders(
        "transformers", allowed={"inference", "finetuning", "evaluation", "models"}
    )
    users = {each.source for each in all_imports() if each.top == "transformers"}
    assert {name for name in users if name.startswith("models.")} == {"models.forward_settings"}
    at_import = [
        found.place
        for found in all_imports()
        if found.top in {"transformers", "peft"} and not (found.inside_function or found.for_types)
    ]
    assert not at_import


def test_the_mathematical_rooms_do_no_input_or_output():
    assert not offenders(*IO_MODULES, allowed=ROOMS - PURE)
    wrong = [
        f"{found.place}: {found.target}"
        for found in all_imports()
        if found.room in PURE and (found.target or "").split(".")[0] in {"models", "analysis"}
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
        if room_of(path) not in REPORTS_BUGS and path.name != "job_process.py"
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
