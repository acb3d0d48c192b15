"""The methods of the Merge tab as a form, made from their own signatures.

In: what a visitor chooses. Out: a `MethodChoice`, small plain values that fit in gr.State, and the
plan it stands for. The methods load torch, so the list is filled when the tab opens and the fields
are made when a method is chosen. Values are judged where the plan is made, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.ui.choice import analysis_of, plan_of
from ipmerge_core.ui.layer_map import PlanChoice

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.methods import Parameter
    from ipmerge_core.plan import MergePlan

EXPLORED = ""  # the name that stands for the plan from Explore
EXPLORED_LABEL = "IP-Merging: the plan from Explore"


class MethodChoice(NamedTuple):
    """The method that a visitor has chosen, and the values that differ from its defaults."""

    name: str = EXPLORED
    values: Mapping[str, float | int | bool | str | None] = {}


def method_form(method: gr.State, after: Callable[[Dependency], object]) -> gr.Dropdown:
    """Lay out the method's name and its fields; what is chosen goes into `method`.

    Args:
        method: holds a MethodChoice.
        after: wires what follows a change.
    """
    name = gr.Dropdown(
        [(EXPLORED_LABEL, EXPLORED)], value=EXPLORED, label="Method", elem_id="merge-method"
    )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    after(name.change(MethodChoice, name, method, queue=False, **quiet))

    @gr.render(inputs=name, triggers=[name.change], show_progress="hidden")  # type: ignore[untyped-decorator]
    def fields(chosen: str) -> None:
        if chosen == EXPLORED:
            return
        from ipmerge_core.methods import find_method

        found = find_method(chosen)
        gr.Markdown(f"`{found.formula}` ({found.source})")
        with gr.Row():
            for parameter in found.parameters:
                field = _field(parameter)
                keep: Callable[..., MethodChoice] = partial(with_value, parameter.name, chosen)
                after(field.change(keep, [method, field], method, queue=False, **quiet))

    return name


def offered() -> dict[str, Any]:
    """Return the dropdown's update: every method that needs no calibration, and why not others."""
    from ipmerge_core.methods import METHODS

    rest = [method for method in METHODS.values() if not method.selective]
    here = [(method.label, method.name) for method in rest if method.data is None]
    elsewhere = ", ".join(method.label for method in rest if method.data is not None)
    update: dict[str, Any] = gr.update(
        choices=[(EXPLORED_LABEL, EXPLORED), *here],
        info=f"Not here: {elsewhere}. They need a calibration on samples, made on the command line "
        f"with `ipmerge calibrate`.",
    )
    return update


def with_value(
    parameter: str, name: str, choice: MethodChoice, value: float | bool | str | None
) -> MethodChoice:
    """Return the choice with one more value; values of another method are left behind.

    >>> with_value("density", "ties", MethodChoice("ties", {"seed": 1}), 0.4).values
    {'seed': 1, 'density': 0.4}
    >>> with_value("density", "ties", MethodChoice("della", {"seed": 1}), 0.4).name
    'della'
    """
    if name != choice.name:  # an event of a field that is on its way out
        return choice
    return choice._replace(values={**choice.values, parameter: value})


def chosen_plan(pack_id: str, choice: PlanChoice, method: MethodChoice) -> MergePlan:
    """Make the plan of the chosen method, or the one from Explore.

    Raises: PlanError for a value that the method refuses, or more experts than it merges.
    """
    if method.name == EXPLORED:
        return plan_of(pack_id, choice)
    from ipmerge_core.plan import make_plan

    return make_plan(analysis_of(pack_id), method.name, **method.values)  # type: ignore[arg-type]


def _field(parameter: Parameter) -> gr.Checkbox | gr.Dropdown | gr.Number:
    """Make the form field that fits a parameter's kind."""
    words = [part for part in (parameter.bounds.help, parameter.expectation) if part]
    common: dict[str, Any] = {
        "label": parameter.name.rstrip("_").replace("_", " "),
        "info": "; ".join(words),
        "value": parameter.default,
        "interactive": True,
        "elem_id": f"parameter-{parameter.name.rstrip('_').replace('_', '-')}",
        "min_width": 180,
    }
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.kind == "choice":
        return gr.Dropdown(list(parameter.choices), **common)
    return gr.Number(
        precision=0 if parameter.kind == "int" else None, step=_step(parameter), **common
    )


def _step(parameter: Parameter) -> float:
    return 1 if parameter.kind == "int" else 0.05
