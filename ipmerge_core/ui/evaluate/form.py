"""Lay out the form of the Evaluate tab: what is evaluated, on which tasks, with how many items.

In: the chosen merge, whose parameters a sweep can vary. Out: the components, and the `Asked` that
their values describe. Values are checked when a run is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.models.catalogue import scenario_of, skill_of
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.device_choice import device_field
from ipmerge_core.ui.evaluate.content import LABELS
from ipmerge_core.ui.evaluate.search_form import (
    SearchFields,
    lay_out_search,
    search_asked_of,
)
from ipmerge_core.ui.evaluate.start import Asked, Varied
from ipmerge_core.ui.method_choice import EXPLORED_METHOD
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.runs import Updates

KINDS = {
    "models": "Models: unmerged, chosen merge, finished merges",
    "sweep": "Sweep: values of one or two parameters",
    "ablation": "Ablation: parts of IP-Merging and of its layers",
    "knockout": "Layer knock-out: one module at a time",
    "search": "Search: the best parameters of a method",
}
REPLACEMENTS = {
    "constant": "constant 1/N",
    "zero": "zeros",
    "base": "weights of the base",
    "math": "weights of the math model",
    "update": "weights of the unmerged model (removes the update)",
}
PROPOSED = {  # values of a sweep, by parameter
    "similarity_threshold": "0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1",
    "lambda_": "0.5, 1, 2, 4, 8, 16",
    "math_weight": "0.1, 0.3, 0.5, 0.7, 1, 1.5",
    "alpha": "0.5, 0.7, 0.8, 0.9, 0.95",
    "density": "0.1, 0.2, 0.4, 0.6, 0.8",
}
DEMO_TASKS = ("demo", "demo:math", "demo:perception")
GUARDED = "Math tasks are evaluated together with their perception part"
DEFAULT_ITEMS = 25
NONE = ""


class Form(NamedTuple):
    """The components of the form."""

    kind: gr.Radio
    tasks: gr.Dropdown
    limit: gr.Number
    seed: gr.Number
    device: gr.Dropdown
    models: gr.Column
    merges: gr.Dropdown
    sweep: gr.Column
    parameter: gr.Dropdown
    values: gr.Textbox
    parameter2: gr.Dropdown
    values2: gr.Textbox
    knockout: gr.Column
    replace_by: gr.Dropdown
    modules: gr.Dropdown
    stride: gr.Number
    search: SearchFields
    start: gr.Button

    @property
    def groups(self) -> dict[str, gr.Column]:
        """The fields of one kind of evaluation only, by kind."""
        return {
            "models": self.models, "sweep": self.sweep, "knockout": self.knockout,
            "search": self.search.column,
        }  # fmt: skip

    @property
    def fields(self) -> list[Any]:
        """The inputs of `asked_of`."""
        return [
            self.kind, self.tasks, self.limit, self.seed, self.device, self.merges, self.parameter,
            self.values, self.parameter2, self.values2, self.replace_by, self.modules, self.stride,
            *self.search.inputs,
        ]  # fmt: skip


def lay_out_form(*, hosted: bool) -> Form:
    """Lay out the form in the open block."""
    kind = gr.Radio(
        [(label, name) for name, label in KINDS.items()],
        value="models",
        label="Evaluate",
        elem_id="evaluate-kind",
    )
    with gr.Row(elem_classes="fields"):
        tasks = gr.Dropdown(
            list(DEMO_TASKS),
            value=["demo"],
            multiselect=True,
            allow_custom_value=not hosted,
            label="Tasks",
            info=GUARDED,
            elem_id="evaluate-tasks",
        )
        limit = gr.Number(
            DEFAULT_ITEMS,
            label="Items per task",
            info="Of the demo task: per skill (nine skills)",
            precision=0,
            minimum=1,
            elem_id="evaluate-limit",
        )
        seed = gr.Number(
            0, label="Seed", info="Selects the items", precision=0, elem_id="evaluate-seed"
        )
        device = device_field("evaluate-device", "Device of evaluations")
    with gr.Column(elem_id="evaluate-models") as models:
        merges = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            label="Finished merges and fine-tuned models to compare",
            elem_id="evaluate-merges",
        )
    with (
        gr.Column(visible=False, elem_id="evaluate-sweep") as sweep,
        gr.Row(elem_classes="fields"),
    ):
        parameter, values = _varied("", "lambda_")
        parameter2, values2 = _varied("2", NONE)
    with (
        gr.Column(visible=False, elem_id="evaluate-knockout") as knockout,
        gr.Row(elem_classes="fields"),
    ):
        replace_by = gr.Dropdown(
            [(label, name) for name, label in REPLACEMENTS.items()],
            value="constant",
            label="Replace the weights by",
            info="N: number of output features",
            elem_id="evaluate-replace",
        )
        modules = gr.Dropdown(
            ["attention", "mlp"],
            value=["attention", "mlp"],
            multiselect=True,
            allow_custom_value=True,
            label="Modules",
            info="Or single ones, such as q and down",
            elem_id="evaluate-modules",
        )
        stride = gr.Number(
            1, label="Every n-th layer", precision=0, minimum=1, elem_id="evaluate-stride"
        )
    search = lay_out_search()
    start = gr.Button("Start evaluation", variant="primary", elem_id="start-evaluation")
    return Form(
        kind, tasks, limit, seed, device, models, merges, sweep, parameter, values, parameter2,
        values2, knockout, replace_by, modules, stride, search, start,
    )  # fmt: skip


def _varied(number: str, value: str) -> tuple[gr.Dropdown, gr.Textbox]:
    which = "Second parameter" if number else "Parameter"
    choices = [("none", NONE)] if number else []
    choices += [(_label(name), name) for name in ("similarity_threshold", "lambda_")]
    parameter = gr.Dropdown(
        choices, value=value, label=which, elem_id=f"evaluate-parameter{number}"
    )
    values = gr.Textbox(
        PROPOSED.get(value, ""),
        label=f"Values of the {which.lower()}",
        info="Separated by commas",
        elem_id=f"evaluate-values{number}",
    )
    return parameter, values


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " ").strip())


def shown_groups(form: Form, kind: str) -> Updates:
    """Return the updates that show the fields of a kind of evaluation."""
    groups = form.groups
    return {group: gr.update(visible=name == kind) for name, group in groups.items()}


def listed_parameters(form: Form, chosen: ChosenMerge, first: str, second: str) -> Updates:
    """Return the updates that list the parameters of the chosen merge's method."""
    from ipmerge_core.methods import find_method

    method = find_method(chosen.recipe.method.name or EXPLORED_METHOD)
    names = ["similarity_threshold", "similarity"] if method.needs_analysis else []
    names += [parameter.name for parameter in method.parameters]
    names.sort(key=lambda name: name not in PROPOSED)  # the usual ones first
    listed = [(_label(name), name) for name in names]
    value = first if first in names else (names[0] if names else None)
    other = second if second in names else NONE
    return {
        form.parameter: gr.update(choices=listed, value=value),
        form.parameter2: gr.update(choices=[("none", NONE), *listed], value=other),
        **({} if value == first else {form.values: PROPOSED.get(str(value), "")}),
    }


def listed_tasks(form: Form, chosen: ChosenMerge, *, hosted: bool) -> Updates:
    """Return the update that proposes tasks for the skill of the pair's experts.

    A Space has the demo tasks only: others are downloaded.
    """
    if hosted:
        return {}
    skill = skill_of(model.id for model in analysis_of(chosen.pack_id).sources.math)
    tasks = scenario_of(skill).tasks
    words = f"Proposed for {skill or 'math'}: {', '.join(tasks)}. {GUARDED}"
    return {form.tasks: gr.update(choices=[*DEMO_TASKS, *tasks], info=words)}


def proposed_values(parameter: str | None) -> str:
    """Return values that are proposed for a parameter; empty if there are none."""
    return PROPOSED.get(parameter or "", "")


def asked_of(values: Sequence[Any]) -> Asked:
    """Return what the fields of the form describe; the types are those of the components."""
    (
        kind, tasks, limit, seed, device, merges, parameter, typed, parameter2, typed2, replace_by,
        modules, stride, *searched,
    ) = values  # fmt: skip
    varied = [Varied(str(name), str(text or "")) for name, text in (
        (parameter or "", typed), (parameter2 or "", typed2)
    ) if name]  # fmt: skip
    return Asked(
        kind=str(kind),
        tasks=_listed(tasks),
        limit=int(limit) if limit is not None else None,
        seed=int(seed or 0),
        varied=tuple(varied),
        merges=_listed(merges),
        replace_by=str(replace_by),
        modules=_listed(modules),
        stride=int(stride or 0),
        device=str(device or "auto"),
        search=search_asked_of(searched),
    )


def _listed(values: object) -> tuple[str, ...]:
    """Return the texts of a list of choices; a page may send anything."""
    return tuple(map(str, values)) if isinstance(values, list | tuple) else ()
