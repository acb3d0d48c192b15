"""Lay out the part of the Evaluate form that describes a search.

In: the chosen merge, whose method is searched at first. Out: the components, and the `SearchAsked`
that their values describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.evaluate.search_start import BUDGET, GRID, OPTIMIZER, SearchAsked
from ipmerge_core.ui.method_choice import EXPLORED_METHOD
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

OPTIMIZERS = {
    "gp-bo": "Gaussian process (gp-bo)",
    "cma-es": "CMA-ES",
    "pattern": "Pattern search",
    "powell": "Powell",
    "sobol": "Sobol sequence",
    "random": "Random",
    GRID: "Grid of the listed values",
}
GROUPS = ("math", "perception", "other")
RANGES_INFO = "One per line: NAME=LOW:HIGH or NAME=V1,V2,... Empty: usual space of the method"


class SearchFields(NamedTuple):
    """The components that describe a search, in their column."""

    column: gr.Column
    method: gr.Dropdown
    optimizer: gr.Dropdown
    ranges: gr.Textbox
    groups: gr.Dropdown
    evaluations: gr.Number
    minutes: gr.Number
    validation: gr.Number
    seed: gr.Number
    racing: gr.Checkbox
    unlabelled: gr.Checkbox

    @property
    def inputs(self) -> list[Any]:
        """The inputs of `search_asked_of`."""
        return list(self[1:])


def lay_out_search() -> SearchFields:
    """Lay out the fields in the open block."""
    with gr.Column(visible=False, elem_id="evaluate-search") as column:
        with gr.Row(elem_classes="fields"):
            method = gr.Dropdown(
                [("IP-Merging", EXPLORED_METHOD)],
                value=EXPLORED_METHOD,
                label="Method",
                info="Parameters without a range: from the chosen merge if it has this method",
                elem_id="search-method",
            )
            optimizer = gr.Dropdown(
                [(label, name) for name, label in OPTIMIZERS.items()],
                value=OPTIMIZER,
                label="Optimizer",
                elem_id="search-optimizer",
            )
        with gr.Row(elem_classes="fields"):
            ranges = gr.Textbox(
                "", lines=3, label="Ranges", info=RANGES_INFO, elem_id="search-ranges"
            )
            groups = gr.Dropdown(
                list(GROUPS),
                value=["math", "perception"],
                multiselect=True,
                label="Maximise the mean score of",
                info="Groups of items",
                elem_id="search-groups",
            )
        numbers = _lay_out_numbers()
        with gr.Row(elem_classes="fields"):
            racing = gr.Checkbox(
                value=False,
                label="Racing",
                info="Give bad points up after a quarter or half of their items",
                elem_id="search-racing",
            )
            unlabelled = gr.Checkbox(
                value=False,
                label="Without labels",
                info="One parameter with listed values: choose where answers agree most with "
                "those of neighbouring values. Optimizer: grid",
                elem_id="search-unlabelled",
            )
    return SearchFields(column, method, optimizer, ranges, groups, *numbers, racing, unlabelled)


def _lay_out_numbers() -> tuple[gr.Number, gr.Number, gr.Number, gr.Number]:
    """Lay out the budget, the share of validation items and the seed."""
    with gr.Row(elem_classes="fields"):
        evaluations = gr.Number(
            BUDGET,
            label="Evaluations",
            info="Each is a merge in memory and its score",
            precision=0,
            minimum=1,
            elem_id="search-evaluations",
        )
        minutes = gr.Number(
            0,  # Gradio shows an empty number as 0
            label="Minutes",
            info="The run ends after this time; 0: no limit",
            elem_id="search-minutes",
        )
        validation = gr.Number(
            0.2,
            label="Validation share",
            info="The result is scored on all other items",
            step=0.05,
            elem_id="search-validation",
        )
        seed = gr.Number(0, label="Seed of the optimizer", precision=0, elem_id="search-seed")
    return evaluations, minutes, validation, seed


def wire_search(fields: SearchFields, opened: Dependency, chosen: gr.State) -> None:
    """List the methods when the tab is opened, and propose the usual space of the chosen one."""
    asked, filled = [chosen, fields.method, fields.ranges], [fields.method, fields.ranges]
    opened.then(show_errors(partial(listed_methods, fields)), asked, filled, **QUIET)
    fields.method.input(show_errors(usual_ranges), fields.method, fields.ranges, **QUIET)
    fields.unlabelled.input(
        partial(fitting_optimizer, fields), fields.unlabelled, fields.optimizer, queue=False,
        **QUIET,
    )  # fmt: skip


def listed_methods(
    fields: SearchFields, chosen: ChosenMerge, method: str | None, ranges: str | None
) -> Updates:
    """Return the updates that list the methods with numbers.

    The first time, the chosen merge's method is proposed with its usual space; later the fields
    stay as they are.
    """
    from ipmerge_core.methods import METHODS

    listed = [
        (each.label, name)
        for name, each in METHODS.items()
        if any(parameter.kind in ("float", "int") for parameter in each.parameters)
    ]
    if (ranges or "").strip():
        return {fields.method: gr.update(choices=listed), fields.ranges: gr.skip()}
    own = chosen.recipe.method.name or EXPLORED_METHOD
    value = own if own in {name for _, name in listed} else method or EXPLORED_METHOD
    return {
        fields.method: gr.update(choices=listed, value=value),
        fields.ranges: usual_ranges(value),
    }


def fitting_optimizer(fields: SearchFields, unlabelled: bool) -> Updates:
    """Return the update that selects the grid, which a search without labels needs."""
    return {fields.optimizer: gr.update(value=GRID) if unlabelled else gr.skip()}


def usual_ranges(method: str | None) -> str:
    """Return the usual space of a method as text, one axis per line; empty if it has none.

    >>> usual_ranges("ip_merging").splitlines()[0]
    'lambda_=0.5,1,2,4,8'
    """
    from ipmerge_core.methods import find_method
    from ipmerge_core.search.space import space_of

    try:
        axes = space_of(find_method(method or EXPLORED_METHOD)).axes
    except PlanError:  # no usual space: the visitor gives ranges
        return ""
    return "\n".join(f"{axis.name}={','.join(f'{v:g}' for v in axis.values)}" for axis in axes)


def search_asked_of(values: Sequence[Any]) -> SearchAsked:
    """Return what the fields describe; the types are those of the components."""
    method, optimizer, ranges, groups, evaluations, minutes, validation, seed, *flags = values
    racing, unlabelled = map(bool, flags)
    return SearchAsked(
        method=str(method or ""),
        ranges=str(ranges or ""),
        optimizer=str(optimizer),
        evaluations=int(evaluations) if evaluations is not None else None,
        minutes=float(minutes) if minutes else None,
        groups=tuple(groups or ()),
        validation=float(validation or 0),
        racing=racing,
        seed=int(seed or 0),
        labels=not unlabelled,
    )
