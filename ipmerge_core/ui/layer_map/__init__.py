"""The layer map: one `gr.HTML` component with its own JavaScript, drawn from an analysis pack.

In: `{"id": ..., "pack": ..., "plan": ..., "presets": [...]}`, plain JSON. Out: browser events:
`commit` when a plan has been chosen (once per drag, never during it), `cellselect` when a matrix
shall be drawn large, `packselect` when the page's address or its history names another pair;
`report` is the same component as one HTML file that needs no server. The browser computes every
preview itself; Python sees only the finished plan, and treats it as text from a stranger:
`read_commit` and `read_cells` check it against the pack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.web.modules import join_modules
from ipmerge_core.ui.written import as_html

HERE = Path(__file__).parent
MOUNT = "mount({ element, trigger, props, server, watch })"  # what Gradio gives to a component
ELEM_ID = "layer-map"
SIMILARITIES = ("first", "max", "weighted")
VARIANTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sum": {},
        "max": {"gamma_norm": "max"},
        "rescale_only": {"ablation": "rescale_only"},
        "select_only": {"ablation": "select_only"},
    }
)
LARGEST_LAMBDA = 32.0  # the end of the slider


class PlanChoice(NamedTuple):
    """What a visitor has chosen for a pair: small plain values, fit for gr.State."""

    similarity_threshold: float = 0.4
    lambda_: float = 1.0
    similarity: str = "first"
    variant: str = "sum"  # a key of VARIANTS
    overrides: Mapping[str, Literal["merge", "keep"]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that `make_plan` takes for this choice.

        >>> PlanChoice(variant="max").arguments["gamma_norm"]
        'max'
        """
        return {
            "similarity_threshold": self.similarity_threshold,
            "lambda_": self.lambda_,
            "similarity": self.similarity,
            "overrides": dict(self.overrides),
            **VARIANTS[self.variant],
        }

    def to_browser(self) -> dict[str, Any]:
        """The plan as the component writes and reads it.

        >>> PlanChoice(lambda_=2.0).to_browser()["lambda"]
        2.0
        """
        return {
            "s": self.similarity_threshold,
            "lambda": self.lambda_,
            "similarity": self.similarity,
            "variant": self.variant,
            "overrides": dict(self.overrides),
        }


def read_commit(values: object, pack: Mapping[str, Any]) -> PlanChoice:
    """Turn the data of a `commit` event into a plan, or say what is wrong with it.

    Raises: PlanError when a value is missing, of the wrong kind, out of range or unknown.
    """
    if not isinstance(values, Mapping):
        raise PlanError(f"A plan arrived as {type(values).__name__}; expected its five values.")
    return PlanChoice(
        similarity_threshold=_number("S_alpha", values.get("s"), 1.0),
        lambda_=_number("lambda", values.get("lambda"), LARGEST_LAMBDA),
        similarity=_choice("similarity", values.get("similarity"), SIMILARITIES),
        variant=_choice("update", values.get("variant"), tuple(VARIANTS)),
        overrides=_overrides(values.get("overrides") or {}, pack),
    )


def read_cell(values: object, pack: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the record that a `cellselect` event names. Raises: PlanError when there is none."""
    if isinstance(values, Mapping):
        for record in pack["records"]:
            if record["name"] == values.get("name") and record["expert"] == values.get("expert"):
                return dict(record)
    raise PlanError("This matrix is not in the analysis on show. Choose one in the map again.")


def read_cells(values: object, pack: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Find the chosen matrix's record and, if the event names one, the pinned one's."""
    pinned = values.get("pinned") if isinstance(values, Mapping) else None
    return [read_cell(each, pack) for each in ([values, pinned] if pinned else [values])]


def _number(label: str, value: object, highest: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= highest:  # type: ignore[operator]  # False for NaN
        return float(value)  # type: ignore[arg-type]
    raise PlanError(f"{label} is {str(value)[:40]!r}; expected a number from 0 to {highest:g}.")


def _choice(label: str, value: object, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise PlanError(f"Unknown {label} {str(value)[:40]!r}. Available: {', '.join(options)}.")
    return value


def _overrides(values: object, pack: Mapping[str, Any]) -> dict[str, Literal["merge", "keep"]]:
    if not isinstance(values, Mapping):
        raise PlanError("The overrides must map matrix names to 'merge' or 'keep'.")
    known = {record["name"] for record in pack["records"]}
    for name, value in values.items():
        if name not in known:
            raise PlanError(f"An override names {str(name)[:80]!r}, no matrix of this pair.")
        if value not in ("merge", "keep"):
            raise PlanError(
                f"The override of {name!r} is {str(value)[:40]!r}; expected merge or keep."
            )
    return dict(values)


@cache
def script() -> str:
    """The component's JavaScript, as one script."""
    return join_modules(HERE / "layer_map.js", MOUNT)


def report(content: Mapping[str, Any]) -> str:
    """Make one HTML file of the component and its content, for anyone, without a server."""
    parts = {
        "TITLE": as_html(f"IPMerge: {content['pack']['name']}"),
        "STYLE": "#ipmerge {" + (HERE / "style.css").read_text(encoding="utf-8") + "}",
        "TEMPLATE": (HERE / "template.html").read_text(encoding="utf-8"),
        "CONTENT": json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": script(),
    }
    page = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], page)


class LayerMap(gr.HTML):
    """The map of a pack, with its sliders, previews and details; see the module's docstring.

    Args:
        value: the content, see `ipmerge_core.ui.explore.map_content`.
        elem_id: the id of the component's element.
        server_functions: `report_file(pack_id, plan)`, if the page shall offer the HTML report;
            `grown(pack_id, n_known)`, if pairs may grow while they are on show.
        render: whether to stand in the page at once; Gradio's own, for `gr.skip()`.
    """

    def __init__(
        self,
        value: Mapping[str, Any] | None = None,
        elem_id: str = ELEM_ID,
        server_functions: list[Callable[..., Any]] | None = None,
        *,
        render: bool = True,
    ) -> None:
        super().__init__(
            value=value,
            html_template=(HERE / "template.html").read_text(encoding="utf-8"),
            css_template=(HERE / "style.css").read_text(encoding="utf-8"),
            js_on_load=script(),
            apply_default_css=False,
            elem_id=elem_id,
            server_functions=server_functions,
            render=render,
        )

    def postprocess(self, value: object) -> str | None:
        """Send the content as one string of JSON: the page then makes no proxies of its parts."""
        if value is None or isinstance(value, str):
            return value
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    def api_info(self) -> dict[str, Any]:
        """The content is a string of JSON."""
        return {"type": "string"}
