"""What a plan can be told beside its method, in the words of forms, commands and tables.

In: nothing. Out: one `Option` for each; `make_plan` says what it does, `scope` what is legal.
Imports neither torch nor a method, so that a form can be laid out before either is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ANCHORS = {
    "inject": "the experts' changes, added to the whole MLLM",
    "two_base": "each model's change, from its own base",
    "root": "all changes, from the experts' base",
    "interp": "the way from the MLLM to the expert; no base",
}


class Option(NamedTuple):
    """One thing that a plan can be told. `choices` are values with their meaning; else a text."""

    name: str
    label: str
    help: str
    choices: Mapping[str, str] | None = None


OPTIONS = (
    Option(
        "include",
        "Only these matrices",
        "a regular expression: matrices whose names it finds merge",
    ),
    Option(
        "exclude", "But not these", "a regular expression: matrices whose names it finds are kept"
    ),
    Option(
        "layer_gains",
        "Gain over the layers",
        "factors on the experts' part from the first layer to the last, interpolated: 0 1 fades in",
    ),
    Option(
        "norms",
        "Norms and biases",
        "stay the MLLM's, or merge as matrices of one row",
        {"keep": "", "merge": ""},
    ),
    Option(
        "embeddings",
        "Embeddings and head",
        "stay the MLLM's, or merge the rows of tokens that every model has",
        {"keep": "", "merge-shared": ""},
    ),
    Option(
        "anchor",
        "Anchor",
        "what changes are measured from; the method's own where none is chosen",
        ANCHORS,
    ),
)
