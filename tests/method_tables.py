"""The tables of merge methods in the documents, made from METHODS.

`python tests/method_tables.py` pastes them into README.md and docs/methods.md; `test_docs.py` fails
when they differ from what is made here.
"""

from __future__ import annotations

import re
from pathlib import Path

from ipmerge_core.methods import METHODS, MergeMethod
from ipmerge_core.methods.registry import Parameter
from ipmerge_core.planning.options import OPTIONS

ROOT = Path(__file__).parents[1]
HEADING = "## Merge methods\n\n"
HEAD = Path(__file__).with_name("methods_head.md")  # text above the generated sections
DEMO = "[demo-methods.md](demo-methods.md)"  # a link from there


def readme_table() -> str:
    """One row per method: what it does and where it comes from."""
    rows = ["| name | method | formula | source |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {method.label} | `{_cell(method.formula)}` | {method.source} |"
        for name, method in METHODS.items()
    ]
    return "\n".join(rows)


def methods_page() -> str:
    """The page with every parameter of every method."""
    head = HEAD.read_text(encoding="utf-8")
    head = head.replace("{options}", _options()).replace("{demo}", DEMO)
    return "\n".join([head, *map(_section, METHODS)])


def _options() -> str:
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for option in OPTIONS.values():
        values = ", ".join(f"`{value}`" for value in option.choices or ()) or "text"
        values = {"factors": "numbers", "share": "0 to 1", "rules": "`merge`, `keep`, by name"}.get(
            option.kind, values
        )
        default = f"`{option.default!r}`"
        lines.append(f"| `{option.name}` | {default} | {values} | {_cell(option.help)} |")
    return "\n".join(lines)


def _section(name: str) -> str:
    method = METHODS[name]
    lines = [f"## {method.label}: `{name}`", "", f"`{method.formula}`", "", f"{method.source}.", ""]
    lines += [f"Anchor: `{method.anchor}`. {_preview(method)} {_beside(method)}", ""]
    if method.parameters:
        lines += ["| parameter | default | valid values | meaning |", "|---|---|---|---|"]
        lines += [*map(_row, method.parameters), ""]
    return "\n".join(lines)


def _preview(method: MergeMethod) -> str:
    """Describe the preview of a plan with default parameters, made from an analysis."""
    parameters = method.complete({})
    measured = method.statistic is not None and method.statistic.of_norms(parameters)
    known = {
        "statistic": (0.5, 0.5) if measured else None,
        "layer": 0,
        "experts": 1,
        "cosine": 0.1,
        "squared_norms": (1.0, 1.0),
    }
    update = method.affine({**parameters, **known}) if method.affine else None
    if update is None:
        return f"Not previewable: {method.reason_unknown(parameters)}."
    return (
        f"Preview: approximate, {update.approximate}." if update.approximate else "Preview: exact."
    )


def _beside(method: MergeMethod) -> str:
    if method.vectors is not None:
        rule = "weighted by the models' shares" if method.data else "by the mean of their changes"
        return f"Norms, biases and embeddings (optional): {rule}."
    if method.matrixwise:
        return "Norms, biases and embeddings: not supported."
    return "Norms, biases and embeddings (optional): by the same formula, row by row."


def _row(parameter: Parameter) -> str:
    default = parameter.default
    shown = f"{default:g}" if isinstance(default, float) else repr(default)
    meaning = _cell(parameter.bounds.help)
    return f"| `{parameter.name}` | `{shown}` | {_cell(parameter.expectation)} | {meaning} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Paste both."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(HEADING)
    after = re.sub(r"\A(\|.*\n)+", "", rest)
    readme.write_text(f"{before}{HEADING}{readme_table()}\n{after}", encoding="utf-8")
    (ROOT / "docs" / "methods.md").write_text(methods_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
