"""Options of a plan other than its method and parameters, for forms, CLI and docs.

Defines one `Option` each; `make_plan` documents them, `scope` validates them. Imports neither torch
nor methods, so that a form can be built before they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ANCHORS = {
    "inject": "add the experts' task vectors to the MLLM",
    "two_base": "task vectors relative to each model's own base",
    "root": "all task vectors relative to the experts' base",
    "interp": "interpolate from the MLLM to the expert; no base",
}


class Option(NamedTuple):
    """One option of a plan. `choices` maps values to descriptions; None means free text."""

    name: str
    label: str
    help: str
    choices: Mapping[str, str] | None = None


OPTIONS = (
    Option(
        "include",
        "Include matrices",
        "regular expression: only matrices with a matching name are merged",
    ),
    Option(
        "exclude", "Exclude matrices", "regular expression: matrices with a matching name are kept"
    ),
    Option(
        "layer_gains",
        "Layer gains",
        "update scale per layer, interpolated from first to last layer; 0 1 increases linearly",
    ),
    Option(
        "norms",
        "Norms and biases",
        "keep the MLLM's, or merge them as one-row matrices",
        {"keep": "", "merge": ""},
    ),
    Option(
        "embeddings",
        "Embeddings and head",
        "keep the MLLM's, or merge the rows of tokens shared by all models",
        {"keep": "", "merge-shared": ""},
    ),
    Option(
        "anchor",
        "Anchor",
        "reference weights for the task vectors; the default depends on the method",
        ANCHORS,
    ),
)
