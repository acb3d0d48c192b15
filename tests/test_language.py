"""The wording of user-visible texts follows the PyTorch and Hugging Face documentation.

`BANNED` lists wording that was replaced, each with what to write instead. Checked are the string
literals of the package that contain prose (error messages, command-line help, labels), the string
literals and templates of its components in the browser, all docstrings, and the documentation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipmerge_core.cli.parser import make_parser
from ipmerge_core.planning.options import OPTIONS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ipmerge_core"
UI = PACKAGE / "ui"
PROMPTS = PACKAGE / "tasks" / "demo.py"  # its questions are data that the demo models learned

BANNED = {
    r"(some|no|every|any)body|whoever": "name the user or process, or use the passive voice",
    r"strangers?": "untrusted (input), or models that do not share the base",
    r"anew": "again",
    r"told|tells?|says?|said": "report, return, describe, state",
    r"words (of|for|to)|in words": "text, description, format",
    r"beside": "in addition to, next to",
    r"stands?( (in|at|by|above|below|beside|clear|there|for itself))": "is, is stored, exceeds",
    r"letters": "characters",
    r"trios?": "models",
    r"with(out)? eyes": "vision-language model, text model",
    r"goe?s? on (although|with|where|at)|went on": "continue, resume",
    r"asked for|asks? for": "requested",
    r"(is|are) no (hub|pack|plan|recipe|sample|image|number|regular|mergekit|model|decoder|lora)":
        "is not a (valid) ...",
    r"cannot (say|be said|be told)": "cannot express, is not available",
    r"legal": "valid",
    r"whole numbers?": "integer",
    r"descends? from|siblings? models?": "is fine-tuned from, share one base",
    r"plays? (no|a) part|takes? (no )?part": "is (not) used, participates",
    r"(is|are) taken|takes? no|takes? up": "is accepted, does not support",
    r"lets? go of|puts? away|carr(y|ies|ied) out": "release, close, execute, run",
    r"add(s|ed)? up to": "sum to",
    r"to the last bit|byte for byte": "bitwise identical",
    r"half a (file|model|pack)": "a partial ...",
    r"ourselves|our own|is ours|are ours": "name the project, or use the passive voice",
}  # fmt: skip
PATTERN = re.compile(r"(?<![\w-])(" + "|".join(BANNED) + r")(?![\w-])", re.IGNORECASE)
THRESHOLD = re.compile(r"S_(alpha|α)")  # typeset in the app; plain text says similarity threshold

DOCUMENTS = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets" / "demo" / "README.md"}
    | {path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"}
    | {ROOT / "benchmarks" / "README.md"}
)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def docstrings_of(tree: ast.AST) -> dict[int, tuple[int, str]]:
    """The docstrings of a module, by the identity of their node, with line and text."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found[id(first.value)] = first.lineno, str(first.value.value)
    return found


def messages_of(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a module that contain prose, docstrings excluded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = docstrings_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in known:
            text = node.value if isinstance(node.value, str) else ""
            if " " in text.strip():
                yield node.lineno, text


_SCRIPT = re.compile(
    r"/\*.*?\*/|//[^\n]*"  # comments
    r"|(?:(?<=[(=,:!])\s?|(?<=return ))/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/"  # expressions
    r"|`(?:\\.|[^`\\])*`|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)


def script_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a script that contain prose, without `${}` expressions."""
    text = path.read_text(encoding="utf-8")
    for found in _SCRIPT.finditer(text):
        literal = found.group()
        if literal[0] in "`\"'" and " " in literal.strip("`\"' "):
            yield text.count("\n", 0, found.start()) + 1, re.sub(r"\$\{[^}]*\}", "{}", literal)


def page_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of an HTML template, without its comments and tag names."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from enumerate(text.split("\n"), 1)


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a Markdown page without code, links and the generated list of docstrings."""
    fenced = False
    text = path.read_text(encoding="utf-8").partition("\n## Files\n")[0]
    for number, line in enumerate(text.split("\n"), 1):
        fenced ^= line.startswith("```")
        if not fenced:
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def banned_in(path: Path, texts: Iterator[tuple[int, str]]) -> list[str]:
    place = path.relative_to(ROOT).as_posix()
    return [
        f"{place}:{line}: '{found.group()}' in {' '.join(text.split())[:120]!r}"
        for line, text in texts
        for found in [PATTERN.search(text)]
        if found is not None
    ]


@pytest.mark.parametrize("outside_the_app", [True, False])
def test_messages_and_labels_use_the_terms_of_the_field(outside_the_app: bool) -> None:
    paths = [path for path in python_files(PACKAGE) if path.is_relative_to(UI) != outside_the_app]
    paths = [path for path in paths if path != PROMPTS]
    found = [line for path in paths for line in banned_in(path, messages_of(path))]
    assert not found, "\n".join(found)


def test_the_browser_components_use_the_terms_of_the_field() -> None:
    scripts = [p for p in sorted(UI.rglob("*.js")) if "node_modules" not in p.parts]
    found = [line for path in scripts for line in banned_in(path, script_texts(path))]
    found += [line for p in sorted(UI.rglob("*.html")) for line in banned_in(p, page_texts(p))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("outside_the_app", [True, False])
def test_docstrings_use_the_terms_of_the_field(outside_the_app: bool) -> None:
    found = []
    for path in python_files(PACKAGE):
        if path.is_relative_to(UI) != outside_the_app:
            docstrings = docstrings_of(ast.parse(path.read_text(encoding="utf-8")))
            found += banned_in(path, iter(docstrings.values()))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_the_terms_of_the_field(path: Path) -> None:
    found = banned_in(path, prose_of(path))
    assert not found, "\n".join(found)


def test_the_app_typesets_the_similarity_threshold() -> None:
    found = []
    for path in sorted(UI.rglob("*")):
        if path.suffix == ".py":
            texts = messages_of(path)
        elif path.suffix == ".js" and "node_modules" not in path.parts:
            texts = script_texts(path)
        elif path.suffix == ".html":
            texts = page_texts(path)
        else:
            continue
        place = path.relative_to(ROOT).as_posix()
        found += [
            f"{place}:{line}: {text[:90]!r}" for line, text in texts if THRESHOLD.search(text)
        ]
    assert not found, "\n".join(found)


def test_every_option_of_the_command_line_has_help() -> None:
    commands = next(a for a in make_parser()._actions if isinstance(a.choices, dict))
    missing = [
        f"{name} {action.option_strings or action.dest}"
        for name, command in commands.choices.items()
        for action in command._actions
        if not action.help
    ]
    assert not missing
    assert all(option.help and option.label for option in OPTIONS.values())


def test_the_check_finds_what_it_is_for(tmp_path: Path) -> None:
    """The patterns match prose and neither identifiers nor longer words."""
    module = PACKAGE / "errors.py"
    for text in (
        "'x' is no hub id.",
        "Somebody merged these",
        "2 trios",
        "S beside",
        "It says so.",
    ):
        assert banned_in(module, iter([(1, text)])), text
    for text in ("besides", "a triode", "hold on", "illegal-name", "anew_value", "is not a number"):
        assert not banned_in(module, iter([(1, text)])), text
    script = tmp_path / "a.js"
    script.write_text('// somebody\nconst a = "b c", d = `it ${told} them`; /* nobody else */\n')
    assert list(script_texts(script)) == [(2, '"b c"'), (2, "`it {} them`")]
    script.write_text('return /[",\\n]/.test(a) ? "b c" : d / 2; /* it\'s */\n')
    assert list(script_texts(script)) == [(1, '"b c"')]
