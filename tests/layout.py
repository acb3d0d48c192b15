"""The layout of the package as a graph: which room imports which, on how many floors.

`python tests/layout.py` prints its figures; with `--write` it writes the picture and the list of
files in docs/architecture.md again. A room is a package or a file at the top of `ipmerge_core`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ipmerge_core"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- drawn by `python tests/layout.py --write` -->", "<!-- end of the picture -->"
FILES = "## Files\n"  # the last heading of the page

# From the ground up. A room imports only rooms of its own line and of the lines above it.
ORDER = [
    {"errors", "version"},
    {"runtime"},
    {"models"},
    {"spectral"},
    {"tasks"},
    {"methods"},
    {"analysis"},
    {"inference"},
    {"calibration"},
    {"planning"},
    {"merging"},
    {"adapters"},
    {"finetuning"},
    {"evaluation"},
    {"search"},
    {"plots"},
    {"ipmerge_core"},  # the facade itself, as `import ipmerge_core`
    {"ui"},
    {"cli"},
    {"__main__", "app"},
]
# The same inside `ui/`: what tabs share, then the tabs, then what puts them together.
UI_ORDER = [
    {"startup", "latex", "theme", "web", "serving"},
    {"safe_text"},
    {"pairs", "format", "formula"},
    {"errors", "plan_choice", "web_security", "knockout_files"},
    {"backend"},
    {"lending"},
    {"finished_merges", "runs", "method_choice", "device_choice", "live_answers", "api_requests"},
    {"chosen_merge", "finetuned_models"},
    {"explore"},
    {"analyse", "chat", "compare", "merge", "cite"},
    {"run_list"},
    {"evaluate"},
    {"finetune"},
    {"api"},
    {"app"},
]


class Import(NamedTuple):
    """One import: from which module of ours, what, where, and whether it waits for a call."""

    source: str  # the module that imports, without "ipmerge_core."
    module: str
    name: str
    place: str
    inside_function: bool
    for_types: bool

    @property
    def room(self) -> str:
        return self.source.split(".")[0]

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str | None:
        """What of ours this imports, without "ipmerge_core."; "" for the facade."""
        if self.top != "ipmerge_core":
            return "app" if self.top == "app" else None
        return ".".join(f"{self.module}.{self.name}".split(".")[1:])


def files() -> list[Path]:
    return [ROOT / "app.py", *sorted(PACKAGE.rglob("*.py"))]


def module_of(path: Path) -> str:
    if path.parent == ROOT:
        return path.stem
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".") or "ipmerge_core"


def room_of(path: Path) -> str:
    return module_of(path).split(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(
        found
        for path in files()
        for found in _imports(path, tree_of(path), inside_function=False, for_types=False)
    )


def _imports(
    path: Path, node: ast.AST, *, inside_function: bool, for_types: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        facts = (place(path, child), inside_function, for_types) if hasattr(child, "lineno") else ()
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module_of(path), alias.name, "", *facts)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{place(path, child)}: a relative import hides its room"
            for alias in child.names:
                yield Import(module_of(path), child.module or "", alias.name, *facts)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _imports(
                path,
                child,
                inside_function=inside_function or is_function,
                for_types=for_types or is_typing,
            )


def arrows() -> dict[tuple[str, str], list[str]]:
    """By (room, room that it imports), the places where it does."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in all_imports():
        if each.target is None or each.room == "ipmerge_core":
            continue
        known = set().union(*ORDER)
        first = each.target.split(".")[0]
        target = first if first in known else "ipmerge_core"
        if target != each.room:
            found.setdefault((each.room, target), []).append(each.place)
    return found


def ui_arrows() -> dict[tuple[str, str], list[str]]:
    """The same between the files and folders of `ui/`."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in all_imports():
        source, target = each.source.split("."), (each.target or "").split(".")
        if source[0] == target[0] == "ui" and len(source) > 1 and source[1] != target[1]:
            found.setdefault((source[1], target[1]), []).append(each.place)
    return found


def graph_of(pairs: Mapping[tuple[str, str], object]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for room, target in pairs:
        graph.setdefault(room, set()).add(target)
        graph.setdefault(target, set())
    return graph


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How high each room stands: one above the highest room that it imports."""
    heights: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        heights[room] = 1 + max((heights[target] for target in graph[room]), default=-1)
    return heights


def direct(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that a longer path implies."""
    below: dict[str, set[str]] = {}
    for room in TopologicalSorter(graph).static_order():
        below[room] = graph[room].union(*(below[target] for target in graph[room]))
    return {
        room: targets - set().union(*(below[target] for target in targets))
        for room, targets in graph.items()
    }


def picture() -> str:
    """The rooms and their direct arrows, as a Mermaid diagram."""
    graph = {room: targets for room, targets in graph_of(arrows()).items() if room != "version"}
    for targets in graph.values():
        targets.discard("version")
    lines = ["```mermaid", "graph BT"]
    for room, targets in direct(graph).items():
        lines += [f"    {room} --> {target}" for target in sorted(targets)]
    return "\n".join([*lines, "```"])


def file_list() -> str:
    """Every file of the package with the first line of its docstring, in import order."""
    rank = {room: n for n, rooms in enumerate(ORDER) for room in rooms}
    inside = {room: n for n, rooms in enumerate(UI_ORDER) for room in rooms}

    def key(path: Path) -> tuple[int, str, int, str]:
        parts = module_of(path).split(".")
        within = inside.get(parts[1], -1) if parts[0] == "ui" and len(parts) > 1 else 0
        return rank[parts[0]], parts[0], within, str(path)

    lines = ["", "| file | what it does |", "|---|---|"]
    for path in sorted((path for path in files() if path.parent != ROOT), key=key):
        first = (ast.get_docstring(tree_of(path)) or "").split("\n")[0]
        name = path.relative_to(PACKAGE).as_posix()
        lines.append(f"| `{name}` | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def page() -> str:
    """docs/architecture.md as it should be: its text, with the picture and the list of today."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1].split(FILES)[0]
    return f"{before}{START}\n\n{picture()}\n\n{END}{after}{FILES}{file_list()}\n"


def main() -> int:
    pairs = arrows()
    graph = graph_of(pairs)
    print(f"rooms {len(graph)}, floors {max(floors(graph).values()) + 1}, arrows {len(pairs)}")
    inside = graph_of(ui_arrows())
    print(f"in ui/: rooms {len(inside)}, floors {max(floors(inside).values()) + 1}")
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
