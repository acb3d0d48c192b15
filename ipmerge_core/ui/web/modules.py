"""ES modules joined into the one script that Gradio takes; the app needs no build step for it.

Every module becomes a function of its own that is called once, after the modules it imports, so
what it does not export stays private:

    const web__store = (() => { ...; return { createStore }; })();

Of the language's imports and exports only the plain forms are understood, and everything else is
refused by name: `import { a, b } from "./file.js";` and `export` before a function, class or const.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

_IMPORT = re.compile(r'^import \{([^}]*)\} from "([^"]+)";\n', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?=(?:async function|function|class|const) ([\w$]+)\b)", re.MULTILINE
)
_OTHER = re.compile(r"^\s*(?:import|export)\b.*|\bimport\s*\(.*", re.MULTILINE)
_COMMENTS = re.compile(r"^ */\*\*(?:(?!\*/).)*\*/\n|^ *//[^\n]*\n", re.MULTILINE | re.DOTALL)


class Module(NamedTuple):
    """One file: the names it takes from others and gives, and its code without both keywords."""

    path: Path
    imports: dict[Path, tuple[str, ...]]
    exports: tuple[str, ...]
    body: str

    @property
    def name(self) -> str:
        """What the module is called in the joined script.

        >>> Module(Path("ui/web/store.js"), {}, (), "").name
        'web__store'
        """
        return re.sub(r"\W", "_", f"{self.path.parent.name}__{self.path.stem}")


def join_modules(entry: Path, call: str) -> str:
    """Return one script of a module and all that it imports, without their comments.

    Args:
        entry: the module that is run last.
        call: what the script does in the end: a call of one of the entry's exports.

    Raises: ValueError where a module is missing, imports what is not exported, is part of a
        cycle, gives a name twice, or uses a form that is not understood; the message names it.
    """
    modules = _load(entry.resolve())
    _check(modules)
    graph = {path: set(module.imports) for path, module in modules.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        cycle = " -> ".join(path.name for path in error.args[1])
        raise ValueError(f"Modules import each other in a circle: {cycle}") from None
    script = "".join(_wrapped(modules[path], modules) for path in order)
    return f"{script}{modules[entry.resolve()].name}.{call};\n"


def _load(entry: Path) -> dict[Path, Module]:
    modules: dict[Path, Module] = {}
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        if path not in modules:
            modules[path] = _parse(path)
            waiting += modules[path].imports
    return modules


def _parse(path: Path) -> Module:
    text = _COMMENTS.sub("", path.read_text(encoding="utf-8").rstrip() + "\n")
    imports: dict[Path, tuple[str, ...]] = {}
    for names, source in _IMPORT.findall(text):
        target = (path.parent / source).resolve()
        if not source.startswith(".") or not target.is_file():
            raise ValueError(f'{path.name} imports from "{source}", which does not exist.')
        imports[target] = (*imports.get(target, ()), *_names(names, path))
    exports = tuple(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub("", text))
    if other := _OTHER.search(body):
        raise ValueError(
            f"{path.name} has {other[0].strip()[:80]!r}; only named imports, and exports of a "
            "function, class or const, can be joined."
        )
    return Module(path, imports, exports, body)


def _names(text: str, path: Path) -> Iterator[str]:
    for name in filter(None, (part.strip() for part in text.split(","))):
        if not re.fullmatch(r"[\w$]+", name):
            raise ValueError(f"{path.name} imports {name!r}; renaming is not understood.")
        yield name


def _check(modules: dict[Path, Module]) -> None:
    called: dict[str, Path] = {}
    for path, module in modules.items():
        other = called.setdefault(module.name, path)
        if other != path:
            raise ValueError(f"{other} and {path} would both be called {module.name}.")
        taken = [name for names in module.imports.values() for name in names]
        for names in (taken, module.exports):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{path.name} has the name {twice[0]!r} twice.")
        for source, names in module.imports.items():
            if missing := sorted(set(names) - set(modules[source].exports)):
                raise ValueError(
                    f"{path.name} imports {missing[0]!r}, which {source.name} does not export."
                )


def _wrapped(module: Module, modules: dict[Path, Module]) -> str:
    taken = "".join(
        f"const {{ {', '.join(names)} }} = {modules[source].name};\n"
        for source, names in module.imports.items()
    )
    given = f"return {{ {', '.join(module.exports)} }};\n"
    return f"const {module.name} = (() => {{\n{taken}{module.body}{given}}})();\n"
