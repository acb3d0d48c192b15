"""The tables of merge methods in the documents, made from METHODS.

`python tests/method_tables.py` pastes them into README.md and docs/methods.md; `test_docs.py` fails
when they differ from what is made here.
"""

from __future__ import annotations

import re
from pathlib import Path

from ipmerge_core.methods import METHODS
from ipmerge_core.methods.registry import Parameter

ROOT = Path(__file__).parents[1]
HEADING = "## Merge methods\n\n"
PAGE = """# Merge methods and their parameters

`W0` is the base, `W_v` the MLLM, `W_e` the math model; `dW_v = W_v - W0` and `dW_e = W_e - W0` are
their task vectors. Parameters are keywords of `make_plan` and of `METHODS[name](base, mllm, math)`.

`anchor` says where changes are measured from and where they land. `W0` is the experts' base and
`B_v` the MLLM's own, the same model unless `base_mllm` names another:

| anchor | task arithmetic becomes | use |
|---|---|---|
| `two_base` (default) | `B_v + a_v (W_v - B_v) + a_e (W_e - W0)` | each model from its own base |
| `root` | `W0 + a_v (W_v - W0) + a_e (W_e - W0)` | one base for all, as mergekit does |
| `inject` | `W_v + a_e (W_e - W0)` | the MLLM stays whole; its own base plays no part |
| `interp` | `W_v + a_e (W_e - W_v)` | the line between the two models; no base plays a part |

With one base `two_base` and `root` are the same. With `inject` and `interp` a method thins or
elects among the experts' changes alone. They need a method with `math_weight`; the methods that
decompose matrices or need a calibration take `two_base` only.

This page is made from the methods' own signatures by `python tests/method_tables.py`.
"""


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
    return "\n".join([PAGE, *map(_section, METHODS)])


def _section(name: str) -> str:
    method = METHODS[name]
    lines = [f"## {method.label}: `{name}`", "", f"`{method.formula}`", "", f"{method.source}.", ""]
    if method.parameters:
        lines += ["| parameter | default | legal values | meaning |", "|---|---|---|---|"]
        lines += [*map(_row, method.parameters), ""]
    return "\n".join(lines)


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
